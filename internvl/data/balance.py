"""Deals the pieces of a step to ranks so that all of them finish at about the same time.

A step lasts as long as its slowest rank. With sharded weights every rank waits for all others in
each block of each row, so their first rows should cost the same, their second rows too, and so on.

Plain numbers in, plain numbers out: ranks that see the same sizes deal alike, without asking.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from operator import attrgetter, itemgetter

import numpy as np

TOLERANCE = 0.002
"""Share of the mean cost of a rank that the most loaded one may exceed it by."""
_HEADROOM = 0.01  # of the tokens that rows hold; without it pieces fit too rarely to be traded
_MOST_ROWS = 3  # longer than the fewest rows of a rank by this many are tried

Place = tuple[int, int]
"""A piece as it was read: (rank, index among the pieces of that rank)."""


@dataclass(frozen=True)
class Piece:
    """What stays together, with its cost in any measure and the room that it takes in a row."""

    cost: float
    tokens: int = 0
    tiles: int = 0


@dataclass
class _Bin:
    """Pieces of a rank, of all its rows or of one."""

    tokens: float = math.inf
    """Room for tokens that is left."""
    tiles: float = math.inf
    load: float = 0.0
    capacity: float = math.inf
    pieces: list[tuple[Piece, Place]] = field(default_factory=list)

    def takes(self, piece: Piece) -> bool:
        return piece.tokens <= self.tokens and piece.tiles <= self.tiles

    def add(self, item: tuple[Piece, Place]) -> None:
        self.pieces.append(item)
        self._change(item[0], 1)

    def pop(self, index: int) -> tuple[Piece, Place]:
        item = self.pieces.pop(index)
        self._change(item[0], -1)
        return item

    def _change(self, piece: Piece, sign: int) -> None:
        self.tokens -= sign * piece.tokens
        self.tiles -= sign * piece.tiles
        # Summed anew: rounding errors of thousands of moves would add up.
        self.load = math.fsum(held.cost for held, _ in self.pieces)

    def column(self, name: str) -> np.ndarray:
        """Returns a field of all pieces and a zero, for trading a piece for none."""
        return np.array([*(getattr(piece, name) for piece, _ in self.pieces), 0.0])

    def places(self) -> list[Place]:
        """Returns the pieces in the order of the step, of which rank r reads every N-th."""
        return sorted(map(itemgetter(1), self.pieces), key=itemgetter(1, 0))


def even_out(costs: Sequence[Sequence[float]]) -> list[list[Place]]:
    """Deals pieces to ranks at nearly equal cost; most pieces stay where they are.

    Args:
        costs: of the pieces that each rank has read.

    Returns:
        The pieces of each rank, in the order of the step.
    """
    bins = [_Bin() for _ in costs]
    for rank, values in enumerate(costs):
        for i, cost in enumerate(values):
            bins[rank].add((Piece(cost), (rank, i)))
    _even(bins)
    return [rank_bin.places() for rank_bin in bins]


def even_rows(
    pieces: Sequence[Sequence[Piece]], lengths: Sequence[int], max_tiles: int
) -> list[list[list[Place]]]:
    """Packs pieces into rows, as many on every rank, whose n-th rows cost nearly the same.

    Args:
        pieces: that each rank has read; each fits a row.
        lengths: that rows are padded to, ascending; the last one is the longest row.

    Returns:
        The pieces of each row of each rank; rows may be empty. Most pieces stay where they are.
    """
    for shape in _shapes(pieces, lengths, max_tiles):
        ranks = _fill(pieces, shape, max_tiles)
        if ranks is None:
            continue
        for rounds in zip(*ranks, strict=True):
            _even(rounds)
        return [[row.places() for row in rows] for rows in ranks]
    raise AssertionError("a rank of as many rows as pieces holds them all")


def _shapes(
    pieces: Sequence[Sequence[Piece]], lengths: Sequence[int], max_tiles: int
) -> Iterator[tuple[int, ...]]:
    """Yields lengths of the rows of every rank that may hold the pieces, the least padded first."""
    flat = [piece for of_rank in pieces for piece in of_rank]
    sizes = [piece.tokens for piece in flat]
    mean = sum(sizes) / len(pieces)
    # Pieces of one length are traded for each other without any room.
    tokens = mean + min(_HEADROOM * mean, max(sizes, default=0) - min(sizes, default=0))
    tiles = sum(piece.tiles for piece in flat) / len(pieces)
    least = max(1, math.ceil(tokens / lengths[-1]), math.ceil(tiles / max(1, max_tiles)))
    candidates = [
        shape
        for count in range(least, least + _MOST_ROWS)
        for shape in combinations_with_replacement(lengths[::-1], count)
        if sum(shape) >= tokens
    ]
    # Fewer rows at equal length: every row costs the messages between ranks anew.
    yield from sorted(candidates, key=lambda shape: (sum(shape), len(shape)))
    # Large pieces leave gaps: with a row for each of them none is left over.
    for count in range(least + _MOST_ROWS, max(len(flat), least + _MOST_ROWS) + 1):
        yield (lengths[-1],) * count


def _fill(
    pieces: Sequence[Sequence[Piece]], shape: Sequence[int], max_tiles: int
) -> list[list[_Bin]] | None:
    """Puts pieces into rows of the lengths of `shape`; None if they do not fit.

    A piece stays on its rank if it fits there, in the row with most room for its length.
    """
    ranks = [[_Bin(length, max_tiles, capacity=length) for length in shape] for _ in pieces]
    everything = [bin_ for rows in ranks for bin_ in rows]
    items = [(piece, (rank, i)) for rank, row in enumerate(pieces) for i, piece in enumerate(row)]
    for item in sorted(items, key=lambda item: -item[0].tokens):
        piece, (rank, _) = item
        for bins in (ranks[rank], everything):
            taking = [row for row in bins if row.takes(piece)]
            if taking:
                max(taking, key=lambda row: row.tokens / row.capacity).add(item)
                break
        else:
            return None
    return ranks


def _even(bins: Sequence[_Bin]) -> None:
    """Evens out the loads: pieces move, or trade bins, between the most loaded bin and another one
    until that gains no more. So little moves, which a new deal from nothing would not spare."""
    limit = (1 + TOLERANCE) * sum(map(attrgetter("load"), bins)) / len(bins)
    # Every pass lowers the sum of squares, so it ends; the bound is for costs that are all alike.
    for _ in range(4 * sum(len(held.pieces) for held in bins)):
        heavy = max(bins, key=attrgetter("load"))
        if heavy.load <= limit:
            return
        others = sorted((held for held in bins if held is not heavy), key=attrgetter("load"))
        if not any(_trade(heavy, light) for light in others):
            return


def _trade(heavy: _Bin, light: _Bin) -> bool:
    """Gives the piece, or trades the pair, that evens two bins best; False if nothing does."""
    gap = heavy.load - light.load
    # Giving alone is trading for the last of each, which costs nothing.
    differences = np.subtract.outer(heavy.column("cost"), light.column("cost"))
    # Less than a rounding error would be traded back and forth.
    useful = (differences > 1e-9 * gap) & (differences < (1 - 1e-9) * gap)
    for name in ("tokens", "tiles"):
        more = np.subtract.outer(heavy.column(name), light.column(name))
        useful &= (more <= getattr(light, name)) & (-more <= getattr(heavy, name))
    if not useful.any():
        return False
    left = np.where(useful, np.abs(gap / 2 - differences), np.inf)
    outgoing, incoming = np.unravel_index(int(left.argmin()), left.shape)
    if incoming < len(light.pieces):
        item = light.pop(int(incoming))
        light.add(heavy.pop(int(outgoing)))
        heavy.add(item)
    else:
        light.add(heavy.pop(int(outgoing)))
    return True


def deal_rows(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Deals rows to ranks, as many to each as to any other or one fewer, the costliest first.

    The n-th rows of all ranks cost about the same, and so do all rows of a rank together.

    Returns:
        Indices of the rows of each rank.
    """
    order = sorted(range(len(costs)), key=lambda row: -costs[row])
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for start in range(0, len(order), num_ranks):
        # Neighbours in cost are a round: its dearest row goes to the rank that has least so far.
        ranks = sorted(range(num_ranks), key=loads.__getitem__)
        for row, rank in zip(order[start : start + num_ranks], ranks, strict=False):
            dealt[rank].append(row)
            loads[rank] += costs[row]
    return dealt
