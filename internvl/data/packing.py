"""Packs examples into rows under a token and a tile budget, with shared prefixes.

`pack` packs within one optimizer step of `global_batch` samples. No sample waits between steps, so
the step number alone resumes a run, and micro-batches never change which samples a step has. Steps
of `global_batch_rows` are in data/row_steps.py.
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
"""Weight of each of a sample's n supervised tokens; 0 if n is 0, as in the original's
`packed_collate_fn`."""

# Two only: each length is compiled for, some 15 s. Not a half: sums of 5/8 and 1 lie an eighth
# apart, which fits the tokens of a step more closely.
ROW_SHARES = (5 / 8, 1)
"""Shares of the longest row that rows are padded to."""

_MOST_SHORT = 4
"""Most short rows that packing tries to begin a step with."""


def make_units(
    examples: Sequence[Example], tiles: Tensor | None, context_id: int, *, share: bool
) -> list[Unit]:
    """Makes one unit of examples of the same images if they share a prefix, else a unit each.

    The prefix is the longest run of leading tokens that all have in common, up to the first
    supervised one.
    """
    if share and tiles is not None and len(examples) > 1:
        prefix = common_prefix(examples)
        # Every visual token must be in the prefix: each branch would need the tiles again.
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
    """Encodes samples of the same images to units, followed by the samples that are bad."""
    examples, bad = [], []
    for sample in samples:
        try:
            per_image = () if tiles is None else tiles.per_image
            examples.append(encoder.encode(sample, per_image, max_tokens))
        except BadSample as error:
            bad.append(error)
    pixels = None if tiles is None else tiles.pixels
    return [*make_units(examples, pixels, encoder.context_id, share=share), *bad]


def common_prefix(examples: Sequence[Example]) -> int:
    """Returns the number of leading tokens that are equal and unsupervised in all examples."""
    shortest = min(len(e.input_ids) for e in examples)
    ids = np.stack([e.input_ids[:shortest] for e in examples])
    # A supervised token ends the prefix: shared once, it would count for one example only.
    unsupervised = np.stack([e.labels[:shortest] == IGNORE for e in examples])
    same = (ids == ids[0]).all(axis=0) & unsupervised.all(axis=0)
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
    """Packs units into rows of at most `max_tokens` tokens and `max_tiles` tiles.

    Args:
        packing: "best-fit" or "official", see `least_padded` and `official_rows`.
        num_buffers: rows that official packing keeps open.
        branches: whether units may hold several examples; if not, rows have `starts`.
        overflow_id: token id of a placeholder, if official packing may overfill a row and cut it
            (`Overflow`); None keeps every example whole.

    Raises:
        BadSample: a sample exceeds a row.
    """
    rows = pack_units(
        units,
        max_tokens=max_tokens,
        max_tiles=max_tiles,
        packing=packing,
        num_buffers=num_buffers,
        overflow_id=overflow_id,
    )
    return build_rows(rows, weighting, branches=branches)


def pack_units(
    units: Sequence[Unit],
    *,
    max_tokens: int,
    max_tiles: int,
    packing: str = "best-fit",
    num_buffers: int = 20,
    overflow_id: int | None = None,
) -> list[list[Unit]]:
    """Groups units to rows; arguments and errors as those of `pack`."""
    pieces = [piece for unit in units for piece in split_unit(unit, max_tokens, max_tiles)]
    if packing == "official":
        cut = None if overflow_id is None else Overflow(overflow_id, max_tokens)
        opened = [Buffer.from_units([piece]) for piece in pieces]
        filled = official_rows(opened, max_tokens, max_tiles, num_buffers, cut)
        return [buffer.pieces for buffer in filled]
    sizes = [(piece.num_tokens, piece.num_tiles) for piece in pieces]
    return [[pieces[i] for i in row] for row in least_padded(sizes, max_tokens, max_tiles)]


def build_rows(
    rows: Sequence[Sequence[Unit]], weighting: str, *, branches: bool
) -> list[PackedBatch]:
    """Builds the batch of every row of units; see `pack` for the arguments."""
    batches = [_row(row, weighting) for row in rows]
    if branches:
        return batches
    # Kernels for variable lengths need the starts, and cannot express branches.
    return [replace(row, starts=_starts(row.document)) for row in batches]


def _starts(document: Tensor) -> Tensor:
    """Returns the start of each document and the row's end, int32 (D + 1,)."""
    sizes = torch.unique_consecutive(document, return_counts=True)[1]
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int()


