"""Steps of a fixed number of packed rows, for `global_batch_rows`.

Samples are packed before they are dealt to ranks, in the order of the data, so a step has the same
rows for any number of ranks. A sample that has no row yet waits for a later step; none is lost and
none comes twice. What waits is part of `Position`, which a checkpoint holds.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Protocol

from torch.utils.data import Dataset

from internvl.config import DataConfig
from internvl.data import loader
from internvl.data.loader import Read, Step
from internvl.data.packing import Buffer, add_to_buffers, best_fit, split_unit
from internvl.data.records import Batch, Unit
from internvl.data.sampler import Position, SampleOrder, UnitRef
from internvl.data.workers import Reading, describe_refs, name_failing
from internvl.errors import BadSample, DataError


@dataclass(frozen=True)
class Piece:
    """A unit that fits a row; `origin` is (first sample of its group, index in the group)."""

    unit: Unit
    origin: tuple[int, int]


Row = list[Piece]


class RowPacker(Protocol):
    """Packs pieces as they come and hands out rows, a step's at a time."""

    def add(self, piece: Piece) -> None: ...

    def has_step(self) -> bool:
        """Returns True if the rows of a step can be taken."""
        ...

    def take(self) -> list[Row]:
        """Removes and returns the rows of a step."""
        ...

    def waiting(self) -> tuple[list[Row], list[Row]]:
        """Returns the (closed, open) rows that no step has taken."""
        ...


class OfficialRows:
    """The rows of `official_rows` over the whole run; each step takes the next `num_rows`.

    Buffers stay open from step to step, as in the original, so the rows do not depend on
    `num_rows`.
    """

    def __init__(
        self, data: DataConfig, num_rows: int, closed: list[Row], opened: list[Row]
    ) -> None:
        self.num_rows = num_rows
        self.limits = (_row_tokens(data), data.max_tiles, data.packing_buffers)
        self.closed = closed
        self.buffers = [
            Buffer(
                sum(piece.unit.num_tokens for piece in row),
                sum(_official_tiles(piece.unit) for piece in row),
                row,
            )
            for row in opened
        ]

    def add(self, piece: Piece) -> None:
        buffer = Buffer(piece.unit.num_tokens, _official_tiles(piece.unit), [piece])
        self.closed += [row.pieces for row in add_to_buffers(self.buffers, buffer, *self.limits)]

    def has_step(self) -> bool:
        return len(self.closed) >= self.num_rows

    def take(self) -> list[Row]:
        rows, self.closed = self.closed[: self.num_rows], self.closed[self.num_rows :]
        return rows

    def waiting(self) -> tuple[list[Row], list[Row]]:
        return self.closed, [buffer.pieces for buffer in self.buffers]


def _official_tiles(unit: Unit) -> int:
    # A text takes the room of one tile, see `Buffer.from_units`.
    return 1 if unit.tiles is None else unit.num_tiles


class BestFitRows:
    """Collects pieces until they exceed `num_rows` rows, packs them by `best_fit` and takes the
    row of the piece that has waited longest and the fullest others; the rest waits, in order.
    """

    def __init__(self, data: DataConfig, num_rows: int, pool: Row) -> None:
        self.num_rows = num_rows
        self.max_tokens, self.max_tiles = _row_tokens(data), data.max_tiles
        self.pool = pool
        self.tokens = sum(piece.unit.num_tokens for piece in pool)
        self.tiles = sum(piece.unit.num_tiles for piece in pool)

    def add(self, piece: Piece) -> None:
        self.pool.append(piece)
        self.tokens += piece.unit.num_tokens
        self.tiles += piece.unit.num_tiles

    def has_step(self) -> bool:
        # More than the rows can hold, so packing needs another row, whatever the pieces are: one
        # packing a step decides, instead of one for every piece.
        return (
            self.tokens > self.num_rows * self.max_tokens
            or self.tiles > self.num_rows * self.max_tiles
        )

    def take(self) -> list[Row]:
        sizes = [(piece.unit.num_tokens, piece.unit.num_tiles) for piece in self.pool]
        rows = best_fit(sizes, self.max_tokens, self.max_tiles)
        # The longest wait first: by fullness alone a small sample might wait for ever.
        rows.sort(key=lambda row: (0 not in row, -sum(sizes[i][0] for i in row)))
        taken = [[self.pool[i] for i in row] for row in rows[: self.num_rows]]
        rest = sorted(i for row in rows[self.num_rows :] for i in row)
        self.pool = [self.pool[i] for i in rest]
        self.tokens = sum(sizes[i][0] for i in rest)
        self.tiles = sum(sizes[i][1] for i in rest)
        return taken

    def waiting(self) -> tuple[list[Row], list[Row]]:
        return [], [self.pool]


