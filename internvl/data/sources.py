"""Annotation files as sources, and the order in which an epoch shows their samples.

A file is indexed by byte offset and read line by line; nothing is held but numbers. The order is a
function of (seed, epoch) alone, so a position in it is one integer: the run's step. Any number of
ranks and workers sees the same steps.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from internvl.config import SourceConfig
from internvl.data.chat import IMAGE_MARK
from internvl.data.images import BadImage, join_inside
from internvl.data.records import BadSample, DataError, Message, Sample

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class ChatFile:
    """A chat JSONL file with the official keys (`image`, `conversations`), one sample a line.

    Raises:
        DataError: the file is missing, unreadable, or holds no line.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.path = config.annotations
        try:
            with self.path.open("rb") as file:
                lengths = [len(line) for line in file]
        except FileNotFoundError:
            raise DataError(
                f"source {config.name}: there is no annotation file {self.path}; "
                "check `annotations` of this source in the recipe"
            ) from None
        except OSError as error:
            raise DataError(f"source {config.name}: cannot read {self.path}: {error}") from None
        if not lengths:
            raise DataError(f"source {config.name}: {self.path} is empty; it holds no sample")
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def name(self, index: int) -> str:
        """How messages call line `index` (from 0): file and line number from 1."""
        return f"{self.path} line {index + 1}"

    def lines(self, indices: Sequence[int]) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for index in indices:
                file.seek(self.starts[index])
                yield file.read(int(self.starts[index + 1] - self.starts[index]))

    def samples(self, indices: Sequence[int]) -> Iterator[Sample | BadSample]:
        """The samples of some lines, in order; a bad line yields what is wrong with it."""
        for index, line in zip(indices, self.lines(indices), strict=True):
            try:
                yield self._parse(self.name(index), line)
            except BadSample as bad:
                yield bad

    def image_keys(self) -> list[bytes]:
        """For every line, a key that lines with the same images share."""
        keys = []
        with self.path.open("rb") as file:
            for index, line in enumerate(file):
                try:
                    images = json.loads(line).get("image")
                except (ValueError, AttributeError):
                    images = None  # a bad line: reported when it is read
                text = json.dumps(images) if images else f"line {index}"
                keys.append(hashlib.blake2b(text.encode(), digest_size=12).digest())
        return keys

    def _parse(self, name: str, line: bytes) -> Sample:
        if not line.strip():
            raise BadSample(name, "the line is blank; remove it")
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise BadSample(name, "not UTF-8; save the file as UTF-8") from None
        except ValueError as error:
            raise BadSample(name, f"not JSON ({error})") from None
        if not isinstance(row, dict):
            raise BadSample(name, f"a JSON object is expected, not {type(row).__name__}")
        messages = _messages(name, row)
        try:
            images = tuple(join_inside(self.config.images, path) for path in _images(name, row))
        except BadImage as bad:
            raise BadSample(name, str(bad)) from None
        if self.config.insert_image_mark and len(images) == 1:
            messages = _with_mark(messages)
        extra = {k: v for k, v in row.items() if k not in ("conversations", "image")}
        return Sample(name, messages, images, extra)


def _messages(name: str, row: dict[str, Any]) -> tuple[Message, ...]:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        found = "missing" if turns is None else f"a {type(turns).__name__}"
        raise BadSample(name, f"`conversations` must be a list of turns; it is {found}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        role = turn.get("from") if isinstance(turn, dict) else None
        if role not in _ROLES:
            raise BadSample(name, f"turn {number} is from {role!r}; known: {', '.join(_ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise BadSample(name, f"turn {number} has no text under `value`")
        messages.append(Message(_ROLES[role], turn["value"]))
    return tuple(messages)


def _images(name: str, row: dict[str, Any]) -> list[str]:
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise BadSample(name, "`image` must be a path or a list of paths")
    return images


def _with_mark(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The original's rule: a single image without a mark stands before the first question."""
    for index, message in enumerate(messages):
        if message.role == "user":
            if IMAGE_MARK in message.content:
                break
            marked = Message("user", f"{IMAGE_MARK}\n{message.content}")
            return (*messages[:index], marked, *messages[index + 1 :])
    return messages


@dataclass(frozen=True)
class UnitRef:
    """Which lines form a unit: `lines` of file number `file`, in pass `epoch` over the data."""

    file: int
    lines: tuple[int, ...]
    epoch: int


class SampleOrder:
    """All samples of the sources, grouped, shuffled anew every epoch, and cut into steps.

    With `share_prefix`, samples of one source with the same images stay together (D6); groups are
    shuffled, not samples. A step takes exactly `global_batch` samples of the endless sequence of
    epochs; a group that does not fit into the rest of a step goes on in the next one.
    """

    def __init__(self, files: Sequence[ChatFile], *, share_prefix: bool, seed: int) -> None:
        self.files = files
        self.seed = seed
        file_of, line_of, group_of = [], [], []
        num_groups = 0
        for number, file in enumerate(files):
            groups = _groups(file) if share_prefix else np.arange(len(file))
            for lines in _passes(len(file), file.config.repeat):
                _, dense = np.unique(groups[lines], return_inverse=True)
                file_of.append(np.full(len(lines), number, dtype=np.int32))
                line_of.append(lines)
                group_of.append(dense + num_groups)
                num_groups += int(dense.max()) + 1
        order = np.argsort(np.concatenate(group_of), kind="stable")
        self._file, self._line = np.concatenate(file_of)[order], np.concatenate(line_of)[order]
        sizes = np.bincount(np.concatenate(group_of), minlength=num_groups)
        self._sizes = sizes
        self._starts = np.cumsum(sizes) - sizes
        # The reader is ahead of the trainer, so two epochs are in use around a border.
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._line)

    @property
    def num_groups(self) -> int:
        return len(self._sizes)

    def step(self, step: int, global_batch: int, total: int) -> list[UnitRef]:
        """The units of step `step` (from 0) of a run over `total` samples in all."""
        first, last = step * global_batch, min((step + 1) * global_batch, total)
        refs: list[UnitRef] = []
        while first < last:
            epoch, position = divmod(first, len(self))
            taken = min(last - first, len(self) - position)
            refs += self._units(epoch, position, position + taken)
            first += taken
        return refs

    def _units(self, epoch: int, first: int, last: int) -> list[UnitRef]:
        rows, groups = self._shuffled(epoch)
        rows, groups = rows[first:last], groups[first:last]
        bounds = np.flatnonzero(np.diff(groups)) + 1
        return [
            UnitRef(int(self._file[part[0]]), tuple(map(int, self._line[part])), epoch)
            for part in np.split(rows, bounds)
        ]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, group) of every position of an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_groups)
        sizes = self._sizes[order]
        groups = np.repeat(order, sizes)
        within = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._starts[groups] + within, groups


def _groups(file: ChatFile) -> np.ndarray:
    """int64 (lines,): the same number for lines with the same images."""
    keys = np.array(file.image_keys(), dtype="S12")
    return np.unique(keys, return_inverse=True)[1]


def _passes(num_lines: int, repeat: float) -> list[np.ndarray]:
    """The lines of every pass that an epoch makes over a file."""
    whole, rest = int(repeat), round((repeat - int(repeat)) * num_lines)
    passes = [np.arange(num_lines)] * whole
    return [*passes, np.arange(rest)] if rest else passes
