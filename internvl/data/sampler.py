"""Order of the samples of all sources in an epoch, cut into steps.

It is a function of (seed, epoch) alone, so a position in it is one integer: the run's step, or with
`global_batch_rows` a sample, with what waits for a row (`Position`). Any number of ranks and
workers sees the same steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from internvl.config import SourceConfig
from internvl.data.records import Sample
from internvl.data.sources import Content, Source
from internvl.errors import BadSample, DataError

_WINDOW = 4096
"""Samples whose units `SampleOrder.groups_from` lists at once."""


@dataclass(frozen=True)
class UnitRef:
    """Reference to a unit's samples: `lines` of the source with index `file`, in epoch `epoch`."""

    file: int
    lines: tuple[int, ...]
    epoch: int
    row: int = 0
    """Index of its first sample before shuffling; with `epoch`, seeds what is random in it."""


@dataclass(frozen=True)
class Position:
    """Position of a run of `global_batch_rows` in its order, and the pieces that wait for a row.

    A waiting piece is named by the first sample of its group, counted over the run, and its index
    among the pieces of that group.
    """

    samples: int = 0
    """Samples read so far."""
    closed: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Rows that are complete and belong to the next step."""
    open: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Rows that still take pieces; with best-fit packing one list of all."""


@dataclass(frozen=True)
class Ending:
    """End of a run that was made longer afterwards."""

    step: int
    samples: int
    """Samples of the run up to it; fewer than whole batches if its last one was smaller."""


