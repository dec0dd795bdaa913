"""Shares an evaluation out over the ranks: every batch is computed on one of them.

Batches do not depend on the number of ranks, so neither do the results.
"""

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from internvl import dist
from internvl.compute import feeding
from internvl.data import pair_files
from internvl.data.images import FileSlice
from internvl.errors import UserError
from internvl.log import Progress
from internvl.training import signals, watchdog

T = TypeVar("T")
Batch = TypeVar("Batch")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


def spread(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[Result]]) -> list[Result]:
    """Applies `work` to each rank's share of the items; returns all results, in order, on all."""
    ranks = dist.world_size()
    results = work(items[dist.rank() :: ranks])
    # However long: a rank's files may lie on the slower disk.
    dist.wait_for_all()
    gathered = dist.gather_objects(results)
    return [gathered[index % ranks][index // ranks] for index in range(len(items))]


def broken(images: Sequence[str | FileSlice]) -> dict[int, str]:
    """Decodes every image on one of the ranks: index -> reason, without the path, of the broken."""
    with _Shown("images opened", len(images), 0) as shown:

        def decode(share: Sequence[str | FileSlice]) -> list[str | None]:
            reasons = []
            for reason in pair_files.decode_all(share):
                reasons.append(reason)
                shown.add(1)
            shown.wait()
            return reasons

        decoded = enumerate(zip(images, spread(images, decode), strict=True))
    return {
        index: reason.removeprefix(f"{image}: ")
        for index, (image, reason) in decoded
        if reason is not None
    }


@dataclass(frozen=True)
class Turn:
    """A batch that a rank computes next."""

    index: int
    counts: bool = True
    """False: only to run as many as the other ranks; the result is dropped."""


def deal(costs: Sequence[float], num_ranks: int, *, in_step: bool = False) -> list[list[Turn]]:
    """Shares batches out by their costs, longest first; returns every rank's turns.

    Args:
        in_step: every rank gets as many turns, those of a round of about equal cost.
    """
    # Stable: equal costs keep their order, and so go to the ranks in turn.
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    turns: list[list[Turn]] = [[] for _ in range(num_ranks)]
    if in_step:
        for position, index in enumerate(order):
            turns[position % num_ranks].append(Turn(index))
        for share in turns:
            # The cheapest batch once more: others of the round cost at least as much.
            fillers = [Turn(index, counts=False) for index in order[-1:]]
            share += fillers * (len(turns[0]) - len(share))
        return turns
    # A heap: the rank with least to do, of several the first, takes the next batch.
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for index in order:
        load, rank = heapq.heappop(loads)
        turns[rank].append(Turn(index))
        heapq.heappush(loads, (load + costs[index], rank))
    return turns


@dataclass(frozen=True)
class Work(Generic[Batch, Prepared, Result]):
    """What is done with every batch of an evaluation."""

    unit: str
    """Plural of what is counted for the progress."""
    prepare: Callable[[Batch], Prepared]
    """Runs ahead in a thread, without the model."""
    compute: Callable[[Prepared], Result]
    keep: Callable[[int, Result], None] = lambda index, result: None
    """Called with the index and result of a batch by the rank that computed it, at once."""
    in_step: bool = False
    """Every `compute` is collective; see `lockstep.in_step`."""

    def run(
        self,
        batches: Sequence[Batch],
        *,
        sizes: Sequence[int],
        costs: Sequence[float] | None = None,
        done: Mapping[int, Result] | None = None,
    ) -> list[Result]:
        """Computes all batches; returns their results, in order, on rank 0, and [] on the others.

        Args:
            sizes: items of every batch.
            costs: of every batch, by default its size.
            done: index of a batch -> its result from earlier; only rank 0's counts.

        Raises:
            UserError: of any batch, on every rank.
        """
        # Rank 0 may have read the results of hours.
        dist.wait_for_all()
        results = dict(done or {}) if dist.is_main() else {}
        # Rank 0's alone: another host may not see all files yet, and would deal otherwise.
        finished = set(dist.from_main(list(results)))
        left = [index for index in range(len(batches)) if index not in finished]
        weights = sizes if costs is None else costs
        shares = deal([weights[i] for i in left], dist.world_size(), in_step=self.in_step)
        turns = [Turn(left[turn.index], turn.counts) for turn in shares[dist.rank()]]
        # A tally, not a collective: ranks that are not in step ask it at different batches.
        computed: dict[int, Result] = {}
        failures, error = dist.Tally(), None
        with _Shown(self.unit, sum(sizes), sum(sizes[index] for index in finished)) as shown:
            prepared = feeding.prefetch((turn, self.prepare(batches[turn.index])) for turn in turns)
            with closing(prepared):
                for (turn, ready), _ in prepared:
                    # Nobody needs the rest; but in step the others would wait for this rank.
                    if failures.add(0) and not self.in_step:
                        break
                    watchdog.beat("evaluates")
                    try:
                        # A scheduler that wants the GPUs back does not wait for an evaluation.
                        if not self.in_step:
                            signals.raise_if_asked()
                        result = self.compute(ready)
                    except UserError as raised:
                        error = error or raised
                        failures.add(1)
                        continue
                    if turn.counts:
                        computed[turn.index] = result
                        self.keep(turn.index, result)
                        shown.add(sizes[turn.index])
            shown.wait()
        dist.raise_on_all(error)
        for of_rank in dist.gather_to_main(computed):
            results |= of_rank
        return [results[index] for index in range(len(batches))] if dist.is_main() else []


_TELL_S = 0.2
"""Seconds between two counts that a rank tells the others."""


class _Shown:
    """Progress of all ranks together, shown by rank 0."""

    def __init__(self, unit: str, total: int, done: int) -> None:
        self._tally = dist.Tally()
        self._progress = Progress(unit, total=total, done=done) if dist.is_main() else None
        self._start = self._done = done
        self._untold, self._told_s = 0, 0.0

    def add(self, count: int) -> None:
        """Counts items of this rank."""
        self._untold += count
        now_s = time.monotonic()
        # Not each item: the tally may lie on another machine.
        if now_s - self._told_s > _TELL_S:
            self._told_s = now_s
            self._tell()

    def wait(self) -> None:
        """Waits until every rank is here, and shows meanwhile what the others count."""
        self._tell()
        dist.wait_for_all(self._tell)
        self._tell()

    def _tell(self) -> None:
        # Rank 0 alone reads; the others would only keep the tally busy.
        if self._progress is None and not self._untold:
            return
        computed = self._tally.add(self._untold)
        self._untold = 0
        if self._progress is not None and self._start + computed > self._done:
            self._progress.update(self._start + computed - self._done)
            self._done = self._start + computed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.close()