def padded_tokens(tokens: int, max_tokens: int) -> int:
    """Returns the padded length of a row of `tokens`, before rounding to attention blocks."""
    return next(n for n in (int(max_tokens * share) for share in ROW_SHARES) if n >= tokens)


def least_padded(
    sizes: Sequence[tuple[int, int]], max_tokens: int, max_tiles: int
) -> list[list[int]]:
    """Packs by `best_fit` with the number of short rows that pads least; rows of piece indices."""

    def cost(rows: list[list[int]]) -> int:
        return sum(padded_tokens(sum(sizes[i][0] for i in row), max_tokens) for row in rows)

    # A step's tokens seldom fill whole rows alone: its last row would be padded for the rest.
    candidates = (
        best_fit(sizes, max_tokens, max_tiles, num_short=num_short)
        for num_short in range(_MOST_SHORT + 1)
    )
    return min(candidates, key=cost)


def best_fit(
    sizes: Sequence[tuple[int, int]], max_tokens: int, max_tiles: int, *, num_short: int = 0
) -> list[list[int]]:
    """Packs pieces of `sizes` (tokens, tiles), largest first, each into the fullest row it fits.

    Returns rows as piece indices. The first `num_short` rows are short ones, if a piece fits them.
    """
    short = padded_tokens(0, max_tokens)
    rows: list[list[int]] = []
    limits: list[int] = []
    used: list[tuple[int, int]] = []
    # By tokens alone: tiles cost tokens, too.
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
    """An open row of official packing."""

    tokens: int
    tiles: int
    """Tiles in the original's count, see `from_units`."""
    pieces: list[Any]

    @classmethod
    def from_units(cls, units: Sequence[Unit]) -> "Buffer":
        # A sample without images counts one: the original gives it a white tile, which it masks
        # later but which takes room in the row. A cut rest counts the tiles that it has.
        tiles = sum(1 if unit.tiles is None else unit.num_tiles for unit in units)
        return cls(sum(unit.num_tokens for unit in units), tiles, list(units))


def first_buffer(
    sizes: Sequence[tuple[int, int]], max_tokens: int, max_tiles: int, num_buffers: int
) -> list[list[int]]:
    """Packs pieces of `sizes` (tokens, tiles) officially, uncut; returns rows of piece indices."""
    # At least one tile, see `Buffer.from_units`.
    pieces = [Buffer(tokens, max(1, tiles), [i]) for i, (tokens, tiles) in enumerate(sizes)]
    return [row.pieces for row in official_rows(pieces, max_tokens, max_tiles, num_buffers)]


def official_rows(
    pieces: Sequence[Buffer],
    max_tokens: int,
    max_tiles: int,
    num_buffers: int,
    overflow: "Overflow | None" = None,
) -> list[Buffer]:
    """Fills rows like the original's `PackedDataset`, from one step's pieces in their order.

    A piece joins the first open buffer that takes it. Buffers are sorted by tiles, most first; one
    is closed when it is full by tokens, when it is first and full by tiles, or when more than
    `num_buffers` are open. The rest is closed at the end in that order.

    Args:
        overflow: cuts what exceeds `max_tokens`. With it, a piece that no buffer takes overfills
            the last one with room for its tiles, once half of `num_buffers` are open.
    """
    rows: list[Buffer] = []
    buffers: list[Buffer] = []
    for piece in pieces:
        rows += add_to_buffers(buffers, piece, max_tokens, max_tiles, num_buffers, overflow)
    return rows + buffers