def step_bounds(
    step: int, global_batch: int, total: int, endings: Sequence[Ending] = ()
) -> tuple[int, int]:
    """Returns (first, last + 1) of the samples of step `step` (from 0) of a run over `total`.

    Args:
        endings: earlier ends of the run, in order. Batches begin anew at each, so that no sample
            is left out after a smaller last batch.
    """
    start = Ending(0, 0)
    for ending in endings:
        if ending.step > step:
            total = ending.samples
            break
        start = ending
    first = start.samples + (step - start.step) * global_batch
    return first, min(first + global_batch, total)


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
        for file_index, (file, repeat) in enumerate(zip(files, repeats, strict=True)):
            groups = file.groups if share_prefix else np.arange(len(file), dtype=np.int32)
            for lines in _passes(file, repeat, np.random.default_rng((seed, file_index))):
                # Numbered anew in every pass: an image that is shown twice in an epoch is two
                # groups, or its repetitions would all come at once.
                _, dense = np.unique(groups[lines], return_inverse=True)
                # int16 and int32: 10 bytes a sample in all, for mixtures of many millions.
                file_of.append(np.full(len(lines), file_index, dtype=np.int16))
                line_of.append(lines)
                group_of.append((dense + num_groups).astype(np.int32))
                num_groups += int(dense.max(initial=-1)) + 1
        if not num_groups:
            raise DataError("an epoch shows no sample; raise `repeat` of the sources")
        group = np.concatenate(group_of)
        # Stable, so that the samples of a group stay in the order of their file.
        order = np.argsort(group, kind="stable")
        self._file, self._line = np.concatenate(file_of)[order], np.concatenate(line_of)[order]
        self._sizes = np.bincount(group, minlength=num_groups).astype(np.int32)
        self._starts = (np.cumsum(self._sizes) - self._sizes).astype(np.int32)
        # Workers prefetch across the end of an epoch, so two epochs are in use at once.
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._line)

    @property
    def num_groups(self) -> int:
        return len(self._sizes)

    def step(self, step: int, global_batch: int, total: int) -> list[UnitRef]:
        """Returns the units of step `step` (from 0) of a run over `total` samples in all."""
        return self.between(*step_bounds(step, global_batch, total))

    def between(self, first: int, last: int, epoch: int = 0) -> list[UnitRef]:
        """Returns the units of samples `first` … `last` - 1, counted from the start of `epoch`."""
        refs: list[UnitRef] = []
        while first < last:
            passed, position = divmod(first, len(self))
            taken = min(last - first, len(self) - position)
            refs += self._units(epoch + passed, position, position + taken)
            first += taken
        return refs

    def groups_from(self, first: int, window: int = _WINDOW) -> Iterator[UnitRef]:
        """Yields whole groups of the endless epochs; sample number `first` must begin one."""
        while True:
            epoch, position = divmod(first, len(self))
            _, groups = self._shuffled(epoch)
            end = min(position + window, len(self))
            # A group that the window cuts would become two units, which share no prefix.
            while end < len(self) and groups[end] == groups[end - 1]:
                end += 1
            yield from self._units(epoch, position, end)
            first += end - position

    def group_at(self, first: int) -> UnitRef:
        """Returns the whole group that begins at sample number `first` of the epochs."""
        return next(self.groups_from(first, window=1))

    def epoch_size(self, epochs: float | None) -> float:
        """Samples of a mean epoch of a run; see `GrownOrder`."""
        return len(self)

    def _units(self, epoch: int, first: int, last: int) -> list[UnitRef]:
        rows, groups = self._shuffled(epoch)
        rows, groups = rows[first:last], groups[first:last]
        bounds = np.flatnonzero(np.diff(groups)) + 1
        # Plain integers: numpy's are many times as large once pickled for a worker.
        return [
            UnitRef(
                int(self._file[unit[0]]), tuple(map(int, self._line[unit])), epoch, int(unit[0])
            )
            for unit in np.split(rows, bounds)
        ]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns int32 (row, group) of every position of an epoch."""
        # A generator for every epoch: a run that resumes in the fifth need not draw four others.
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_groups)
        order = order.astype(np.int32)
        # (groups,) to (samples,) without a loop: an epoch of 10 million samples takes seconds.
        sizes = self._sizes[order]
        groups = np.repeat(order, sizes)
        first = np.repeat((np.cumsum(sizes) - sizes).astype(np.int32), sizes)
        within = np.arange(len(groups), dtype=np.int32) - first
        return self._starts[groups] + within, groups


@dataclass(frozen=True)
class Prefix:
    """The first samples of a source that has grown."""

    source: Source
    num_samples: int

    @property
    def config(self) -> SourceConfig:
        return self.source.config

    def __len__(self) -> int:
        return self.num_samples

    @property
    def groups(self) -> np.ndarray:
        return self.source.groups[: self.num_samples]

    def samples(self, indices: Sequence[int]) -> Iterator[Sample | BadSample]:
        """See `Source.samples`."""
        return self.source.samples(indices)

    def content(self) -> Content:
        """See `Source.content`."""
        return self.source.content()

    def begins_with(self, content: Content) -> bool:
        """See `Source.begins_with`."""
        return self.source.begins_with(content)


@dataclass(frozen=True)
class Earlier:
    """Sizes of the sources in the first epochs of a run, before they grew."""

    until: int
    """Samples of the run up to the end of the last of these epochs."""
    samples: tuple[int, ...]
    """Samples of each source."""


class GrownOrder:
    """Order of a run whose sources grew while it was stopped.

    The epoch that had begun ends in its old order, over the old samples; later epochs show all.

    Raises:
        DataError: see `SampleOrder`.
    """

    def __init__(
        self, files: Sequence[Source], earlier: Sequence[Earlier], *, share_prefix: bool, seed: int
    ) -> None:
        self.files = files
        self._segments: list[tuple[int, int, SampleOrder]] = []
        """(first sample, first epoch, order) of the epochs between two growths."""
        first = epoch = 0
        for had in earlier:
            prefixes = [Prefix(file, n) for file, n in zip(files, had.samples, strict=True)]
            order = SampleOrder(prefixes, share_prefix=share_prefix, seed=seed)
            self._segments.append((first, epoch, order))
            # Epochs count on, or the grown data would be shuffled as the first epoch was.
            epoch += (had.until - first) // len(order)
            first = had.until
        self.last = SampleOrder(files, share_prefix=share_prefix, seed=seed)
        self._segments.append((first, epoch, self.last))

    def __len__(self) -> int:
        """Samples in an epoch from now on."""
        return len(self.last)

    @property
    def num_groups(self) -> int:
        return self.last.num_groups

    def step(self, step: int, global_batch: int, total: int) -> list[UnitRef]:
        """See `SampleOrder.step`."""
        return self.between(*step_bounds(step, global_batch, total))

    def between(self, first: int, last: int) -> list[UnitRef]:
        """Returns the units of samples `first` … `last` - 1 of the run."""
        refs: list[UnitRef] = []
        ends = [*(start for start, _, _ in self._segments[1:]), last]
        # A step may lie across a growth: it then ends the old epoch and begins the new one.
        for (start, epoch, order), end in zip(self._segments, ends, strict=True):
            refs += order.between(max(first, start) - start, min(last, end) - start, epoch)
        return refs

    def epoch_size(self, epochs: float | None) -> float:
        """Returns the mean samples per epoch of a run; its first epochs may be smaller."""
        if epochs is None:
            return len(self)
        start, epoch, order = next(
            segment
            for segment in reversed(self._segments)
            if segment[1] <= epochs or not segment[1]
        )
        return (start + round((epochs - epoch) * len(order))) / epochs

    def end_of_epoch(self, sample: int) -> int:
        """Returns the first end of an epoch at or after sample number `sample` of the run."""
        start, _, order = next(s for s in reversed(self._segments) if s[0] <= sample)
        return start + -(-(sample - start) // len(order)) * len(order)


Order = SampleOrder | GrownOrder


def effective_repeats(files: Sequence[Source]) -> list[float]:
    """Returns how often an epoch shows each source: its `repeat`, or its share by `weight`."""
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
    """Returns the int32 lines of each pass that an epoch makes over a source."""
    whole, rest = int(repeat), round((repeat - int(repeat)) * len(file))
    passes = [np.arange(len(file), dtype=np.int32)] * whole
    if rest and file.config.part == "random":
        # Sorted, so that the samples of a group stay in the order of their file.
        lines = np.sort(draw.choice(len(file), rest, replace=False))
        return [*passes, lines.astype(np.int32)]
    return [*passes, np.arange(rest, dtype=np.int32)] if rest else passes
