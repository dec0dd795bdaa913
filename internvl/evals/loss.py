"""The loss on samples that are held out: what training minimizes, without generating anything."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from internvl.compute import compilation, feeding
from internvl.config import DataConfig, LossEval, SourceConfig
from internvl.data.images import FileSlice
from internvl.data.loader import Read, UnitReader
from internvl.data.packing import encode_units, pack
from internvl.data.pair_files import broken
from internvl.data.records import Sample
from internvl.data.sampler import UnitRef
from internvl.data.sources import open_source
from internvl.errors import BadSample, UserError
from internvl.evals.scores import EvalScores, left_out, settle
from internvl.log import Progress
from internvl.models import configs
from internvl.models.attention import packed
from internvl.objectives.packed_loss import summed_loss

_TOGETHER = 256  # samples that are packed at once
_TILES = 48  # most tiles of a row, unless a sample has more

_REMEDY = "put them right, or set on_bad_sample to skip to leave them out"


class Loss:
    """Mean next-token loss over the supervised tokens of all samples, in nats, every time the same.

    Data: chat JSONL as training reads it, or with `prompt` captions in any form of
    data/captions.py. Template, tiling and normalization are the model's.

    Raises:
        UserError: the file is missing, holds nothing of that kind, or has bad samples or images.
    """

    def __init__(self, config: LossEval) -> None:
        self.config = config
        kind: Literal["chat", "captions"] = "chat" if config.prompt is None else "captions"
        self.source = open_source(
            SourceConfig(
                name="held out",
                type=kind,
                annotations=config.annotations,
                images=config.images,
                prompt=config.prompt,
                insert_image_mark=True,
            )
        )
        self.lines = range(min(len(self.source), config.limit or len(self.source)))
        if config.on_bad_sample == "raise":
            settle(self._problems(), "raise", _REMEDY)

    def _problems(self) -> list[BadSample]:
        """What is wrong with the samples and their images, before any model is there."""
        problems: list[BadSample] = []
        shown: dict[str | FileSlice, str] = {}  # image -> first sample that shows it
        for sample in self.source.samples(self.lines):
            if isinstance(sample, BadSample):
                problems.append(sample)
                continue
            for image in sample.images:
                if not isinstance(image, bytes):
                    shown.setdefault(
                        image if isinstance(image, FileSlice) else str(image), sample.name
                    )
        images = list(shown)
        unreadable = broken(images)
        return problems + [
            BadSample(shown[images[number]], f"{images[number]}: {reason}")
            for number, reason in unreadable.items()
        ]

    def images(self) -> Sequence[str]:
        """Every image that will be opened."""
        samples = self.source.samples(self.lines)
        read = (sample for sample in samples if isinstance(sample, Sample))
        return [str(image) for sample in read for image in sample.images]

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        return {"samples": len(self.lines)}

    def run(self, handle: Any, folder: Path | None) -> EvalScores:
        """Measures a Chat."""
        handle = handle.as_chat("an evaluation of type loss")
        model, bad = handle.model, list[BadSample]()
        settings = configs.chat_settings(model.config)
        data = DataConfig(
            tiles=handle.tiles,
            normalize=settings["normalize"],
            exif=settings["exif"],
            max_tokens=self.config.max_tokens,
            max_tiles=max(_TILES, 2 * handle.tiles.max),
        )
        # FlexAttention is only itself when compiled, and then for one length of rows.
        flex = model.config.text_config._attn_implementation in (packed.FLEX, packed.FLASH)
        blocks = -(-data.max_tokens // packed.BLOCK)
        lengths = (blocks * packed.BLOCK,) if flex else ()
        total = count = 0.0
        with ExitStack() as inside, Progress("samples", total=len(self.lines)) as progress:
            inside.enter_context(torch.no_grad())
            if flex:
                inside.enter_context(compilation.compiled())
            for read, num_lines in self._reads(data, handle.encoder):
                bad += read.bad
                rows = pack(read.units, max_tokens=data.max_tokens, max_tiles=data.max_tiles)
                for row in rows:
                    on_device = feeding.pad(row, lengths).to(model.device)
                    total += float(summed_loss(model, on_device, data.statistics))
                    count += len(row.targets)
                progress.update(num_lines)
        policy = "skip" if self.config.on_bad_sample != "raise" else "raise"
        settle(bad, policy, _REMEDY)
        if not count:
            raise UserError(f"{self.config.annotations} holds no sample with an answer")
        return EvalScores({"loss": total / count}, left_out(bad))

    def _reads(self, data: DataConfig, encoder: Any) -> Iterator[tuple[Read, int]]:
        """Samples in the order of the file, those of an image together."""

        def encode(samples: Any, tiles: Any) -> Any:
            return encode_units(encoder, samples, tiles, data.max_tokens, share=True)

        reader = UnitReader([self.source], data, encode)
        for start in range(0, len(self.lines), _TOGETHER):
            lines = tuple(self.lines[start : start + _TOGETHER])
            yield reader[UnitRef(0, lines, 0, start)], len(lines)