def add_to_buffers(
    buffers: list[Buffer],
    piece: Buffer,
    max_tokens: int,
    max_tiles: int,
    num_buffers: int,
    overflow: "Overflow | None" = None,
) -> list[Buffer]:
    """Adds a piece to the open `buffers` in place; returns those that it closes.

    See `official_rows`.
    """
    closed: list[Buffer] = []
    roomy = [i for i, b in enumerate(buffers) if b.tiles + piece.tiles <= max_tiles]
    target = next((i for i in roomy if buffers[i].tokens + piece.tokens <= max_tokens), None)
    if target is None and overflow and roomy and len(buffers) >= num_buffers // 2:
        target = roomy[-1]
    merged = piece
    if target is not None:
        buffer = buffers.pop(target)
        tokens, tiles = buffer.tokens + piece.tokens, buffer.tiles + piece.tiles
        merged = Buffer(tokens, tiles, [*buffer.pieces, *piece.pieces])
    for buffer in overflow.cut(merged) if overflow else [merged]:
        if buffer.tokens >= max_tokens:
            closed.append(buffer)
        else:
            # Behind equal ones, as in the original.
            buffers.insert(sum(b.tiles >= buffer.tiles for b in buffers), buffer)
    while buffers and (buffers[0].tiles == max_tiles or len(buffers) > num_buffers):
        closed.append(buffers.pop(0))
    return closed


