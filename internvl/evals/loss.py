"""Loss on held-out samples: what training minimizes, without generating anything."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from internvl import dist
from internvl.compute import compilation, feeding
from internvl.config import DataConfig, LossEval, SourceConfig
from internvl.data.loader import Read, UnitReader
from internvl.data.packing import encode_units, pack
from internvl.data.records import Example, PackedBatch, Unit
from internvl.data.sampler import UnitRef
from internvl.errors import BadSample, UserError
from internvl.evals import sharing
from internvl.evals.held_out import ROW_TILES, HeldOut
from internvl.evals.scores import (
    EvalScores,
    skipped_rows,
)
from internvl.models import configs
from internvl.models.attention import packed
from internvl.objectives.packed_loss import summed_loss
from internvl.parallel import lockstep


class Loss(HeldOut):
    """Mean next-token loss over the supervised tokens of all samples, in nats; deterministic.

    Data: chat JSONL as training reads it, or with `prompt` captions in any form of
    data/captions.py. Template, tiling and normalization are the model's.

    Raises:
        UserError: the file is missing, holds nothing of that type, or has bad samples or images.
    """

    def __init__(self, config: LossEval) -> None:
        self.config = config
        source_type: Literal["chat", "captions"] = "chat" if config.prompt is None else "captions"
        source = SourceConfig(
            name="held out",
            type=source_type,
            annotations=config.annotations,
            images=config.images,
            prompt=config.prompt,
            # As the original's data does; without it such a sample would be a bad one.
            insert_image_mark=True,
        )
        super().__init__(config, source)

    def run(self, handle: Any, folder: Path | None) -> EvalScores | None:
        """Measures a Chat; `folder` is not used."""
        handle = handle.as_chat("an evaluation of type loss")
        settings = configs.chat_settings(handle.model.config)
        data = DataConfig(
            tiles=handle.tiles,
            normalize=settings["normalize"],
            exif=settings["exif"],
            max_tokens=self.config.max_tokens,
            max_tiles=max(ROW_TILES, 2 * handle.tiles.max),
        )
        chunks = self.chunks()
        # FlexAttention is only itself when compiled, and then for one length of rows.
        flex = handle.model.config.text_config._attn_implementation in (packed.FLEX, packed.FLASH)
        blocks = -(-data.max_tokens // packed.BLOCK)
        lengths = (blocks * packed.BLOCK,) if flex else ()
        work = sharing.Work(
            "samples",
            self._reader(data, handle.encoder),
            lambda read: _sums(handle.model, read, data, lengths),
            in_step=lockstep.in_step(handle.model),
        )
        with ExitStack() as contexts:
            contexts.enter_context(torch.no_grad())
            if flex:
                contexts.enter_context(compilation.compiled())
            sums = work.run(chunks, sizes=[*map(len, chunks)])
        return dist.main_alone(lambda: self._score(sums))

    def _score(self, sums: Sequence["_Sums"]) -> EvalScores:
        """Computes the mean of all chunks."""
        bad = [problem for chunk in sums for problem in chunk.bad]
        self.leave_out(bad)
        count = sum(chunk.count for chunk in sums)
        if not count:
            raise UserError(f"{self.config.annotations} holds no sample with an answer")
        # Python floats: a float32 sum over a million tokens would round.
        total = sum(row for chunk in sums for row in chunk.rows)
        return EvalScores({"loss": total / count}, skipped_rows(bad))

    def _reader(self, data: DataConfig, encoder: Any) -> Callable[[range], Read]:
        """Returns what reads and encodes lines of the file."""

        # share=True: samples of one image become one unit, and its tiles are encoded once.
        def encode(samples: Any, tiles: Any) -> Any:
            return encode_units(encoder, samples, tiles, data.max_tokens, share=True)

        reader = UnitReader([self.source], data, encode)
        return lambda lines: reader[UnitRef(0, tuple(lines), 0, lines.start)]


@dataclass(frozen=True)
class _Sums:
    """What a chunk adds to the loss."""

    rows: list[float]
    """Summed loss of each packed row."""
    count: int
    """Supervised tokens."""
    bad: list[BadSample]


def _sums(model: Any, read: Read, data: DataConfig, lengths: tuple[int, ...]) -> _Sums:
    """Packs the samples of a chunk and sums their loss; rows are padded to one of `lengths`."""
    rows = pack(read.units, max_tokens=data.max_tokens, max_tiles=data.max_tiles)
    # Where every forward waits for all ranks, each runs as many rows as the fullest chunk has.
    fillers = lockstep.most(len(rows)) - len(rows) if lockstep.in_step(model) else 0
    losses = [
        float(summed_loss(model, feeding.pad(row, lengths).to(model.device), data.statistics))
        for row in [*rows, *[_empty_row(data)] * fillers]
    ]
    count = sum(len(row.targets) for row in rows)
    return _Sums(losses[: len(rows)], count, list(read.bad))


def _empty_row(data: DataConfig) -> PackedBatch:
    """Makes a row of two tokens whose loss counts for nothing."""
    ids = np.zeros(2, dtype=np.int64)
    unit = Unit((Example("no sample", ids, ids),), 0, None)
    (row,) = pack([unit], max_tokens=data.max_tokens, max_tiles=data.max_tiles)
    return row