def row_steps(
    order: SampleOrder,
    reader: Dataset[Read],
    build: Callable[[Sequence[Sequence[Unit]]], Sequence[Batch]],
    data: DataConfig,
    *,
    num_rows: int,
    position: Position,
    first: int,
    last: int,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Step, None, None]:
    """Yields steps `first` … `last` - 1, from `position` on; rank r gets every r-th row.

    Every rank reads all samples, because packing needs their lengths: reading costs as many times
    the CPU time as there are ranks, and a rank holds the pixels of all rows of a step.

    Args:
        build: rows of units to batches; it gets those of this rank.

    Raises:
        WorkerDied: a worker was killed, or crashed.
        DataError: no sample of a whole epoch can be read, or one that waited cannot any more.
    """
    # A position names what waits, without pixels; those groups are read again before all others.
    origins = [origin for row in (*position.closed, *position.open) for origin in row]
    held = {n: order.group_at(n) for n in sorted({sample for sample, _ in origins})}
    num_seen = last_usable = position.samples
    with closing(_reads(order, reader, list(held.values()), num_seen, data.workers)) as reads:
        # `held` first: zip would otherwise take one read too many before it sees the end of it.
        packer = _restored(position, dict(zip(held, reads, strict=False)), data, num_rows)
        for index in range(first, last):
            started = time.perf_counter()
            bad: list[BadSample] = []
            while not packer.has_step():
                ref, read = next(reads)
                for piece in _pieces(read, num_seen, data):
                    packer.add(piece)
                bad += read.bad
                num_seen += len(ref.lines)
                if read.units:
                    last_usable = num_seen
                # The epochs have no end, so the loop would have none either.
                if num_seen - last_usable > len(order):
                    raise DataError(f"no sample of a whole epoch can be read; the last: {bad[-1]}")
            rows = [[piece.unit for piece in row] for row in packer.take()]
            closed, opened = map(_origins, packer.waiting())
            yield Step(
                index,
                build(rows[rank::world_size]),
                # All ranks read the same; the training loop gathers what each reports.
                bad if rank == 0 else [],
                time.perf_counter() - started,
                num_seen,
                Position(num_seen, closed, opened),
            )


def _reads(
    order: SampleOrder,
    reader: Dataset[Read],
    held: Sequence[UnitRef],
    first: int,
    workers: int,
) -> Generator[tuple[UnitRef, Read], None, None]:
    """Yields every reference of `held` and then of the order from sample `first` on, as read."""

    def refs() -> Iterator[UnitRef]:
        return chain(held, order.groups_from(first))

    # Two iterators over the same references: the workers run ahead on one, results pair with the
    # other.
    issued = refs()
    jobs = iter(lambda: list(islice(issued, loader.TOGETHER)), [])
    reading = Reading(
        loader.Groups(reader),
        jobs,
        name=partial(name_failing, reader, order.files),
        describe=partial(describe_refs, order.files),
        workers=workers,
        ahead=loader.AHEAD,
    )
    # Closed with this generator: the jobs never end, so neither would the workers.
    with closing(iter(reading)) as results:
        yield from zip(refs(), chain.from_iterable(map(loader.received, results)), strict=False)


def _restored(
    position: Position,
    held: dict[int, tuple[UnitRef, Read]],
    data: DataConfig,
    num_rows: int,
) -> RowPacker:
    """Returns the packer as it was at `position`.

    Args:
        held: the groups that its pieces come from, by their first sample.
    """
    pieces = {
        piece.origin: piece
        for sample, (_, read) in held.items()
        for piece in _pieces(read, sample, data)
    }

    def rows(saved: Sequence[Sequence[tuple[int, int]]]) -> list[Row]:
        return [[pieces[origin] for origin in row] for row in saved]

    try:
        closed, opened = rows(position.closed), rows(position.open)
    except KeyError as error:
        bad = [bad for _, read in held.values() for bad in read.bad]
        reason = f": {bad[0]}" if bad else ""
        raise DataError(
            f"sample {error.args[0][0] + 1:,} of the run waits for a row and cannot be read as it "
            f"was{reason}; put its file back to go on"
        ) from None
    if data.packing == "official":
        return OfficialRows(data, num_rows, closed, opened)
    return BestFitRows(data, num_rows, [piece for row in opened for piece in row])


def _pieces(read: Read, sample: int, data: DataConfig) -> list[Piece]:
    """Returns the units of a group, cut to fit a row; `sample` is the group's first one."""
    # A function of the group alone, so that an index names the same piece after a resume.
    units = [
        piece
        for unit in read.units
        for piece in split_unit(unit, _row_tokens(data), data.max_tiles)
    ]
    return [Piece(unit, (sample, index)) for index, unit in enumerate(units)]


def _row_tokens(data: DataConfig) -> int:
    return data.row_tokens or data.max_tokens


def _origins(rows: Sequence[Row]) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(tuple(piece.origin for piece in row) for row in rows)
