"""Examples into packed rows: best fit under a token and a tile budget, shared prefixes included.

Rows are packed within one optimizer step, so no sample waits in a buffer between steps: the step
number is all a run needs to go on, and how a step is cut never changes which samples it holds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from internvl.data.records import IGNORE, BadSample, Example, PackedBatch, Unit

WEIGHTS = {
    "token": lambda n: 1.0,
    "sample": lambda n: 1.0 / n,
    "square": lambda n: 1.0 / n**0.5,
}
"""Weight of each supervised token in a sample that has n of them."""


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


def _common_prefix(examples: Sequence[Example]) -> int:
    """Leading tokens that are equal in all examples and unsupervised in each."""
    shortest = min(len(e.input_ids) for e in examples)
    ids = np.stack([e.input_ids[:shortest] for e in examples])
    open_ = np.stack([e.labels[:shortest] == IGNORE for e in examples])
    same = (ids == ids[0]).all(axis=0) & open_.all(axis=0)
    return shortest if same.all() else int(np.argmin(same))


def pack(
    units: Sequence[Unit], *, max_tokens: int, max_tiles: int, weighting: str = "token"
) -> list[PackedBatch]:
    """Rows of at most `max_tokens` tokens and `max_tiles` tiles that hold every example once.

    Best fit, largest first: a unit goes into the fullest row that still takes it.

    Raises:
        BadSample: a single sample exceeds a row.
    """
    pieces = [piece for unit in units for piece in _fit(unit, max_tokens, max_tiles)]
    rows: list[list[Unit]] = []
    tokens: list[int] = []
    tiles: list[int] = []
    for piece in sorted(pieces, key=lambda unit: -unit.num_tokens):
        best = None
        for row in range(len(rows)):
            fits = tokens[row] + piece.num_tokens <= max_tokens
            if fits and tiles[row] + piece.num_tiles <= max_tiles:
                best = row if best is None or tokens[row] > tokens[best] else best
        if best is None:
            best = len(rows)
            rows.append([])
            tokens.append(0)
            tiles.append(0)
        rows[best].append(piece)
        tokens[best] += piece.num_tokens
        tiles[best] += piece.num_tiles
    return [_row(row, weighting) for row in rows]


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
    tiles = [unit.tiles for unit in units if unit.tiles is not None]
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


def _int64(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
