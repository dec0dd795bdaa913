"""Packed rows as micro-batches, for the objectives of chat models."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from internvl.config import DataConfig
from internvl.data.chat import ChatEncoder, spans
from internvl.data.loader import UnitReader
from internvl.data.packing import encode_units, pack_units, split_unit
from internvl.data.records import IGNORE, Example, PackedBatch, Sample, Tiles, Unit
from internvl.data.sources import Source
from internvl.errors import BadSample
from internvl.objectives.stateless import Stateless


class PackedObjective(Stateless, ABC):
    """Base of objectives whose micro-batches are packed rows of units."""

    synthetic_answers = 1
    """Supervised tokens at the end of a synthetic row."""

    def __init__(self, data: DataConfig, encoder: ChatEncoder) -> None:
        self.data = data
        self.encoder = encoder

    def reader(self, files: Sequence[Source], seed: int) -> UnitReader:
        """See `Objective.reader`."""
        return UnitReader(files, self.data, self.encode, seed=seed)

    def encode(self, samples: Sequence[Sample], tiles: Tiles | None) -> list[Unit | BadSample]:
        """Encodes samples of the same images to units; the bad ones follow."""
        return encode_units(
            self.encoder, samples, tiles, self.data.max_tokens, share=self.data.share_prefix
        )

    def batches(self, units: Sequence[Unit]) -> Sequence[PackedBatch]:
        """Packs a step's units into rows, a micro-batch each."""
        return self.rows(
            pack_units(
                units,
                # A row may be longer than the longest sample: long rows pad less.
                max_tokens=self.data.row_tokens or self.data.max_tokens,
                max_tiles=self.data.max_tiles,
                packing=self.data.packing,
                num_buffers=self.data.packing_buffers,
                overflow_id=self.encoder.context_id if self.data.allow_overflow else None,
            )
        )

    def pieces(self, units: Sequence[Unit]) -> list[Unit]:
        """Cuts units that exceed a row."""
        most = (self.data.row_tokens or self.data.max_tokens, self.data.max_tiles)
        return [piece for unit in units for piece in split_unit(unit, *most)]

    def rows(self, groups: Sequence[Sequence[Unit]]) -> Sequence[PackedBatch]:
        """Makes the batches of units that are grouped to rows already."""
        return self.build(groups)

    @abstractmethod
    def build(self, groups: Sequence[Sequence[Unit]]) -> Sequence[PackedBatch]:
        """Makes batches of units, which may be synthetic."""

    def shown_spans(self, unit: Unit) -> Iterator[tuple[str, bool]]:
        """Yields (text, supervised) of a unit's first example, for people."""
        return spans(unit.examples[0], self.encoder)

    def check_placeholders(self, row: PackedBatch) -> None:
        """Asserts that a row has as many placeholders as visual tokens."""
        placeholders = int((row.input_ids == self.encoder.context_id).sum())
        visual = row.num_tiles * self.encoder.tokens_per_tile
        # Only the encoder writes placeholders, so no data can cause this.
        assert placeholders == visual, (
            f"{row.names}: {placeholders} placeholders, {visual} visual tokens"
        )

    def warmup_batches(self, lengths: Sequence[int]) -> list[PackedBatch]:
        """Makes a row with at most two tiles and one without for every length."""
        per_tile = self.encoder.tokens_per_tile
        # Two stand for any number of tiles: sizes are dynamic. Minus the supervised last tokens.
        answers = self.synthetic_answers
        most = {length: min(2, (length - answers) // per_tile) for length in lengths}
        # Without tiles the embeddings may need no gradient, which is another graph.
        return [self.synthetic(length, tiles) for length in lengths for tiles in {most[length], 0}]

    def empty_batch(self, lengths: Sequence[int]) -> PackedBatch:
        """See `Objective.empty_batch`; its row has a black tile and a target at weight 0."""
        answers, per_tile = self.synthetic_answers, self.encoder.tokens_per_tile
        length = min(lengths, default=per_tile + answers)
        row = self.synthetic(length, min(1, (length - answers) // per_tile))
        return replace(row, loss_weights=torch.zeros_like(row.loss_weights), names=())

    def synthetic(self, length: int, num_tiles: int) -> PackedBatch:
        """Makes a row of `length` tokens with `num_tiles` black tiles and one supervised token."""
        ids = np.zeros(length, dtype=np.int64)
        ids[: num_tiles * self.encoder.tokens_per_tile] = self.encoder.context_id
        labels = np.full(length, IGNORE, dtype=np.int64)
        labels[-1] = 0
        side = self.data.tiling.size
        tiles = torch.zeros(num_tiles, 3, side, side, dtype=torch.uint8) if num_tiles else None
        # The name is in the message of an error in the warm-up.
        example = Example(f"made-up row of {length} tokens", ids, labels)
        (row,) = self.build([[self.synthetic_unit(example, tiles)]])
        return row

    def synthetic_unit(self, example: Example, tiles: torch.Tensor | None) -> Unit:
        """Makes the unit of a synthetic row."""
        return Unit((example,), 0, tiles)
