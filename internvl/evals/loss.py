"""Loss on held-out samples: what training minimizes, without generating anything."""

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
from internvl.evals.scores import EvalScores, raise_or_log, skipped_rows
from internvl.log import Progress
from internvl.models import configs
from internvl.models.attention import packed
from internvl.objectives.packed_loss import summed_loss

_CHUNK_SAMPLES = 256  # samples that are packed together; their tiles are in memory at once
_ROW_TILES = 48  # most tiles of a row, unless a sample has more

_REMEDY = "put them right, or set on_bad_sample to skip to leave them out"


class Loss:
    """Mean next-token loss over the supervised tokens of all samples, in nats; deterministic.

    Data: chat JSONL as training reads it, or with `prompt` captions in any form of
    data/captions.py. Template, tiling and normalization are the model's.

    Raises:
        UserError: the file is missing, holds nothing of that type, or has bad samples or images.
    """

    def __init__(self, config: LossEval) -> None:
        self.config = config
        source_type: Literal["chat", "captions"] = "chat" if config.prompt is None else "captions"
        self.source = open_source(
            SourceConfig(
                name="held out",
                type=source_type,
                annotations=config.annotations,
                images=config.images,
                prompt=config.prompt,
                # As the original's data does; without it such a sample would be a bad one.
                insert_image_mark=True,
            )
        )
        self.lines = range(min(len(self.source), config.limit or len(self.source)))
        # Other policies meet bad samples in `run`, which reads every sample anyhow.
        if config.on_bad_sample == "raise":
            raise_or_log(self._problems(), "raise", _REMEDY)

    def _problems(self) -> list[BadSample]:
        """Returns the problems of samples and images, without a model."""
        problems: list[BadSample] = []
        first_samples: dict[str | FileSlice, str] = {}  # image -> first sample that shows it
        for sample in self.source.samples(self.lines):
            if isinstance(sample, BadSample):
                problems.append(sample)
                continue
            for image in sample.images:
                if not isinstance(image, bytes):
                    first_samples.setdefault(
                        image if isinstance(image, FileSlice) else str(image), sample.name
                    )
        images = list(first_samples)  # each decoded once, however many samples show it
        unreadable = broken(images)
        return problems + [
            BadSample(first_samples[images[index]], f"{images[index]}: {reason}")
            for index, reason in unreadable.items()
        ]

    def images(self) -> Sequence[str]:
        """Returns every image that will be opened."""
        samples = self.source.samples(self.lines)
        readable = (sample for sample in samples if isinstance(sample, Sample))
        return [str(image) for sample in readable for image in sample.images]

    def counts(self) -> dict[str, int]:
        """See `Evaluator.counts`."""
        return {"samples": len(self.lines)}

    def table(self) -> None:
        """See `Evaluator.table`."""

    def run(self, handle: Any, folder: Path | None) -> EvalScores:
        """Measures a Chat; `folder` is not used."""
        handle = handle.as_chat("an evaluation of type loss")
        model, bad = handle.model, list[BadSample]()
        settings = configs.chat_settings(model.config)
        data = DataConfig(
            tiles=handle.tiles,
            normalize=settings["normalize"],
            exif=settings["exif"],
            max_tokens=self.config.max_tokens,
            max_tiles=max(_ROW_TILES, 2 * handle.tiles.max),
        )
        # FlexAttention is only itself when compiled, and then for one length of rows.
        flex = model.config.text_config._attn_implementation in (packed.FLEX, packed.FLASH)
        blocks = -(-data.max_tokens // packed.BLOCK)
        lengths = (blocks * packed.BLOCK,) if flex else ()
        total = count = 0.0  # Python floats: a float32 sum over a million tokens would round
        with ExitStack() as contexts, Progress("samples", total=len(self.lines)) as progress:
            contexts.enter_context(torch.no_grad())
            if flex:
                contexts.enter_context(compilation.compiled())
            for read, num_lines in self._reads(data, handle.encoder):
                bad += read.bad
                rows = pack(read.units, max_tokens=data.max_tokens, max_tiles=data.max_tiles)
                for row in rows:
                    on_device = feeding.pad(row, lengths).to(model.device)
                    total += float(summed_loss(model, on_device, data.statistics))
                    count += len(row.targets)
                progress.update(num_lines)
        policy = "skip" if self.config.on_bad_sample != "raise" else "raise"
        raise_or_log(bad, policy, _REMEDY)
        if not count:
            raise UserError(f"{self.config.annotations} holds no sample with an answer")
        return EvalScores({"loss": total / count}, skipped_rows(bad))

    def _reads(self, data: DataConfig, encoder: Any) -> Iterator[tuple[Read, int]]:
        """Yields (encoded samples, number of lines) in the order of the file."""

        # share=True: samples of one image become one unit, and its tiles are encoded once.
        def encode(samples: Any, tiles: Any) -> Any:
            return encode_units(encoder, samples, tiles, data.max_tokens, share=True)

        reader = UnitReader([self.source], data, encode)
        for start in range(0, len(self.lines), _CHUNK_SAMPLES):
            lines = tuple(self.lines[start : start + _CHUNK_SAMPLES])
            yield reader[UnitRef(0, lines, 0, start)], len(lines)
