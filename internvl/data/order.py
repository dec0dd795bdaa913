"""The order in which an epoch shows the samples of all sources, cut into steps.

It is a function of (seed, epoch) alone, so a position in it is one integer: the run's step. Any
number of ranks and workers sees the same steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from internvl.data.records import DataError
from internvl.data.sources import Source


@dataclass(frozen=True)
class UnitRef:
    """Which samples form a unit: `lines` of source number `file`, in pass `epoch` over the data."""

    file: int
    lines: tuple[int, ...]
    epoch: int
    row: int = 0
    """Number of the first sample among those of an epoch; with `epoch`, seeds what is random."""


class SampleOrder:
    """All samples of the sources, grouped, shuffled anew every epoch, and cut into steps.

    With `share_prefix`, samples of one source with the same images stay together; groups are
    shuffled, not samples. A step takes exactly `global_batch` samples of the endless sequence of
    epochs; a group that does not fit into the rest of a step goes on in the next one.

    Raises:
        DataError: `repeat` leaves no sample.
    """

    def __init__(self, files: Sequence[Source], *, share_prefix: bool, seed: int) -> None:
        self.files = files
        self.seed = seed
        file_of, line_of, group_of = [], [], []
        num_groups = 0
        repeats = effective_repeats(files)
        for number, (file, repeat) in enumerate(zip(files, repeats, strict=True)):
            groups = file.groups if share_prefix else np.arange(len(file), dtype=np.int32)
            for lines in _passes(file, repeat, np.random.default_rng((seed, number))):
                _, dense = np.unique(groups[lines], return_inverse=True)
                file_of.append(np.full(len(lines), number, dtype=np.int16))
                line_of.append(lines)
                group_of.append((dense + num_groups).astype(np.int32))
                num_groups += int(dense.max(initial=-1)) + 1
        if not num_groups:
            raise DataError("an epoch shows no sample; raise `repeat` of the sources")
        group = np.concatenate(group_of)
        order = np.argsort(group, kind="stable")
        self._file, self._line = np.concatenate(file_of)[order], np.concatenate(line_of)[order]
        self._sizes = np.bincount(group, minlength=num_groups).astype(np.int32)
        self._starts = (np.cumsum(self._sizes) - self._sizes).astype(np.int32)
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
            UnitRef(
                int(self._file[part[0]]), tuple(map(int, self._line[part])), epoch, int(part[0])
            )
            for part in np.split(rows, bounds)
        ]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 (row, group) of every position of an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_groups)
        order = order.astype(np.int32)
        sizes = self._sizes[order]
        groups = np.repeat(order, sizes)
        first = np.repeat((np.cumsum(sizes) - sizes).astype(np.int32), sizes)
        within = np.arange(len(groups), dtype=np.int32) - first
        return self._starts[groups] + within, groups


def effective_repeats(files: Sequence[Source]) -> list[float]:
    """How often an epoch shows each source: its `repeat`, or what its `weight` comes to."""
    weights = [file.config.weight for file in files]
    if not all(weight is not None for weight in weights):
        return [file.config.repeat for file in files]
    total = sum(len(file) for file in files)
    summed = sum(weight for weight in weights if weight is not None)
    return [
        total * weight / summed / len(file)
        for file, weight in zip(files, weights, strict=True)
        if weight is not None
    ]


def _passes(file: Source, repeat: float, draw: np.random.Generator) -> list[np.ndarray]:
    """int32 lines of every pass that an epoch makes over a source."""
    whole, rest = int(repeat), round((repeat - int(repeat)) * len(file))
    passes = [np.arange(len(file), dtype=np.int32)] * whole
    if rest and file.config.part == "random":
        part = np.sort(draw.choice(len(file), rest, replace=False))
        return [*passes, part.astype(np.int32)]
    return [*passes, np.arange(rest, dtype=np.int32)] if rest else passes
