"""Examples into packed rows: best fit under a token and a tile budget, shared prefixes included.

Rows are packed within one optimizer step, so no sample waits in a buffer between steps: the step
number is all a run needs to go on, and how a step is cut never changes which samples it holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl.data.chat import ChatEncoder
from internvl.data.records import IGNORE, Example, PackedBatch, Sample, Tiles, Unit
from internvl.errors import BadSample

WEIGHTS = {
    "token": lambda n: 1.0,
    "sample": lambda n: 1.0 / n if n else 0.0,
    "square": lambda n: 1.0 / n**0.5 if n else 0.0,
}
"""Weight of each supervised token in a sample that has n of them; of none it is 0, as in the
original's `packed_collate_fn`."""

ROW_SHARES = (5 / 8, 1)
"""Parts of the longest row that rows are padded to: a short row and a whole one. Both are compiled
for, some 15 s each. A half would do less: sums of 5/8 and 1 lie an eighth apart."""

_MOST_SHORT = 4
"""Short rows that packing tries to open a step with."""


def make_units(
    examples: Sequence[Example], tiles: Tensor | None, context_id: int, *, share: bool
) -> list[Unit]:
    """Examples of the same images as one unit where they share a prefix, else a unit each.

    The prefix is the longest run of leading tokens that all have in common, up to the first
    supervised one; it must hold every visual token, or there is nothing to save.
    """
    if share and tiles is not None and len(examples) > 1:
        prefix = _common_prefix(examples)
        if all((e.input_ids[prefix:] != context_id).all() for e in examples):
            return [Unit(tuple(examples), prefix, tiles)]
    return [Unit((example,), 0, tiles) for example in examples]


def encode_units(
    encoder: ChatEncoder,
    samples: Sequence[Sample],
    tiles: Tiles | None,
    max_tokens: int,
    *,
    share: bool,
) -> list[Unit | BadSample]:
    """Samples of the same images, and their tiles, to units, and the samples that are bad."""
    examples, bad = [], []
    for sample in samples:
        try:
            per_image = () if tiles is None else tiles.per_image
            examples.append(encoder.encode(sample, per_image, max_tokens))
        except BadSample as error:
            bad.append(error)
    pixels = None if tiles is None else tiles.pixels
    return [*make_units(examples, pixels, encoder.context_id, share=share), *bad]


def _common_prefix(examples: Sequence[Example]) -> int:
    """Leading tokens that are equal in all examples and unsupervised in each."""
    shortest = min(len(e.input_ids) for e in examples)
    ids = np.stack([e.input_ids[:shortest] for e in examples])
    open_ = np.stack([e.labels[:shortest] == IGNORE for e in examples])
    same = (ids == ids[0]).all(axis=0) & open_.all(axis=0)
    return shortest if same.all() else int(np.argmin(same))


def pack(
    units: Sequence[Unit],
    *,
    max_tokens: int,
    max_tiles: int,
    weighting: str = "token",
    packing: str = "best-fit",
    num_buffers: int = 20,
    branches: bool = True,
    overflow_id: int | None = None,
) -> list[PackedBatch]:
    """Rows of at most `max_tokens` tokens and `max_tiles` tiles that hold every example once.

    Args:
        packing: "best-fit" or "official", see `least_padded` and `official_rows`.
        num_buffers: rows that official packing keeps open.
        branches: whether units may hold several examples; without, rows say where documents start.
        overflow_id: token id of a placeholder, where official packing may overfill a row and cut
            it (`Overflow`); None keeps every example whole.

    Raises:
        BadSample: a single sample exceeds a row.
    """
    pieces = [piece for unit in units for piece in _fit(unit, max_tokens, max_tiles)]
    if packing == "official":
        cut = None if overflow_id is None else Overflow(overflow_id, max_tokens)
        opened = [Buffer.of([piece]) for piece in pieces]
        filled = official_rows(opened, max_tokens, max_tiles, num_buffers, cut)
        rows = [buffer.pieces for buffer in filled]
    else:
        sizes = [(piece.num_tokens, piece.num_tiles) for piece in pieces]
        rows = [[pieces[i] for i in row] for row in least_padded(sizes, max_tokens, max_tiles)]
    made = [_row(row, weighting) for row in rows]
    return made if branches else [replace(row, starts=_starts(row.document)) for row in made]