@dataclass(frozen=True)
class Overflow:
    """Cuts overfull buffers (original: `PackedDataset.split_buffer`).

    A row ends after `max_tokens` tokens, or before the image block at that position. The next row
    begins with that block, or with the first one after the cut: text before it is lost, and so is
    everything if no image follows. Pieces without an image, or with at most 1 supervised token in
    256, are dropped. As in the original, samples are weighted by what is left of them. Unlike it,
    images of several tiles stay whole (the original fails on them).
    """

    context_id: int
    """Token id of a placeholder."""
    max_tokens: int
    least_supervised: float = 1 / 256

    def cut(self, buffer: Buffer) -> list[Buffer]:
        """Cuts a buffer into valid pieces of at most `max_tokens`; returns a shorter one as is."""
        if buffer.tokens <= self.max_tokens:
            return [buffer]
        pieces, rest = [], buffer
        while rest.tokens > self.max_tokens:
            starts, ends = self._blocks(rest.pieces)
            inside = (starts <= self.max_tokens) & (self.max_tokens < ends)
            end = int(starts[inside][0]) if inside.any() else self.max_tokens
            following = starts[starts >= end]
            pieces.append(Buffer.from_units(_between(rest.pieces, 0, end, self.context_id)))
            if not len(following):
                rest = Buffer.from_units([])
                break
            begin = int(following[0])
            rest = Buffer.from_units(_between(rest.pieces, begin, rest.tokens, self.context_id))
        return [piece for piece in (*pieces, rest) if self._is_valid(piece)]

    def _blocks(self, units: Sequence[Unit]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (starts, ends) of the image blocks, int64 (images,), past-the-end."""
        starts, ends = _runs(_ids(units), self.context_id)
        # `<img>` before and `</img>` behind the placeholders belong to the block.
        return starts - 1, ends + 1

    def _is_valid(self, piece: Buffer) -> bool:
        if not piece.tokens or not piece.tiles:
            return False
        supervised = sum(e.num_supervised for unit in piece.pieces for e in unit.examples)
        return supervised / piece.tokens > self.least_supervised


def _ids(units: Sequence[Unit]) -> np.ndarray:
    return np.concatenate([unit.examples[0].input_ids for unit in units])


def _runs(ids: np.ndarray, context_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (starts, ends) of the runs of placeholders, int64 (images,) each."""
    edges = np.diff((ids == context_id).astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def _between(units: Sequence[Unit], first: int, last: int, context_id: int) -> list[Unit]:
    """Returns tokens `first` … `last` - 1 of a row of units of one example each, as units.

    Neither end may lie within an image block.
    """
    cut_units: list[Unit] = []
    start = 0
    for unit in units:
        (example,) = unit.examples
        a, b = max(0, first - start), min(len(example.input_ids), last - start)
        start += len(example.input_ids)
        if a >= b:
            continue
        image_starts, _ = _runs(example.input_ids, context_id)
        inside = (a <= image_starts) & (image_starts < b)
        indices = np.flatnonzero(inside)
        per_image = example.tiles_per_image
        lo, hi = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
        before, shown = sum(per_image[:lo]), per_image[lo:hi]
        tiles = None if unit.tiles is None else unit.tiles[before : before + sum(shown)]
        piece = Example(example.name, example.input_ids[a:b], example.labels[a:b], shown)
        cut_units.append(Unit((piece,), 0, tiles))
    return cut_units


def split_unit(unit: Unit, max_tokens: int, max_tiles: int) -> list[Unit]:
    """Cuts a unit that exceeds a row into several with the same prefix."""
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
            length = unit.prefix  # each piece has the prefix, and the tiles in it, again
        pieces[-1].append(example)
        length += branch
    return [Unit(tuple(piece), unit.prefix, unit.tiles) for piece in pieces]


def _row(units: Sequence[Unit], weighting: str) -> PackedBatch:
    """Builds a row: each unit is a document, each example a branch after its unit's prefix."""
    ids, positions, documents, branches = [], [], [], []
    sources, targets, weights = [], [], []
    start = 0
    for document, unit in enumerate(units):
        prefix = unit.prefix
        prefix_start = start
        pieces = [(unit.examples[0].input_ids[:prefix], 0, 0)] if prefix else []
        pieces += [(e.input_ids[prefix:], prefix, b) for b, e in enumerate(unit.examples, 1)]
        for piece, first_position, branch in pieces:
            ids.append(piece)
            # A branch goes on from its prefix, as if it were alone in the row.
            positions.append(np.arange(first_position, first_position + len(piece)))
            documents.append(np.full(len(piece), document))
            branches.append(np.full(len(piece), branch))
            if branch:
                example = unit.examples[branch - 1]
                supervised = np.flatnonzero(example.labels != IGNORE)
                supervised = supervised[supervised > 0]  # nothing predicts the first token
                # The token before: in the branch, or the last one of the shared prefix.
                offset = np.where(supervised > prefix, start - prefix, prefix_start)
                sources.append(offset + supervised - 1)
                targets.append(example.labels[supervised])
                weight = WEIGHTS[weighting](len(supervised))
                weights.append(np.full(len(supervised), weight))
            start += len(piece)
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
    """Yields the examples of a row in its order, with their prefixes; tiles per image are lost."""
    document, branch = row.document.numpy(), row.branch.numpy()
    ids, predicted_from = row.input_ids[0].numpy(), row.loss_positions.numpy()
    names = iter(row.names)
    first = 0  # the next example's first index into `loss_positions`
    for document_index in range(int(document.max(initial=-1)) + 1):
        in_document = document == document_index
        prefix = np.flatnonzero(in_document & (branch == 0))
        for branch_index in range(1, int(branch[in_document].max()) + 1):
            rest = np.flatnonzero(in_document & (branch == branch_index))
            row_positions = np.concatenate([prefix, rest])
            labels = np.full(len(row_positions), IGNORE, dtype=np.int64)
            index_of = {int(position): i for i, position in enumerate(row_positions)}
            # Positions ascend within an example; one that does not belongs to the next example.
            last = 0
            while first < len(predicted_from):
                i = index_of.get(int(predicted_from[first]), -1) + 1
                if i <= last:
                    break
                labels[i] = int(row.targets[first])
                first, last = first + 1, i
            yield Example(next(names), ids[row_positions], labels)


def _int64(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))
