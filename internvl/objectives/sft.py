"""Supervised fine-tuning: next-token loss on the answers of packed rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor

from internvl.config import DataConfig, SftConfig
from internvl.data.chat import ChatEncoder, marked, spans
from internvl.data.packing import build_rows, unpack
from internvl.data.records import PackedBatch, Unit
from internvl.errors import counted
from internvl.objectives.packed import PackedObjective
from internvl.objectives.packed_loss import summed_loss

_SHOWN_SAMPLES = 2


class Sft(PackedObjective):
    """One term, `sft`, averaged over supervised tokens with the recipe's weighting.

    With `loss_normalization: micro_batch` it is averaged over rows, whose weights then sum to one.

    Original: `InternVLChatModel.forward` with `loss_weight`, `dataset_packed.py`.
    """

    def __init__(self, config: SftConfig, data: DataConfig, encoder: ChatEncoder) -> None:
        super().__init__(data, encoder)
        self.config = config
        self.weights = {"sft": 1.0}

    def build(self, groups: Sequence[Sequence[Unit]]) -> list[PackedBatch]:
        """See `PackedObjective.build`."""
        rows = build_rows(groups, self.config.weighting, branches=self.data.share_prefix)
        for row in rows:
            self.check_placeholders(row)
        # The original averages each micro-batch by itself: a token of a short row weighs more.
        if self.config.loss_normalization == "micro_batch":
            return [replace(row, loss_weights=_sums_to_one(row.loss_weights)) for row in rows]
        return rows

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

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """See `Objective.counts`."""
        # Weights, not tokens: by `weighting` a token may count for less than one.
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