def _starts(document: Tensor) -> Tensor:
    """Where each of contiguous documents begins, and their end: int32 (D + 1,)."""
    sizes = torch.unique_consecutive(document, return_counts=True)[1]
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()


def padded_tokens(tokens: int, max_tokens: int) -> int:
    """What a row of `tokens` costs, of `ROW_SHARES` of the longest (blocks not rounded up)."""
    return next(n for n in (int(max_tokens * share) for share in ROW_SHARES) if n >= tokens)


def least_padded(
    sizes: Sequence[tuple[int, int]], max_tokens: int, max_tiles: int
) -> list[list[int]]:
    """Rows by `best_fit`, with as many short ones as make the fewest tokens, padding included.

    A step's tokens seldom fill whole rows alone, and its last row would be padded for the rest.
    """

    def cost(rows: list[list[int]]) -> int:
        return sum(padded_tokens(sum(sizes[i][0] for i in row), max_tokens) for row in rows)

    tried = (
        best_fit(sizes, max_tokens, max_tiles, num_short=number)
        for number in range(_MOST_SHORT + 1)
    )
    return min(tried, key=cost)


def best_fit(
    sizes: Sequence[tuple[int, int]], max_tokens: int, max_tiles: int, *, num_short: int = 0
) -> list[list[int]]:
    """Rows as numbers of pieces of `sizes` (tokens, tiles), each within a row's budgets.

    Largest first: a piece goes into the fullest row that still takes it. Tiles cost tokens, so
    tokens measure both. The first `num_short` rows are short ones, as far as a piece fits them.
    """
    short = padded_tokens(0, max_tokens)
    rows: list[list[int]] = []
    limits: list[int] = []
    used: list[tuple[int, int]] = []
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        tokens, tiles = sizes[piece]
        fitting = [
            row
            for row, (t, n) in enumerate(used)
            if t + tokens <= limits[row] and n + tiles <= max_tiles
        ]
        if fitting:
            row = max(fitting, key=lambda row: used[row][0])
        else:
            row = len(rows)
            limits.append(short if row < num_short and tokens <= short else max_tokens)
            rows.append([])
            used.append((0, 0))
        rows[row].append(piece)
        used[row] = (used[row][0] + tokens, used[row][1] + tiles)
    return rows


@dataclass
class Buffer:
    """A row of official packing while it is open."""

    tokens: int
    tiles: int
    """A sample without images counts one: the original gives it a white tile, which is masked later
    but takes its place in the row. What was cut off a sample with images counts those it has."""
    pieces: list[Any]

    @classmethod
    def of(cls, units: Sequence[Unit]) -> "Buffer":
        tiles = sum(1 if unit.tiles is None else unit.num_tiles for unit in units)
        return cls(sum(unit.num_tokens for unit in units), tiles, list(units))


def first_buffer(
    sizes: Sequence[tuple[int, int]], max_tokens: int, max_tiles: int, num_buffers: int
) -> list[list[int]]:
    """Rows of official packing as numbers of pieces of `sizes` (tokens, tiles), none overfilled."""
    pieces = [Buffer(tokens, max(1, tiles), [i]) for i, (tokens, tiles) in enumerate(sizes)]
    return [row.pieces for row in official_rows(pieces, max_tokens, max_tiles, num_buffers)]


