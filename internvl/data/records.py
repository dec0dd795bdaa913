"""The records that travel from an annotation file to a model call.

    sample   as read: messages that refer to pictures            (data/sources.py)
    example  as encoded: ids, labels, tiles                      (data/chat.py, data/tiles.py)
    unit     examples of one picture that share a prefix         (data/packing.py)
    batch    what one model call takes: a packed row             (data/packing.py)

Shape legend of the package: B samples, N tiles, S tile side (px), P patch side (px), K visual
tokens per tile, L packed row length, T tokens of one example, M supervised positions of a row,
D hidden size, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from internvl.config import UserError
from internvl.data.images import Picture

IGNORE = -100
"""Label of a position that is not supervised."""

Grid = tuple[int, int]
"""(columns, rows) of the tiles an image is cut into, the thumbnail not counted."""


class DataError(UserError):
    """Data that cannot be used at all, such as a missing annotation file."""


class BadSample(UserError):
    """A sample that cannot be trained on: its name (file and line), the reason, the remedy."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # loader workers send it through a pipe
        return BadSample, (self.name, self.reason)


@dataclass(frozen=True)
class Message:
    """One turn. `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Video:
    """A video file, or a folder of frames, and the part of it that is meant, in seconds."""

    path: str
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class Sample:
    """One line of an annotation file, checked for form; its pictures are not opened yet."""

    name: str
    """Where it stands, for messages: "data/train.jsonl line 4812"."""
    messages: tuple[Message, ...]
    images: tuple[Picture, ...] = ()
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
    """Examples of the same pictures; `prefix` leading tokens are the same in all of them.

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
    """int64 (L,), 0, 1, …; -1 is padding."""
    branch: Tensor
    """int64 (L,); 0 is the prefix."""
    pixel_values: Tensor | None
    """uint8 (N, 3, S, S), or None where the row has no picture."""
    loss_positions: Tensor
    """int64 (M,), indices into the row."""
    targets: Tensor
    """int64 (M,)"""
    loss_weights: Tensor
    """float32 (M,)"""
    names: tuple[str, ...]
    """The samples of the row."""

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
        moved: dict[str, Any] = {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in vars(self).items()
        }
        return PackedBatch(**moved)
