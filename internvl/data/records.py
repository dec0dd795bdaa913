"""The records that travel from an annotation file to a model call.

    sample   as read: messages that refer to images            (data/sources.py)
    example  as encoded: ids, labels, tiles                      (data/chat.py, data/tiles.py)
    unit     examples of one image that share a prefix         (data/packing.py)
    batch    what one model call takes: a packed row             (data/packing.py)

Retrieval has pairs instead: sample -> `Pair` -> `PairBatch`     (data/pair_reader.py)

Shape legend of the package: B samples, N tiles, S tile side (px), P patch side (px), K visual
tokens per tile, L packed row length, T tokens of one example, M supervised positions of a row,
D hidden size, V vocabulary.
"""

import os
import sys
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from internvl.data.images import ImageRef
from internvl.errors import BadImage

IGNORE = -100
"""Label of a position that is not supervised."""

Grid = tuple[int, int]
"""(columns, rows) of the tiles an image is cut into, the thumbnail not counted."""


@dataclass(frozen=True)
class Message:
    """One turn. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Video:
    """A video file, or a folder of frames, and the part of it that is meant, in seconds.

    Raises:
        BadImage: the path is none, or the part is not two times of which the first is earlier.
    """

    path: str
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        path = os.fspath(self.path) if isinstance(self.path, os.PathLike) else self.path
        if not isinstance(path, str):
            raise BadImage(f"a video is named by its path, not by {type(path).__name__}")
        object.__setattr__(self, "path", path)  # frozen, once it is made
        if self.start_s is self.end_s is None:
            return
        check_clip([self.start_s, self.end_s])
        for key in ("start_s", "end_s"):
            object.__setattr__(self, key, float(getattr(self, key)))


def check_clip(clip: Any) -> None:
    """Raises BadImage unless `clip` is [start, end], two finite times in seconds from 0 on."""
    times = isinstance(clip, list) and len(clip) == 2
    times = times and all(isinstance(t, Real) and not isinstance(t, bool) for t in clip)
    # A whole number of a JSON file may be larger than any float.
    if not times or not 0 <= clip[0] < clip[1] <= sys.float_info.max:
        raise BadImage(
            f"`clip` must be [start, end] in seconds, 0 <= start < end, not {clip!r}; leave it out "
            "for the whole video"
        )


@dataclass(frozen=True)
class Sample:
    """One line of an annotation file, checked for form; its images are not opened yet."""

    name: str
    """Where it stands, for messages: "data/train.jsonl line 4812"."""
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()
    """Paths or encoded bytes, in the order of the `<image>` marks."""
    videos: tuple[Video, ...] = ()
    """In the order of the `<video>` marks."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the line that training does not use, kept for evaluators."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of one sample's images.

    `pixels` is uint8 (N, 3, S, S), normalized later on the device; `per_image` sums to N.
    """

    pixels: Tensor
    per_image: tuple[int, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Example:
    """An encoded sample. `input_ids` and `labels` are int64 (T,), labels not shifted."""

    name: str
    input_ids: np.ndarray
    labels: np.ndarray
    tiles_per_image: tuple[int, ...] = ()

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Unit:
    """Examples of the same images; `prefix` leading tokens are the same in all of them.

    A unit of one example is the ordinary case. `tiles` is uint8 (N, 3, S, S) or None.
    """

    examples: tuple[Example, ...]
    prefix: int
    tiles: Tensor | None

    @property
    def num_tiles(self) -> int:
        return 0 if self.tiles is None else len(self.tiles)

    @property
    def num_tokens(self) -> int:
        """Tokens in a row: the prefix once, every branch after it."""
        return self.prefix + sum(len(e.input_ids) - self.prefix for e in self.examples)


class Batch(Protocol):
    """What the training loop asks of any batch. Its fields that are tensors go to the device."""

    names: tuple[str, ...]
    """The samples of the batch."""

    @property
    def num_samples(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_tiles(self) -> int: ...

    def to(self, device: Any) -> Any: ...


@dataclass
class PackedBatch:
    """One packed row, on CPU until used.

    A token sees earlier tokens of its own document that are in the prefix (branch 0) or in its own
    branch. Position `loss_positions[m]` predicts `targets[m]`: the last prefix token predicts the
    first token of every branch, so positions may repeat.
    """

    input_ids: Tensor
    """int64 (1, L)"""
    position_ids: Tensor
    """int64 (1, L); restarts with every document, a branch goes on from its prefix."""
    document: Tensor
    """int64 (L,), 0, 1, …; below 0 is padding."""
    branch: Tensor
    """int64 (L,); 0 is the prefix."""
    pixel_values: Tensor | None
    """uint8 (N, 3, S, S), or None where the row has no image."""
    loss_positions: Tensor
    """int64 (M,), indices into the row."""
    targets: Tensor
    """int64 (M,)"""
    loss_weights: Tensor
    """float32 (M,)"""
    names: tuple[str, ...]
    """The samples of the row."""
    starts: Tensor | None = None
    """int32 (D + 1,): where the documents begin, those of padding too, and the row's end. None in
    a run whose documents may have branches."""

    @property
    def num_samples(self) -> int:
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        return int((self.document >= 0).sum())

    @property
    def num_tiles(self) -> int:
        return 0 if self.pixel_values is None else len(self.pixel_values)

    def to(self, device: Any) -> "PackedBatch":
        return PackedBatch(**_moved(self, device))


@dataclass(frozen=True)
class Pair:
    """An image, its caption, and a caption of another image. Ids are those of whole texts."""

    name: str
    pixels: Tensor
    """uint8 (3, S, S)"""
    image_id: int
    """The same for captions of the same image; 64 bits, signed."""
    summary: tuple[int, ...]
    """The caption as it is embedded."""
    positive: tuple[int, ...]
    """The caption as it stands beside its image."""
    negative: tuple[int, ...]
    """The caption of another image."""
    written: tuple[int, ...]
    """A prompt and the caption, to be generated."""
    num_given: int
    """Tokens at the start of `written` that are not supervised."""


Match = tuple[tuple[int, ...], int]
"""A caption that an image is shown with, and its label: 1 its own, 0 another's, IGNORE neither."""