def official_rows(
    pieces: Sequence[Buffer],
    max_tokens: int,
    max_tiles: int,
    num_buffers: int,
    overflow: "Overflow | None" = None,
) -> list[Buffer]:
    """Rows as the original's `PackedDataset` fills them, from one step's pieces in their order.

    A piece joins the first open buffer that takes it. Buffers are kept with the most tiles first;
    one leaves when it is full by tokens, when it is first and full by tiles, or when more than
    `num_buffers` are open. What is open at the end leaves in that order.

    Args:
        overflow: cuts what exceeds `max_tokens`. With it a piece that no buffer takes overfills the
            last one that has room for its tiles, once half of `num_buffers` are open.
    """
    rows: list[Buffer] = []
    buffers: list[Buffer] = []
    for piece in pieces:
        roomy = [i for i, b in enumerate(buffers) if b.tiles + piece.tiles <= max_tiles]
        place = next((i for i in roomy if buffers[i].tokens + piece.tokens <= max_tokens), None)
        if place is None and overflow and roomy and len(buffers) >= num_buffers // 2:
            place = roomy[-1]
        merged = piece
        if place is not None:
            open_ = buffers.pop(place)
            tokens, tiles = open_.tokens + piece.tokens, open_.tiles + piece.tiles
            merged = Buffer(tokens, tiles, [*open_.pieces, *piece.pieces])
        for buffer in overflow.cut(merged) if overflow else [merged]:
            if buffer.tokens >= max_tokens:
                rows.append(buffer)
            else:
                buffers.insert(sum(b.tiles >= buffer.tiles for b in buffers), buffer)
        while buffers and (buffers[0].tiles == max_tiles or len(buffers) > num_buffers):
            rows.append(buffers.pop(0))
    return rows + buffers


@dataclass(frozen=True)
class Overflow:
    """Cuts overfull buffers (original: `PackedDataset.split_buffer`).

    A row ends after `max_tokens` tokens, or before the image block that is there. The next one
    begins with that block, or with the next one behind the cut; text up to it is lost, and so is
    what follows where there is no image any more. A part without an image or with no more than 1
    supervised token in 256 is dropped. Here as there a row's samples are weighted by what is left
    of them; images of several tiles stay whole (the original fails on them), and positions of a
    part begin at 0, which moves all of a document alike.
    """

    context_id: int
    """Token id of a placeholder."""
    max_tokens: int
    least_supervised: float = 1 / 256

    def cut(self, buffer: Buffer) -> list[Buffer]:
        """The parts of a buffer, none longer than `max_tokens`; itself where it is not."""
        if buffer.tokens <= self.max_tokens:
            return [buffer]
        parts, rest = [], buffer
        while rest.tokens > self.max_tokens:
            starts, ends = self._blocks(rest.pieces)
            inside = (starts <= self.max_tokens) & (self.max_tokens < ends)
            end = int(starts[inside][0]) if inside.any() else self.max_tokens
            following = starts[starts >= end]
            parts.append(Buffer.of(_between(rest.pieces, 0, end, self.context_id)))
            if not len(following):
                rest = Buffer.of([])
                break
            begin = int(following[0])
            rest = Buffer.of(_between(rest.pieces, begin, rest.tokens, self.context_id))
        return [part for part in (*parts, rest) if self._is_valid(part)]

    def _blocks(self, units: Sequence[Unit]) -> tuple[np.ndarray, np.ndarray]:
        """int64 first and past-the-last token of every image block, `<img>` and `</img>` too."""
        starts, ends = _runs(_ids(units), self.context_id)
        return starts - 1, ends + 1

    def _is_valid(self, part: Buffer) -> bool:
        if not part.tokens or not part.tiles:
            return False
        supervised = sum(e.num_supervised for unit in part.pieces for e in unit.examples)
        return supervised / part.tokens > self.least_supervised


def _ids(units: Sequence[Unit]) -> np.ndarray:
    return np.concatenate([unit.examples[0].input_ids for unit in units])


