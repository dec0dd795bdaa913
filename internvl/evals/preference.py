"""Accuracy and margin on held-out preference pairs, without generating anything."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from internvl import dist
from internvl.compute import compilation, feeding
from internvl.config import DataConfig, MpoConfig, PreferenceEval, SourceConfig
from internvl.data.loader import Read, UnitReader
from internvl.data.sampler import UnitRef
from internvl.errors import BadSample, UserError
from internvl.evals import sharing
from internvl.evals.held_out import ROW_TILES, HeldOut
from internvl.evals.scores import EvalScores, skipped_rows
from internvl.inference import load as loading
from internvl.models import configs
from internvl.models.attention import packed
from internvl.models.trainable import adapters_off, has_adapters
from internvl.objectives.mpo import Mpo
from internvl.objectives.reference import evaluating
from internvl.parallel import lockstep

Logps = dict[tuple[str, str], tuple[float, float]]
"""(name, digest of the content) of a pair -> log-probabilities (chosen, rejected)."""


class Preference(HeldOut):
    """Share of pairs whose chosen answer has the higher reward, and the mean margin; deterministic.

    Rewards are those of `objective: mpo`: beta times the log-ratio to a reference, which is the
    model with its adapters off, `reference`, or nothing. Data: pairs as training reads them.

    Raises:
        UserError: see `HeldOut`.
    """

    def __init__(self, config: PreferenceEval) -> None:
        self.config = config
        self._reference: Logps | None = None
        source = SourceConfig(
            name="held out",
            type="preference",
            annotations=config.annotations,
            images=config.images,
            insert_image_mark=True,
        )
        super().__init__(config, source)

    def run(self, handle: Any, folder: Path | None) -> EvalScores | None:
        """Measures a Chat; `folder` is not used."""
        handle = handle.as_chat("an evaluation of type preference")
        objective = Mpo(MpoConfig(beta=self.config.beta), self._data(handle), handle.encoder)
        policy = self._measure(objective, handle.model)
        if has_adapters(handle.model):
            with adapters_off(handle.model):
                reference = self._measure(objective, handle.model)
        elif self.config.reference is None:
            reference = [_Chunk(dict.fromkeys(chunk.logps, (0.0, 0.0)), []) for chunk in policy]
        else:
            # Once: it is the same at every step, and a second model takes memory.
            if self._reference is None:
                self._reference = self._stored(objective, handle)
            reference = [_Chunk(self._reference, [])]
        return dist.main_alone(lambda: self._score(policy, reference))

    def _data(self, handle: Any) -> DataConfig:
        settings = configs.chat_settings(handle.model.config)
        return DataConfig(
            tiles=handle.tiles,
            normalize=settings["normalize"],
            exif=settings["exif"],
            max_tokens=self.config.max_tokens,
            row_tokens=2 * self.config.max_tokens,
            max_tiles=max(ROW_TILES, 2 * handle.tiles.max),
        )

    def _stored(self, objective: Mpo, handle: Any) -> Logps:
        model = handle.model
        loaded = loading.load(str(self.config.reference), device=model.device, dtype=model.dtype)
        chunks = self._measure(objective, loaded.as_chat("a reference").model)
        return {key: logps for chunk in chunks for key, logps in chunk.logps.items()}

    def _measure(self, objective: Mpo, model: Any) -> list["_Chunk"]:
        """Computes the log-probabilities of all pairs; [] on other ranks than rank 0."""
        # FlexAttention is only itself when compiled, and then for one length of rows.
        flex = model.config.text_config._attn_implementation in (packed.FLEX, packed.FLASH)
        blocks = -(-2 * self.config.max_tokens // packed.BLOCK)
        lengths = (blocks * packed.BLOCK,) if flex else ()
        chunks = self.chunks()
        work = sharing.Work(
            "pairs",
            self._reader(objective),
            lambda read: _compute(objective, model, read, lengths),
            in_step=lockstep.in_step(model),
        )
        with ExitStack() as contexts:
            contexts.enter_context(evaluating(model))
            if flex:
                contexts.enter_context(compilation.compiled())
            return work.run(chunks, sizes=[*map(len, chunks)])

    def _reader(self, objective: Mpo) -> Callable[[range], Read]:
        reader = UnitReader([self.source], objective.data, objective.encode)
        return lambda lines: reader[UnitRef(0, tuple(lines), 0, lines.start)]

    def _score(self, policy: Sequence["_Chunk"], reference: Sequence["_Chunk"]) -> EvalScores:
        bad = [problem for chunk in policy for problem in chunk.bad]
        self.leave_out(bad)
        under_reference = {key: logps for c in reference for key, logps in c.logps.items()}
        rows: list[dict[str, Any]] = []
        for (name, content), logps in ((k, v) for c in policy for k, v in c.logps.items()):
            pair = zip(logps, under_reference[name, content], strict=True)
            chosen, rejected = (self.config.beta * (ours - theirs) for ours, theirs in pair)
            measured = {
                "logp_chosen": logps[0],
                "logp_rejected": logps[1],
                "margin": chosen - rejected,
                "accuracy": float(chosen > rejected),
            }
            rows.append({"sample": name, **measured})
        if not rows:
            raise UserError(f"{self.config.annotations} holds no pair that can be measured")
        names = ("accuracy", "margin", "logp_chosen", "logp_rejected")
        values = {metric: fmean(row[metric] for row in rows) for metric in names}
        return EvalScores(values, [*rows, *skipped_rows(bad)])


@dataclass(frozen=True)
class _Chunk:
    """Log-probabilities of a chunk of pairs."""

    logps: Logps
    bad: list[BadSample]


def _compute(objective: Mpo, model: Any, read: Read, lengths: tuple[int, ...]) -> _Chunk:
    rows = list(objective.batches(read.units))
    # Where every forward waits for all ranks, each runs as many rows as the fullest chunk has.
    fillers = lockstep.most(len(rows)) - len(rows) if lockstep.in_step(model) else 0
    logps: Logps = {}
    pad: Callable[[Any], Any] = partial(feeding.pad, lengths=lengths)
    for row in [*rows, *[objective.empty_batch(())] * fillers]:
        values = objective.logps(model, pad(row).to(model.device)).tolist()
        for name, content, pair in zip(row.names, row.contents, values, strict=True):
            logps[name, content] = (pair[0], pair[1])
    return _Chunk(logps, list(read.bad))
