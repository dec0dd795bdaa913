"""Supervised fine-tuning: next-token loss on the answers of packed rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl.config import DataConfig, SftConfig
from internvl.data.chat import ChatEncoder, marked, spans
from internvl.data.loader import UnitReader
from internvl.data.packing import build_rows, encode_units, pack, split_unit, unpack
from internvl.data.records import IGNORE, Example, PackedBatch, Sample, Tiles, Unit
from internvl.data.sources import Source
from internvl.errors import BadSample, counted
from internvl.objectives.packed_loss import summed_loss

_SHOWN_SAMPLES = 2


class Sft:
    """One term, `sft`, averaged over supervised tokens with the recipe's weighting.

    With `loss_normalization: micro_batch` it is averaged over rows, whose weights then sum to one.

    Original: `InternVLChatModel.forward` with `loss_weight`, `dataset_packed.py`.
    """

    def __init__(self, config: SftConfig, data: DataConfig, encoder: ChatEncoder) -> None:
        self.config = config
        self.data = data
        self.encoder = encoder
        self.weights = {"sft": 1.0}

    def reader(self, files: Sequence[Source], seed: int) -> UnitReader:
        """See `Objective.reader`."""
        return UnitReader(files, self.data, self.encode, seed=seed)

    def encode(self, samples: Sequence[Sample], tiles: Tiles | None) -> list[Unit | BadSample]:
        """Encodes samples of the same images to units; the bad ones follow."""
        return encode_units(
            self.encoder, samples, tiles, self.data.max_tokens, share=self.data.share_prefix
        )

    def batches(self, units: Sequence[Unit]) -> list[PackedBatch]:
        """Packs a step's units into rows, a micro-batch each."""
        rows = pack(
            units,
            # A row may be longer than the longest sample: long rows pad less.
            max_tokens=self.data.row_tokens or self.data.max_tokens,
            max_tiles=self.data.max_tiles,
            weighting=self.config.weighting,
            packing=self.data.packing,
            num_buffers=self.data.packing_buffers,
            branches=self.data.share_prefix,
            overflow_id=self.encoder.context_id if self.data.allow_overflow else None,
        )
        return self._checked(rows)

    def pieces(self, units: Sequence[Unit]) -> list[Unit]:
        """Cuts units that exceed a row."""
        most = (self.data.row_tokens or self.data.max_tokens, self.data.max_tiles)
        return [piece for unit in units for piece in split_unit(unit, *most)]

    def rows(self, groups: Sequence[Sequence[Unit]]) -> list[PackedBatch]:
        """Makes the batches of units that are grouped to rows already."""
        branches = self.data.share_prefix
        return self._checked(build_rows(groups, self.config.weighting, branches=branches))

    def _checked(self, rows: list[PackedBatch]) -> list[PackedBatch]:
        """Returns the rows with the recipe's loss weights, their placeholders checked."""
        for row in rows:
            self._check_placeholders(row)
        # The original averages each micro-batch by itself: a token of a short row weighs more.
        if self.config.loss_normalization == "micro_batch":
            return [replace(row, loss_weights=_sums_to_one(row.loss_weights)) for row in rows]
        return rows

    def _check_placeholders(self, row: PackedBatch) -> None:
        placeholders = int((row.input_ids == self.encoder.context_id).sum())
        visual = row.num_tiles * self.encoder.tokens_per_tile
        # Only the encoder writes placeholders, so no data can cause this.
        assert placeholders == visual, (
            f"{row.names}: {placeholders} placeholders, {visual} visual tokens"
        )

    def describe(self, batches: Sequence[PackedBatch]) -> str:
        """See `Objective.describe`."""
        tokens, tiles = sum(b.num_tokens for b in batches), sum(b.num_tiles for b in batches)
        supervised = sum(len(batch.targets) for batch in batches)
        samples = sum(batch.num_samples for batch in batches)
        lines = [
            f"{counted(samples, 'sample')} in {counted(len(batches), 'row')}, {tokens:,} tokens, "
            f"{supervised / max(1, tokens):.1%} of them supervised, {counted(tiles, 'tile')}"
        ]
        for example in islice((e for batch in batches for e in unpack(batch)), _SHOWN_SAMPLES):
            text = marked(spans(example, self.encoder))
            lines.append(f"{example.name} (⟦supervised⟧)\n{text}")
        return "\n".join(lines)

    def warmup_batches(self, lengths: Sequence[int]) -> list[PackedBatch]:
        """Makes a row with at most two tiles and one without for every length."""
        per_tile = self.encoder.tokens_per_tile
        # Two stand for any number of tiles: sizes are dynamic. Minus the supervised last token.
        most = {length: min(2, (length - 1) // per_tile) for length in lengths}
        # Without tiles the embeddings may need no gradient, which is another graph.
        return [self._synthetic(length, tiles) for length in lengths for tiles in {most[length], 0}]

    def empty_batch(self, lengths: Sequence[int]) -> PackedBatch:
        """See `Objective.empty_batch`; its row has a black tile and a target at weight 0."""
        length = min(lengths, default=self.encoder.tokens_per_tile + 1)
        row = self._synthetic(length, min(1, (length - 1) // self.encoder.tokens_per_tile))
        return replace(row, loss_weights=torch.zeros_like(row.loss_weights), names=())

    def _synthetic(self, length: int, num_tiles: int) -> PackedBatch:
        """Makes a row of `length` tokens with `num_tiles` black tiles and one supervised token."""
        ids = np.zeros(length, dtype=np.int64)
        ids[: num_tiles * self.encoder.tokens_per_tile] = self.encoder.context_id
        labels = np.full(length, IGNORE, dtype=np.int64)
        labels[-1] = 0
        side = self.data.tiling.size
        tiles = torch.zeros(num_tiles, 3, side, side, dtype=torch.uint8) if num_tiles else None
        example = Example(f"made-up row of {length} tokens", ids, labels)
        (row,) = pack(
            [Unit((example,), 0, tiles)],
            max_tokens=length,
            max_tiles=num_tiles,
            branches=self.data.share_prefix,
        )
        return row

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """See `Objective.counts`."""
        return {"sft": float(batch.loss_weights.sum())}

    def begin_step(
        self, model: Any, batches: Iterator[PackedBatch], counts: Mapping[str, float]
    ) -> None:
        """Does nothing: a row's loss needs no other row."""

    def __call__(self, model: Any, batch: PackedBatch) -> dict[str, Tensor]:
        """See `Objective.__call__`."""
        return {"sft": summed_loss(model, batch, self.data.statistics)}


def _sums_to_one(weights: Tensor) -> Tensor:
    # A row may have nothing supervised, and then no weights: their sum would divide by zero.
    return weights / weights.sum() if len(weights) else weights