@dataclass
class PairBatch:
    """Pairs that are encoded together, on CPU until used. Padding is 0, on the right."""

    pixel_values: Tensor
    """uint8 (B, 3, S, S)"""
    image_ids: Tensor
    """int64 (B,)"""
    text_ids: Tensor
    """int64 (B, T), captions to be embedded."""
    text_mask: Tensor
    """bool (B, T), true where there is text."""
    text_counts: Tensor
    """float32 (B,), 1; 0 for a text that is not compared."""
    match_ids: Tensor
    """int64 (R, T), captions beside images: row r goes with image r mod B."""
    match_mask: Tensor
    """bool (R, T)"""
    match_labels: Tensor
    """int64 (R,): 1 where they belong together, else 0; -100 is not counted."""
    written_ids: Tensor
    """int64 (B, T), captions to be generated after a prompt."""
    written_mask: Tensor
    """bool (B, T)"""
    loss_positions: Tensor
    """int64 (M,), indices into the flattened (B, T) that predict `targets`."""
    targets: Tensor
    """int64 (M,)"""
    names: tuple[str, ...]
    """The samples of the batch."""

    @property
    def num_samples(self) -> int:
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        """Tokens of the captions that are embedded."""
        return int(self.text_mask.sum())

    @property
    def num_tiles(self) -> int:
        return len(self.pixel_values)

    def to(self, device: Any) -> "PairBatch":
        return PairBatch(**_moved(self, device))


def _moved(batch: Batch, device: Any) -> dict[str, Any]:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in vars(batch).items()
    }
