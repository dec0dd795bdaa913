"""Steps of a fixed number of packed rows, for `global_batch_rows`.

Samples are packed before they are dealt to ranks, in the order of the data, so a step has the same
rows for any number of ranks. A sample that has no row yet waits for a later step; none is lost and
none comes twice. What waits is part of `Position`, which a checkpoint holds.

Each of several ranks reads its share of the samples and tells the others how long they are. All
pack the same rows from that, and a sample's pixels travel once, to the rank of its row.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

from torch.utils.data import Dataset

from internvl.config import DataConfig
from internvl.data import loader
from internvl.data.balance import Place, deal_rows
from internvl.data.loader import Read, Step
from internvl.data.packing import Buffer, add_to_buffers, best_fit, split_unit
from internvl.data.records import Batch, Unit
from internvl.data.sampler import Position, SampleOrder, UnitRef
from internvl.data.workers import Reading, describe_refs, name_failing
from internvl.errors import BadSample, DataError


@dataclass(frozen=True)
class Piece:
    """A unit that fits a row, as all ranks see it."""

    origin: tuple[int, int]
    """(first sample of its group, index in the group)"""
    num_tokens: int
    num_tiles: int
    official_tiles: int
    """Tiles as official packing counts them."""
    unit: Unit | None
    """None on ranks that have not read it."""
    holder: int = 0
    """The rank that has read it."""
    cost: float = 0.0


@dataclass(frozen=True)
class Group:
    """Pieces and bad samples of a reference."""

    sample: int
    """Its first sample, counted over the run."""
    num_samples: int
    pieces: list[Piece]
    bad: list[BadSample]
    holder: int = 0


Row = list[Piece]


class Sharing(Protocol):
    """Evens out the work of a step over ranks, as parallel/sharing.py does; collective."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's `value`, in rank order."""
        ...

    def fetch(self, values: Sequence[Any], dealt: Sequence[Sequence[Place]]) -> list[Any]:
        """Returns the values that `dealt` names for this rank."""
        ...

    def align(self, batches: Sequence[Any]) -> Sequence[Any]:
        """Orders a step's batches alike on all ranks."""
        ...

    def unit_cost(self, unit: Any) -> float:
        """Returns what a unit costs, in the measure of all ranks."""
        ...


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
                sum(piece.num_tokens for piece in row),
                sum(piece.official_tiles for piece in row),
                row,
            )
            for row in opened
        ]

    def add(self, piece: Piece) -> None:
        buffer = Buffer(piece.num_tokens, piece.official_tiles, [piece])
        self.closed += [row.pieces for row in add_to_buffers(self.buffers, buffer, *self.limits)]

    def has_step(self) -> bool:
        return len(self.closed) >= self.num_rows

    def take(self) -> list[Row]:
        rows, self.closed = self.closed[: self.num_rows], self.closed[self.num_rows :]
        return rows

    def waiting(self) -> tuple[list[Row], list[Row]]:
        return self.closed, [buffer.pieces for buffer in self.buffers]


class BestFitRows:
    """Collects pieces until they exceed `num_rows` rows, packs them by `best_fit` and takes the
    row of the piece that has waited longest and the fullest others; the rest waits, in order.
    """

    def __init__(self, data: DataConfig, num_rows: int, pool: Row) -> None:
        self.num_rows = num_rows
        self.max_tokens, self.max_tiles = _row_tokens(data), data.max_tiles
        self.pool = pool
        self.tokens = sum(piece.num_tokens for piece in pool)
        self.tiles = sum(piece.num_tiles for piece in pool)

    def add(self, piece: Piece) -> None:
        self.pool.append(piece)
        self.tokens += piece.num_tokens
        self.tiles += piece.num_tiles

    def has_step(self) -> bool:
        # More than the rows can hold, so packing needs another row, whatever the pieces are: one
        # packing a step decides, instead of one for every piece.
        return (
            self.tokens > self.num_rows * self.max_tokens
            or self.tiles > self.num_rows * self.max_tiles
        )

    def take(self) -> list[Row]:
        sizes = [(piece.num_tokens, piece.num_tiles) for piece in self.pool]
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
    sharing: Sharing | None = None,
) -> Generator[Step, None, None]:
    """Yields steps `first` … `last` - 1, from `position` on, with this rank's rows.

    Args:
        build: rows of units to batches; it gets those of this rank.
        sharing: what ranks share samples by; None if there is one rank.

    Raises:
        WorkerDied: a worker was killed, or crashed.
        DataError: no sample of a whole epoch can be read, or one that waited cannot any more.
    """
    # A position names what waits, without pixels; those groups are read again before all others.
    origins = [origin for row in (*position.closed, *position.open) for origin in row]
    held = {n: order.group_at(n) for n in sorted({sample for sample, _ in origins})}
    rank = 0 if sharing is None else sharing.rank
    num_seen = last_usable = position.samples
    with closing(_groups(order, reader, held, num_seen, data, sharing)) as groups:
        packer = _restored(position, list(islice(groups, len(held))), data, num_rows)
        for index in range(first, last):
            started = time.perf_counter()
            bad: list[BadSample] = []
            listed: list[BadSample] = []
            while not packer.has_step():
                group = next(groups)
                for piece in group.pieces:
                    packer.add(piece)
                bad += group.bad
                # The training loop gathers what each rank reports.
                listed += group.bad if group.holder == rank else []
                num_seen += group.num_samples
                if group.pieces:
                    last_usable = num_seen
                # The epochs have no end, so the loop would have none either.
                if num_seen - last_usable > len(order):
                    raise DataError(f"no sample of a whole epoch can be read; the last: {bad[-1]}")
            rows = _fetched(packer.take(), sharing)
            closed, opened = map(_origins, packer.waiting())
            batches = build(rows)
            yield Step(
                index,
                batches if sharing is None else sharing.align(batches),
                listed,
                time.perf_counter() - started,
                num_seen,
                Position(num_seen, closed, opened),
            )


