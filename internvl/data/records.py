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
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from internvl.data.images import ImageRef, is_tensor
from internvl.errors import BadImage

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100  # the default `ignore_index` of torch's cross entropy
"""Label of a position that is not supervised."""

Grid = tuple[int, int]
"""(columns, rows) of the tiles an image is cut into, the thumbnail not counted."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Video:
    """A video file or a folder of frames, optionally a clip of it, in seconds.

    Raises:
        BadImage: not a path, or not `0 <= start_s < end_s`.
    """

    path: str
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        path = os.fspath(self.path) if isinstance(self.path, os.PathLike) else self.path
        if not isinstance(path, str):
            raise BadImage(f"a video is named by its path, not by {type(path).__name__}")
        object.__setattr__(self, "path", path)  # the way to set a frozen field here
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
    """File and line, for messages: "data/train.jsonl line 4812"."""
    messages: tuple[Message, ...]
    # Opened only when tiled: to check the form of a row needs no decoding.
    images: tuple[ImageRef, ...] = ()
    """Paths or encoded bytes, in the order of the `<image>` marks."""
    videos: tuple[Video, ...] = ()
    """In the order of the `<video>` marks."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the line that training does not use, for evaluators."""
    rejected: str | None = None
    """In a preference pair: an answer that is worse than the last one of `messages`."""

    @property
    def media(self) -> list[ImageRef]:
        """Images, then the paths of videos."""
        return [*self.images, *(video.path for video in self.videos)]


@dataclass(frozen=True)
class Tiles:
    """The tiles of one sample's images; `per_image` sums to N."""

    # uint8 until the device normalizes it: a quarter of the memory and of the copy of float32.
    pixels: "Tensor"
    """uint8 (N, 3, S, S)"""
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
    """Examples of the same images whose first `prefix` tokens are equal; usually one example.

    `tiles` is uint8 (N, 3, S, S) or None.
    """

    examples: tuple[Example, ...]
    prefix: int
    tiles: "Tensor | None"

    @property
    def num_tiles(self) -> int:
        return 0 if self.tiles is None else len(self.tiles)

    @property
    def num_tokens(self) -> int:
        """Tokens in a packed row: the prefix once, then every branch."""
        return self.prefix + sum(len(e.input_ids) - self.prefix for e in self.examples)


class Batch(Protocol):
    """What the training loop needs of a batch; `to` moves its tensor fields."""

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

    A token attends to earlier tokens of its document in the prefix (branch 0) or in its branch.
    `loss_positions[m]` predicts `targets[m]`.
    """

    input_ids: "Tensor"
    """int64 (1, L)"""
    position_ids: "Tensor"
    """int64 (1, L); restarts with every document, a branch goes on from its prefix."""
    document: "Tensor"
    """int64 (L,), 0, 1, …; below 0 is padding."""
    branch: "Tensor"
    """int64 (L,); 0 is the prefix."""
    pixel_values: "Tensor | None"
    """uint8 (N, 3, S, S), or None if the row has no image."""
    # Explicit instead of shifted labels: a prefix's last token predicts the first of every branch.
    loss_positions: "Tensor"
    """int64 (M,), indices into the row; may repeat."""
    targets: "Tensor"
    """int64 (M,)"""
    loss_weights: "Tensor"
    """float32 (M,)"""
    names: tuple[str, ...]
    """The samples of the row."""
    # Variable-length attention kernels take these instead of a mask.
    starts: "Tensor | None" = None
    """int32 (D + 1,): starts of the documents, padding included, and the row's end; None in a run
    whose documents may have branches."""

    @property
    def num_samples(self) -> int:
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        return int((self.document >= 0).sum())

    @property
    def num_tiles(self) -> int:
        return 0 if self.pixel_values is None else len(self.pixel_values)

    def to(self, device: Any) -> Self:
        return replace(self, **_moved(self, device))


@dataclass(kw_only=True)
class PreferenceBatch(PackedBatch):
    """A packed row of P preference pairs: a document each, its answers as branches 1 and 2.

    `names` has one entry for each pair.
    """

    answers: "Tensor"
    """int64 (M,): the answer that a target belongs to, 2 p for the chosen one of pair p and 2 p + 1
    for the rejected one."""
    lengths: "Tensor"
    """float32 (P, 2): supervised tokens of the chosen and the rejected answers."""
    contents: tuple[str, ...]
    """A digest of each pair: ids, labels and pixels."""
    reference: "Tensor | None" = None
    """float32 (P, 2): log-probabilities of the answers under the reference, if they are stored."""


@dataclass(frozen=True)
class Pair:
    """An image, its caption and a caption of another image, as token ids."""

    name: str
    pixels: "Tensor"
    """uint8 (3, S, S)"""
    image_id: int
    """Signed 64-bit id, the same for captions of the same image."""
    summary: tuple[int, ...]
    """Ids of the caption for its embedding."""
    positive: tuple[int, ...]
    """Ids of the caption for image-text matching."""
    # Drawn by the reader: matching has a non-matching text without a second image being read.
    negative: tuple[int, ...]
    """Ids of another image's caption, for image-text matching."""
    written: tuple[int, ...]
    """Ids of prompt and caption, for generation."""
    num_given: int
    """Tokens at the start of `written` that are not supervised."""


Match = tuple[tuple[int, ...], int]
"""Caption ids of an image-text match and the label: 1 match, 0 no match, IGNORE not counted."""


@dataclass
class PairBatch:
    """Pairs encoded together, on CPU until used. Padded with 0 on the right."""

    pixel_values: "Tensor"
    """uint8 (B, 3, S, S)"""
    image_ids: "Tensor"
    """int64 (B,)"""
    text_ids: "Tensor"
    """int64 (B, T), captions to embed."""
    text_mask: "Tensor"
    """bool (B, T), true where there is text."""
    text_counts: "Tensor"
    """float32 (B,): 1, or 0 for a text that is not compared."""
    match_ids: "Tensor"
    """int64 (R, T), captions to match: row r with image r mod B."""
    match_mask: "Tensor"
    """bool (R, T)"""
    match_labels: "Tensor"
    """int64 (R,): 1 match, 0 no match, -100 not counted."""
    written_ids: "Tensor"
    """int64 (B, T), prompts and the captions to generate."""
    written_mask: "Tensor"
    """bool (B, T)"""
    loss_positions: "Tensor"
    """int64 (M,), indices into the flattened (B, T) that predict `targets`."""
    targets: "Tensor"
    """int64 (M,)"""
    names: tuple[str, ...]
    """The samples of the batch."""

    @property
    def num_samples(self) -> int:
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        """Tokens of the captions to embed, padding excluded."""
        return int(self.text_mask.sum())

    @property
    def num_tiles(self) -> int:
        return len(self.pixel_values)

    def to(self, device: Any) -> "PairBatch":
        return PairBatch(**_moved(self, device))


def _moved(batch: Batch, device: Any) -> dict[str, Any]:
    # `non_blocking` copies overlap with compute if the tensors are pinned.
    return {
        key: value.to(device, non_blocking=True) if is_tensor(value) else value
        for key, value in vars(batch).items()
    }
