"""A request to a chat model: its turns, images and videos, and their encoding to a prompt."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvl.config import TilesConfig
from internvl.data.arguments import check_whole, list_images, listed
from internvl.data.chat import ChatEncoder
from internvl.data.images import STATISTICS, Exif, FileSlice, Triple, rgb_at
from internvl.data.messages import (
    IMAGE_MARK,
    VIDEO_MARK,
    Slot,
    fill_marks,
    from_openai,
    has_marks,
    in_order,
    list_marks,
    wrong_marks,
)
from internvl.data.records import Message, Video
from internvl.data.tiles import tile_images
from internvl.data.video import read_video
from internvl.errors import BadSample, UserError, counted

ImageInput = str | Path | bytes | BinaryIO | FileSlice | Image.Image | np.ndarray | Tensor
"""A path, `data:` address, encoded file or file object; a Pillow image, uint8 array (H, W) or
(H, W, C) or tensor (C, H, W); or the normalized tiles of an image, float (N, 3, S, S)."""
VideoInput = str | Path | Video | Sequence[ImageInput]
"""A video file or folder of frames, by its path or, with a clip, as `Video`; or its frames."""


@dataclass(frozen=True)
class Request:
    """A conversation to answer.

    messages: turns as Message or {"role": …, "content": …}, checked like training data; the last
    one is from the user. A text alone is one question. `<image>` and `<video>` marks place images
    and videos, `\\<image>` is the word; without any mark, images and then videos precede the last
    question. A content may be a list of OpenAI content parts; their images stand at their parts.
    images: one or several; either images, which are tiled, or the normalized tiles of each image.
    videos: one or several. A frame is one tile, preceded by a line with its number.
    num_frames: frames of each video, spread evenly; frames that are passed are all used.
    max_tiles: most tiles of all images together, thumbnails not counted; None: the checkpoint's.
        A list has the most tiles of each image, which then share nothing.
    prefix: how the answer begins; it is continued, and is part of the answer that is returned.

    Raises:
        UserError: not images or videos, or a number out of range.
    """

    messages: Sequence[Message | Mapping[str, Any]] | Message | Mapping[str, Any] | str
    images: Sequence[ImageInput] | ImageInput = ()
    videos: Sequence[VideoInput] | VideoInput = ()
    num_frames: int = 8
    max_tiles: int | Sequence[int] | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        messages: Any = self.messages
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        elif isinstance(messages, Message | Mapping):
            messages = [messages]
        check_whole("num_frames", self.num_frames, 1)
        if isinstance(self.max_tiles, Sequence) and not isinstance(self.max_tiles, str):
            for index, most in enumerate(self.max_tiles):
                check_whole(f"max_tiles[{index}]", most, 1)
        elif self.max_tiles is not None:
            check_whole("max_tiles", self.max_tiles, 1)
        images = () if self.images is None else list_images(self.images)
        # File objects become bytes once: a request may be encoded twice, an iterator read once.
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "messages", messages)
        object.__setattr__(self, "videos", list_videos(self.videos))


def list_videos(videos: Any) -> list[Any]:
    """Lists videos; a single path or `Video`, or None, becomes a list of one or none.

    Raises:
        UserError: an unordered collection, or not a list.
    """
    if videos is None:
        return []
    single = isinstance(videos, str | os.PathLike | Video)
    return [videos] if single else listed(videos, "videos")


def list_requests(requests: Any) -> list[Request]:
    """Lists requests; a single one becomes a list of one, a text a question without images.

    Raises:
        UserError: an unordered collection, or not a list.
    """
    # A message too: "not a Request" says more than that a dictionary is no list.
    alone = isinstance(requests, Request | str | Message | Mapping)
    values = [requests] if alone else listed(requests, "requests")
    return [Request(value) if isinstance(value, str) else value for value in values]


@dataclass(frozen=True)
class Prompt:
    """An encoded request: `input_ids` int64 (T,); `tiles` (N, 3, S, S), uint8, or float if
    normalized; None without images."""

    input_ids: np.ndarray
    tiles: Tensor | None
    begun: tuple[int, ...] = ()
    """The last of `input_ids`, which are the beginning of the answer."""

    @property
    def num_tiles(self) -> int:
        """Tiles of its images and frames."""
        return 0 if self.tiles is None else len(self.tiles)


def encode(
    request: Request,
    encoder: ChatEncoder,
    tiles: TilesConfig,
    name: str = "request",
    *,
    exif: Exif = "ignore",
    normalize: str = "imagenet",
) -> Prompt:
    """Opens and tiles the images and frames of a request, and encodes its prompt.

    Args:
        name: name of the request in error messages.
        normalize: a key of STATISTICS; its mean is the color that `tiles.pad_square` pads with,
            as in training.

    Raises:
        BadImage: an image or video cannot be read.
        BadSample: see `check_turns`.
        UserError: tiles of another shape, or tiles together with images.
    """
    messages, media = check_turns(request, encoder, name)
    images: list[Any] = []
    is_frame: list[bool] = []
    frame_counts: list[int] = []
    for mark, medium in media:
        if mark == VIDEO_MARK:
            frames = read_video(medium, request.num_frames, f"{name}: video", exif)
            frame_counts.append(len(frames))
            images += frames
            is_frame += [True] * len(frames)
        else:
            images.append(medium)
            is_frame.append(False)
    most = request.max_tiles
    if isinstance(most, Sequence):
        if len(most) != is_frame.count(False):
            raise UserError(
                f"{name}: max_tiles lists {len(most)}, and there are "
                f"{counted(is_frame.count(False), 'image')}; list the most tiles of each image"
            )
    elif most is not None:
        tiles, most = _at_most(tiles, most), None
    mean = STATISTICS[normalize][0]
    pixels, tiles_per_image = stack_tiles(images, is_frame, tiles, name, exif, mean, most)
    messages = _with_frames(messages, frame_counts)
    ids = encoder.prompt(messages, tiles_per_image, name)
    if not request.prefix:
        return Prompt(ids, pixels)
    longer = encoder.prompt(messages, tiles_per_image, name, request.prefix)
    # The tokens at the seam may differ: the template's last character may join the prefix's first.
    shared = min(len(ids), len(longer))
    differs = np.flatnonzero(ids[:shared] != longer[:shared])
    start = int(differs[0]) if len(differs) else shared
    return Prompt(longer, pixels, tuple(longer[start:].tolist()))


def check_turns(
    request: Request, encoder: ChatEncoder, name: str = "request"
) -> tuple[Sequence[Message], list[Slot]]:
    """Checks turns and marks as in training; opens no image and no video.

    Returns:
        The ordered messages, all marks in them, and (mark, image or video) of every mark in order.

    Raises:
        BadSample: turns that training would refuse, or marks that do not match the images or the
            videos.
        UserError: not a Request.
    """
    if not isinstance(request, Request):
        type_name = type(request).__name__
        raise UserError(f"{name} is a {type_name}, not internvl.Request(messages, images)")
    # Strict: training drops unknown keys of a message, a request may rely on them.
    messages, slots = from_openai(name, request.messages, strict=True)
    messages = encoder.ordered(name, messages, "user")  # type: ignore[assignment]
    media = {
        IMAGE_MARK: in_order(slots, IMAGE_MARK, request.images),  # type: ignore[arg-type]
        VIDEO_MARK: in_order(slots, VIDEO_MARK, request.videos),  # type: ignore[arg-type]
    }
    marked = with_marks(messages, len(media[IMAGE_MARK]), len(media[VIDEO_MARK]))
    for mark, values in media.items():
        reason = wrong_marks(marked, mark, len(values))
        if reason is not None:
            raise BadSample(name, reason)
    left = {mark: iter(values) for mark, values in media.items()}
    return marked, [(mark, next(left[mark])) for mark in list_marks(marked)]


def with_marks(
    messages: Sequence[Message], num_images: int, num_videos: int = 0
) -> Sequence[Message]:
    """Puts the images' and videos' marks before the last question if no question has one."""
    *earlier, last = messages
    # Images first, as in the original's prompts of one image and of one video.
    marks = "" if has_marks(messages, IMAGE_MARK) else f"{IMAGE_MARK}\n" * num_images
    marks += "" if has_marks(messages, VIDEO_MARK) else f"{VIDEO_MARK}\n" * num_videos
    return [*earlier, Message(last.role, marks + last.content)] if marks else messages


def _with_frames(messages: Sequence[Message], frame_counts: Sequence[int]) -> Sequence[Message]:
    """Replaces every video mark by a line per frame, "Frame1: <image>"."""
    if not frame_counts:
        return messages
    counts = iter(frame_counts)

    def lines() -> str:
        # Without the hyphen of training's default: the original's evaluation and guides have none.
        return "\n".join(f"Frame{n}: {IMAGE_MARK}" for n in range(1, next(counts) + 1))

    return [
        Message(m.role, fill_marks(m.content, VIDEO_MARK, lines)) if m.role == "user" else m
        for m in messages
    ]


def stack_tiles(
    images: Sequence[Any],
    is_frame: Sequence[bool],
    config: TilesConfig,
    name: str,
    exif: Exif,
    mean: Triple,
    most: Sequence[int] | None = None,
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Returns (tiles (N, 3, S, S) or None without images, number of tiles of each image).

    Args:
        most: most tiles of each image that is no frame; None: all share those of `config`.

    Raises:
        BadImage: an image cannot be read; it is named by its index.
        UserError: tiles of another shape, or tiles together with images.
    """
    # An image tensor is uint8 with at most 3 dimensions; any other tensor must be tiles.
    ready = [i for i in images if isinstance(i, Tensor) and (i.dim() > 3 or i.is_floating_point())]
    if ready:
        shape = (3, config.size, config.size)
        # Not mixed with images: one batch would hold normalized and raw pixels.
        if len(ready) < len(images) or any(t.shape[1:] != shape or t.dim() != 4 for t in ready):
            raise UserError(
                f"tiles must be normalized tensors of shape (N, {', '.join(map(str, shape))}), "
                "one for every image of the request"
            )
        return torch.cat(ready), tuple(map(len, ready))
    opened = [rgb_at(f"{name}: image {n}", image, exif) for n, image in enumerate(images)]
    tiles: dict[int, Tensor] = {}
    whole = [index for index, frame in enumerate(is_frame) if not frame]
    frames = [index for index, frame in enumerate(is_frame) if frame]
    # Images share the budget of tiles; a frame is one tile, as in training.
    groups = [(config, whole), (_at_most(config, 1), frames)]
    if most is not None:
        alone = [(_at_most(config, n), [i]) for i, n in zip(whole, most, strict=True)]
        groups = [*alone, groups[1]]
    for limits, indices in groups:
        cut = tile_images([opened[index] for index in indices], limits, limits.max, mean=mean)
        if cut is not None:
            tiles |= zip(indices, cut.pixels.split(cut.per_image), strict=True)
    if not tiles:
        return None, ()
    ordered = [tiles[index] for index in range(len(images))]
    return torch.cat(ordered), tuple(map(len, ordered))


def _at_most(config: TilesConfig, most: int) -> TilesConfig:
    """Returns the tiling with at most `most` tiles."""
    return replace(config, min=min(config.min, most), max=most)