def _fetched(rows: Sequence[Row], sharing: Sharing | None) -> list[list[Unit]]:
    """Returns the units of the rows that fall to this rank, from the ranks that have read them."""
    if sharing is None:
        return [[piece.unit for piece in row if piece.unit is not None] for row in rows]
    costs = [sum(piece.cost for piece in row) for row in rows]
    # Each rank lists what it holds in the order of the rows, which all know.
    counts = [0] * sharing.world_size
    places: dict[tuple[int, int], Place] = {}
    for piece in chain.from_iterable(rows):
        places[piece.origin] = (piece.holder, counts[piece.holder])
        counts[piece.holder] += 1
    dealt = deal_rows(costs, sharing.world_size)
    units = sharing.fetch(
        [piece.unit for row in rows for piece in row if piece.holder == sharing.rank],
        [[places[piece.origin] for row in indices for piece in rows[row]] for indices in dealt],
    )
    fetched = iter(units)
    return [list(islice(fetched, len(rows[row]))) for row in dealt[sharing.rank]]


def _groups(
    order: SampleOrder,
    reader: Dataset[Read],
    held: Mapping[int, UnitRef],
    first: int,
    data: DataConfig,
    sharing: Sharing | None,
) -> Generator[Group, None, None]:
    """Yields every reference of `held` and then of the order from sample `first` on, as read."""

    def numbered() -> Iterator[tuple[int, UnitRef]]:
        yield from held.items()
        sample = first
        for ref in order.groups_from(first):
            yield sample, ref
            sample += len(ref.lines)

    rank, world_size = (0, 1) if sharing is None else (sharing.rank, sharing.world_size)
    # Two iterators over the same references: the workers run ahead on one, results pair with the
    # other.
    issued = islice((ref for _, ref in numbered()), rank, None, world_size)
    jobs = iter(lambda: list(islice(issued, loader.TOGETHER)), [])
    reading = Reading(
        loader.Groups(reader),
        jobs,
        name=partial(name_failing, reader, order.files),
        describe=partial(describe_refs, order.files),
        workers=data.workers,
        ahead=loader.AHEAD,
    )
    # Closed with this generator: the jobs never end, so neither would the workers.
    with closing(iter(reading)) as results:
        reads = chain.from_iterable(map(loader.received, results))
        here = islice(numbered(), rank, None, world_size)
        read_here = (
            _group(sample, ref, read, data, sharing)
            for (sample, ref), read in zip(here, reads, strict=False)
        )
        if sharing is None:
            yield from read_here
            return
        while True:
            taken = list(islice(read_here, loader.TOGETHER))
            # Without pixels: sizes decide the rows, and most pieces stay or go to one rank.
            shared = sharing.gather([_without_units(group) for group in taken])
            shared[rank] = taken
            # As one rank would read them: a reference of every rank in turn.
            yield from chain.from_iterable(zip(*shared, strict=True))


def _group(
    sample: int, ref: UnitRef, read: Read, data: DataConfig, sharing: Sharing | None
) -> Group:
    """Makes the group of a reference, its units cut to fit a row."""
    # A function of the group alone, so that an index names the same piece after a resume.
    units = [
        piece
        for unit in read.units
        for piece in split_unit(unit, _row_tokens(data), data.max_tiles)
    ]
    holder = 0 if sharing is None else sharing.rank
    pieces = [
        Piece(
            (sample, index),
            unit.num_tokens,
            unit.num_tiles,
            # A text takes the room of one tile, see `Buffer.from_units`.
            1 if unit.tiles is None else unit.num_tiles,
            unit,
            holder,
            0.0 if sharing is None else sharing.unit_cost(unit),
        )
        for index, unit in enumerate(units)
    ]
    return Group(sample, len(ref.lines), pieces, read.bad, holder)


def _without_units(group: Group) -> Group:
    return replace(group, pieces=[replace(piece, unit=None) for piece in group.pieces])


def _restored(
    position: Position, held: Sequence[Group], data: DataConfig, num_rows: int
) -> RowPacker:
    """Returns the packer as it was at `position`.

    Args:
        held: the groups that its pieces come from.
    """
    pieces = {piece.origin: piece for group in held for piece in group.pieces}

    def rows(saved: Sequence[Sequence[tuple[int, int]]]) -> list[Row]:
        return [[pieces[origin] for origin in row] for row in saved]

    try:
        closed, opened = rows(position.closed), rows(position.open)
    except KeyError as error:
        bad = [bad for group in held for bad in group.bad]
        reason = f": {bad[0]}" if bad else ""
        raise DataError(
            f"sample {error.args[0][0] + 1:,} of the run waits for a row and cannot be read as it "
            f"was{reason}; put its file back to go on"
        ) from None
    if data.packing == "official":
        return OfficialRows(data, num_rows, closed, opened)
    return BestFitRows(data, num_rows, [piece for row in opened for piece in row])


def _row_tokens(data: DataConfig) -> int:
    return data.row_tokens or data.max_tokens


def _origins(rows: Sequence[Row]) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(tuple(piece.origin for piece in row) for row in rows)