def _runs(ids: np.ndarray, context_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of placeholders begin and end: int64 (images,) each."""
    edges = np.diff((ids == context_id).astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _between(units: Sequence[Unit], first: int, last: int, context_id: int) -> list[Unit]:
    """What of units of one example each lies in tokens `first` … `last` - 1 of their row.

    No image block may lie across either of the two.
    """
    found: list[Unit] = []
    start = 0
    for unit in units:
        (example,) = unit.examples
        a, b = max(0, first - start), min(len(example.input_ids), last - start)
        start += len(example.input_ids)
        if a >= b:
            continue
        image_starts, _ = _runs(example.input_ids, context_id)
        inside = (a <= image_starts) & (image_starts < b)
        numbers = np.flatnonzero(inside)
        per_image = example.tiles_per_image
        lo, hi = (int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else (0, 0)
        before, shown = sum(per_image[:lo]), per_image[lo:hi]
        tiles = None if unit.tiles is None else unit.tiles[before : before + sum(shown)]
        part = Example(example.name, example.input_ids[a:b], example.labels[a:b], shown)
        found.append(Unit((part,), 0, tiles))
    return found


def _fit(unit: Unit, max_tokens: int, max_tiles: int) -> list[Unit]:
    """The unit, cut into several with the same prefix where it exceeds a row."""
    if unit.num_tiles > max_tiles:
        raise BadSample(
            unit.examples[0].name,
            f"{unit.num_tiles} tiles, but a row takes {max_tiles}; raise data.max_tiles or lower "
            "data.tiles.max",
        )
    pieces: list[list[Example]] = [[]]
    length = unit.prefix
    for example in unit.examples:
        branch = len(example.input_ids) - unit.prefix
        if unit.prefix + branch > max_tokens:
            raise BadSample(
                example.name,
                f"{len(example.input_ids)} tokens, but a row takes {max_tokens}; raise "
                "data.max_tokens or lower data.tiles.max",
            )
        if length + branch > max_tokens:
            pieces.append([])
            length = unit.prefix
        pieces[-1].append(example)
        length += branch
    return [Unit(tuple(piece), unit.prefix, unit.tiles) for piece in pieces]


def _row(units: Sequence[Unit], weighting: str) -> PackedBatch:
    """One row of units, each a document, each example a branch behind its unit's prefix."""
    ids, positions, documents, branches = [], [], [], []
    sources, targets, weights = [], [], []
    start = 0
    for number, unit in enumerate(units):
        prefix = unit.prefix
        prefix_start = start
        pieces = [(unit.examples[0].input_ids[:prefix], 0, 0)] if prefix else []
        pieces += [(e.input_ids[prefix:], prefix, b) for b, e in enumerate(unit.examples, 1)]
        for part, first_position, branch in pieces:
            ids.append(part)
            positions.append(np.arange(first_position, first_position + len(part)))
            documents.append(np.full(len(part), number))
            branches.append(np.full(len(part), branch))
            if branch:
                example = unit.examples[branch - 1]
                where = np.flatnonzero(example.labels != IGNORE)
                where = where[where > 0]
                # The token before position t: in the branch, or the last one of the prefix.
                before = np.where(where > prefix, start - prefix, prefix_start) + where - 1
                sources.append(before)
                targets.append(example.labels[where])
                weights.append(np.full(len(where), WEIGHTS[weighting](len(where))))
            start += len(part)
    tiles = [unit.tiles for unit in units if unit.tiles is not None and len(unit.tiles)]
    return PackedBatch(
        input_ids=_int64(ids)[None],
        position_ids=_int64(positions)[None],
        document=_int64(documents),
        branch=_int64(branches),
        pixel_values=torch.cat(tiles) if tiles else None,
        loss_positions=_int64(sources),
        targets=_int64(targets),
        loss_weights=torch.from_numpy(np.concatenate(weights)).to(torch.float32),
        names=tuple(example.name for unit in units for example in unit.examples),
    )


def unpack(row: PackedBatch) -> Iterator[Example]:
    """The examples of a row again, in its order, with their prefixes; tiles per image are lost."""
    document, branch = row.document.numpy(), row.branch.numpy()
    ids, predicted_from = row.input_ids[0].numpy(), row.loss_positions.numpy()
    names = iter(row.names)
    first = 0  # supervised position of the row that is the next example's first
    for number in range(int(document.max(initial=-1)) + 1):
        prefix = np.flatnonzero((document == number) & (branch == 0))
        for which in range(1, int(branch[document == number].max()) + 1):
            own = np.flatnonzero((document == number) & (branch == which))
            places = np.concatenate([prefix, own])
            labels = np.full(len(places), IGNORE, dtype=np.int64)
            place_of = {int(place): at for at, place in enumerate(places)}
            # Places of an example ascend: where they do not, the next example has begun.
            last = 0
            while first < len(predicted_from):
                at = place_of.get(int(predicted_from[first]), -1) + 1
                if at <= last:
                    break
                labels[at] = int(row.targets[first])
                first, last = first + 1, at
            yield Example(next(names), ids[places], labels)


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
