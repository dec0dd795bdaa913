"""Mixed preference optimization: preference, quality and generation losses on pairs of answers.

Wang et al. 2024, arXiv:2411.10442. A pair is one document of a packed row: image and question once,
the chosen and the rejected answer as branches, so the tower and the prompt are computed once.

With exact delta a first pass without graph computes the rewards of all rows of the step. Both
passes draw the same random numbers, so the loss equals that of one large batch. The first row comes
last in the first pass and keeps its graph: it is not computed twice.

Shapes: P pairs of a row; index 0 of a pair is the chosen answer, index 1 the rejected one.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from internvl import dist, log
from internvl.config import DataConfig, MpoConfig
from internvl.data.chat import ChatEncoder, marked, spans
from internvl.data.packing import build_rows, common_prefix
from internvl.data.records import IGNORE, Example, Message, PreferenceBatch, Sample, Tiles, Unit
from internvl.errors import BadSample, RunError, counted
from internvl.objectives.packed import PackedObjective
from internvl.objectives.packed_loss import answer_losses, repeated_visual
from internvl.objectives.pair_losses import PAIR_LOSSES, Rewards
from internvl.objectives.passes import discard_saved_tensors, seeded
from internvl.objectives.reference import REFERENCES, Reference
from internvl.objectives.run_start import RunStart

_SHOWN_PAIRS = 2
_MOST_VISUAL_BYTES = 2**30
"""Of visual tokens that wait between the two passes of a step."""


@dataclass(frozen=True)
class _CachedRow:
    """A row between the two passes."""

    seed: int | None
    """Random seed of both passes; None if the graph of the first one is kept."""
    reference: Tensor
    """float32 (P, 2)"""
    logps: Tensor | None
    """(P, 2) with their graph, of the row that is not computed twice."""
    visual: Tensor | None
    """(V, D) for the second pass, if both passes have the same."""


class Mpo(PackedObjective):
    """One term for each loss of `pair_losses`, averaged over pairs, and `sft` on chosen answers.

    Original: `trainer_dpo.py` and `internvl_chat_mpo.py`. Unlike there, delta takes one update per
    step, whatever the number of ranks and rows, and is part of a checkpoint.
    """

    synthetic_answers = 2

    def __init__(self, config: MpoConfig, data: DataConfig, encoder: ChatEncoder) -> None:
        super().__init__(data, encoder)
        self.config = config
        self.weights = config.term_weights
        self.delta = RunningMean()
        self.watch = Watch(config)
        self.reference: Reference | None = None
        self._next_delta = self.delta
        self._cached: deque[_CachedRow] = deque()
        self._measured: list[Tensor] = []
        """Log-probabilities of policy and reference, (P, 2, 2), of every row of this step."""

    def encode(self, samples: Sequence[Sample], tiles: Tiles | None) -> list[Unit | BadSample]:
        """Encodes pairs of the same images to a unit each; the bad ones follow."""
        units, bad = [], []
        for sample in samples:
            try:
                units.append(self._encode(sample, tiles))
            except BadSample as error:
                bad.append(error)
        return [*units, *bad]

    def _encode(self, sample: Sample, tiles: Tiles | None) -> Unit:
        if sample.rejected is None:
            raise BadSample(
                sample.name,
                "it has no rejected answer; write `question`, `chosen` and `rejected`",
            )
        per_image = () if tiles is None else tiles.per_image
        # Both as whole conversations: a token may span the border of question and answer.
        worse = (*sample.messages[:-1], Message("assistant", sample.rejected))
        chosen = self._answer(sample, per_image, "chosen")
        rejected = self._answer(replace(sample, messages=worse), per_image, "rejected")
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            raise BadSample(
                sample.name, "its chosen and rejected answers are equal; change or remove one"
            )
        # Of text alone as well: a long question is computed once.
        prefix = common_prefix((chosen, rejected))
        unit = Unit((chosen, rejected), prefix, None if tiles is None else tiles.pixels)
        limit = self.data.row_tokens or self.data.max_tokens
        if unit.num_tokens > limit:
            raise BadSample(
                sample.name,
                f"{unit.num_tokens} tokens with both answers, but a row takes {limit}; raise "
                "data.row_tokens or lower data.tiles.max",
                {"data.row_tokens": unit.num_tokens},
            )
        return unit

    def _answer(self, sample: Sample, per_image: tuple[int, ...], which: str) -> Example:
        """Encodes a conversation of which the last answer alone is supervised.

        Raises:
            BadSample: besides what `ChatEncoder.encode` refuses, an answer that would be cut.
        """
        try:
            example = self.encoder.encode(sample, per_image)
        except BadSample as error:
            raise BadSample(sample.name, f"with its {which} answer: {error.reason}") from None
        most, length = self.data.max_tokens, len(example.input_ids)
        # The original cuts each branch by itself, and so compares answers of different tasks.
        if length > most:
            raise BadSample(
                sample.name,
                f"{length} tokens with its {which} answer, which data.max_tokens = {most} would "
                "cut; raise data.max_tokens or lower data.tiles.max",
                {"data.max_tokens": length},
            )
        labels = example.labels.copy()
        unsupervised = np.flatnonzero(labels == IGNORE)
        answers = np.flatnonzero(labels != IGNORE)
        # Earlier answers are part of the question: both branches share them.
        before = unsupervised[unsupervised < answers[-1]]
        labels[: before[-1] + 1 if len(before) else 0] = IGNORE
        return replace(example, labels=labels)

    def rows(self, groups: Sequence[Sequence[Unit]]) -> list[PreferenceBatch]:
        """See `PackedObjective.rows`; attaches what is stored of the pairs."""
        rows = self.build(groups)
        return rows if self.reference is None else list(map(self.reference.attach, rows))

    def batches(self, units: Sequence[Unit]) -> Sequence[PreferenceBatch]:
        """See `PackedObjective.batches`."""
        return cast(Sequence[PreferenceBatch], super().batches(units))

    def build(self, groups: Sequence[Sequence[Unit]]) -> list[PreferenceBatch]:
        """See `PackedObjective.build`."""
        # Always branches, whatever data.share_prefix says about several pairs of an image.
        packed = build_rows(groups, "token", branches=True)
        rows = []
        for row, units in zip(packed, groups, strict=True):
            self.check_placeholders(row)
            lengths = [[_num_targets(example) for example in unit.examples] for unit in units]
            counts = torch.tensor(lengths, dtype=torch.long).view(-1, 2)
            paired = PreferenceBatch(
                **{**vars(row), "names": row.names[::2]},
                answers=torch.repeat_interleave(counts.flatten()),
                lengths=counts.float(),
                # A digest of megabytes of pixels, only where it is looked up.
                contents=tuple(map(_content, units)) if self._uses_contents else (),
            )
            rows.append(paired)
        return rows

    @property
    def _uses_contents(self) -> bool:
        return self.reference is None or self.reference.by_content

    def synthetic_unit(self, example: Example, tiles: Tensor | None) -> Unit:
        """See `PackedObjective.synthetic_unit`; two answers of a token, as long as `example`."""
        answers = [example.input_ids[:-1].copy() for _ in range(2)]
        labels = example.labels[1:].copy()
        for token, ids in enumerate(answers):
            ids[-1] = token
        pair = tuple(
            Example(example.name, ids, np.where(labels == IGNORE, IGNORE, ids)) for ids in answers
        )
        return Unit(pair, len(labels) - 1, tiles)

    def empty_batch(self, lengths: Sequence[int]) -> PreferenceBatch:
        """See `Objective.empty_batch`; its targets are in the sum of no pair."""
        row = super().empty_batch(lengths)
        assert isinstance(row, PreferenceBatch)
        return replace(row, lengths=row.lengths[:0], contents=(), reference=None)

    def describe(self, batches: Sequence[PreferenceBatch]) -> str:
        """See `Objective.describe`."""
        tokens, tiles = sum(b.num_tokens for b in batches), sum(b.num_tiles for b in batches)
        pairs = sum(batch.num_samples for batch in batches)
        lines = [
            f"{counted(pairs, 'pair')} in {counted(len(batches), 'row')}, {tokens:,} tokens, "
            f"{counted(tiles, 'tile')}"
        ]
        shown = chain.from_iterable(map(self._answers, batches))
        for name, chosen, rejected in islice(shown, _SHOWN_PAIRS):
            lines.append(f"{name} (⟦chosen⟧, then ⟦rejected⟧)\n{chosen}\n{rejected}")
        return "\n".join(lines)

    def _answers(self, row: PreferenceBatch) -> Iterator[tuple[str, str, str]]:
        """Yields (name, question with the chosen answer, rejected answer) of every pair."""
        ids, document, branch = row.input_ids[0], row.document, row.branch
        for index, name in enumerate(row.names):
            texts = []
            for answer in (1, 2):
                shown = (document == index) & ((branch == answer) | ((branch == 0) & (answer == 1)))
                positions = row.loss_positions[row.answers == 2 * index + answer - 1]
                first = int(torch.nonzero((document == index) & (branch == answer))[0])
                # The last token of the question predicts the first one of either answer.
                targets = torch.where(branch[positions] == 0, first, positions + 1)
                labels = torch.full_like(ids, IGNORE)
                labels[targets] = ids[targets]
                example = Example(name, ids[shown].numpy(), labels[shown].numpy())
                texts.append(marked(spans(example, self.encoder)))
            yield name, texts[0], texts[1]

    def shown_spans(self, unit: Unit) -> Iterator[tuple[str, bool]]:
        """See `PackedObjective.shown_spans`; the rejected answer follows the chosen one."""
        chosen, rejected = unit.examples
        yield from spans(chosen, self.encoder)
        yield "\nrejected: ", False
        branch = slice(unit.prefix, None)
        ids, labels = rejected.input_ids[branch], rejected.labels[branch]
        yield from spans(Example(rejected.name, ids, labels), self.encoder)

    def counts(self, batch: PreferenceBatch) -> dict[str, float]:
        """See `Objective.counts`."""
        pairs = float(batch.num_samples)
        tokens = float(batch.lengths[:, 0].sum())
        by_pair = self.config.normalize == "pairs"
        return {term: tokens if term == "sft" and not by_pair else pairs for term in self.weights}

    def begin_run(self, start: RunStart) -> None:
        """See `Objective.begin_run`; computes or loads the reference."""
        reference = REFERENCES[start.reference](self.logps)

        def make_rows(units: Sequence[Unit] | None = None) -> Sequence[PreferenceBatch]:
            return [self.empty_batch(())] if units is None else self.batches(units)

        reference.begin_run(start, make_rows)
        self.reference = reference

    def begin_step(
        self, model: Any, batches: Iterator[PreferenceBatch], counts: Mapping[str, float]
    ) -> None:
        """Runs the first pass if delta is exact and some term needs it."""
        # A step before may have ended early, out of memory say.
        self._cached.clear()
        self._measured.clear()
        self._next_delta = self.delta
        if "bco" not in self.weights or self.config.delta == "lagged":
            return
        # Last, so that no other forward pass comes between its own and its backward pass.
        first = next(batches, None)
        measured = []
        free_bytes = _MOST_VISUAL_BYTES
        for row in batches:
            device = row.input_ids.device
            seed = int(torch.randint(2**62, ()))
            visual = self._visual(model, row)
            with discard_saved_tensors(), seeded(seed, device):
                logps = self.logps(model, row, visual).detach()
            reference = self._reference_logps(model, row, visual)
            free_bytes -= 0 if visual is None else visual.nbytes
            self._cached.append(
                _CachedRow(seed, reference, None, visual if free_bytes >= 0 else None)
            )
            measured.append((logps, reference))
        if first is not None:
            visual = self._visual(model, first)
            reference = self._reference_logps(model, first, visual)
            logps = self.logps(model, first, visual)
            self._cached.appendleft(_CachedRow(None, reference, logps, None))
            measured.insert(0, (logps.detach(), reference))
        self._next_delta = self.delta.updated(self._mean_reward(measured))

    def _mean_reward(self, measured: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Returns the mean reward of all answers, over all ranks."""
        ratios = [(logps - reference).double().sum() for logps, reference in measured]
        total = float(torch.stack(ratios).sum()) if ratios else 0.0
        answers = sum(logps.numel() for logps, _ in measured)
        # One update a step, whatever the ranks; the original has one for each micro-batch.
        sums = dist.sum_counts({"rewards": self.config.beta * total, "answers": answers})
        return sums["rewards"] / sums["answers"] if sums["answers"] else math.nan

    def __call__(self, model: Any, batch: PreferenceBatch) -> dict[str, Tensor]:
        """Returns the sum of each term, float32 ()."""
        cached = self._cached.popleft() if self._cached else None
        if cached is None:
            visual = self._visual(model, batch)
            reference = self._reference_logps(model, batch, visual)
            cached = _CachedRow(None, reference, None, visual)
        reference, logps = cached.reference, cached.logps
        if logps is None:
            with seeded(cached.seed, batch.input_ids.device):
                logps = self.logps(model, batch, cached.visual)
        self._measured.append(torch.stack([logps.detach(), reference], 1))
        return self._terms(logps, reference, batch.lengths)

    def _terms(self, logps: Tensor, reference: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Returns the sum of every term over pairs from log-probabilities (P, 2)."""
        rewards = replace(
            Rewards.of_logps(logps, reference, lengths, self.config.beta),
            delta=self._next_delta.mean,
            label_smoothing=self.config.label_smoothing,
        )
        # From the same log-probabilities: the chosen answers are not computed again.
        nll = -logps[:, 0]
        sft = (nll / lengths[:, 0]).sum() if self.config.normalize == "pairs" else nll.sum()
        return {
            term: sft if term == "sft" else PAIR_LOSSES[term](rewards).sum()
            for term in self.weights
        }

    def logps(self, model: Any, row: PreferenceBatch, visual: Tensor | None = None) -> Tensor:
        """Returns log-probabilities of the answers, float32 (P, 2), summed over tokens.

        Args:
            visual: the row's visual tokens (V, D), if they are computed already.
        """
        return -answer_losses(model, row, self.data.statistics, visual)

    def _visual(self, model: Any, row: PreferenceBatch) -> Tensor | None:
        # In training mode, as the policy's: the reference's would round otherwise where compiled.
        return repeated_visual(model, row, self.data.statistics)

    def _reference_logps(self, model: Any, row: PreferenceBatch, visual: Tensor | None) -> Tensor:
        # None before a run begins: the first rows compile blocks, and train nothing.
        if self.reference is None:
            return torch.zeros_like(row.lengths)
        return self.reference.logps(model, row, visual)

    def end_step(self, means: dict[str, float], applied: bool) -> dict[str, float]:
        """See `Objective.end_step`; returns rewards, accuracies and log-probabilities."""
        # The step's own transfer to the host is done by now, so this one waits for nothing.
        values = torch.cat(self._measured) if self._measured else torch.zeros(0, 2, 2)
        self._measured.clear()
        logps, reference = values.double().cpu().unbind(1)
        rewards = self.config.beta * (logps - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        # Sums over ranks of sums over pairs: the same however the step is cut.
        sums = dist.sum_counts(
            {
                "pairs": len(values),
                "rewards/chosen": float(rewards[:, 0].sum()),
                "rewards/rejected": float(rewards[:, 1].sum()),
                "rewards/accuracies": float((margins > 0).sum()),
                "rewards/margins": float(margins.sum()),
                "logps/chosen": float(logps[:, 0].sum()),
                "logps/rejected": float(logps[:, 1].sum()),
            }
        )
        pairs = sums.pop("pairs")
        measured = {name: value / pairs for name, value in sums.items()}
        if "bco" in self.weights and self.config.delta == "lagged":
            mean = (measured["rewards/chosen"] + measured["rewards/rejected"]) / 2
            self._next_delta = self.delta.updated(mean)
        used = self.delta if self.config.delta == "lagged" else self._next_delta
        if not self.watch.chosen:
            self._explain_first(means)
        # A step that the guard refused must leave no trace in later losses.
        if applied:
            self.delta = self._next_delta
            self.watch.step(measured)
        return measured | ({"delta": used.mean} if "bco" in self.weights else {})

    def _explain_first(self, means: Mapping[str, float]) -> None:
        """Logs the loss that a first step has by theory next to its own."""
        # Users take 1.5 to 2.0 for a fault, as nobody tells them that this much is constant.
        equal = Rewards.equal(self.config.beta, self.config.label_smoothing)
        constant = sum(
            weight * float(PAIR_LOSSES[term](equal))
            for term, weight in self.weights.items()
            if term != "sft"
        )
        loss = sum(weight * means[term] for term, weight in self.weights.items())
        nll = self.weights.get("sft", 0.0) * means.get("sft", 0.0)
        log.get_logger().info(
            "first loss %.4f; expected %.4f = %.4f of pairs whose rewards are all zero, as policy "
            "and reference are equal, + %.4f of the chosen answers",
            loss,
            constant + nll,
            constant,
            nll,
        )

    def state(self) -> dict[str, Any]:
        """See `Objective.state`."""
        return {"delta": self.delta.mean, "count": self.delta.count, **self.watch.state()}

    def restore(self, state: Any) -> None:
        """See `Objective.restore`. Raises RunError if it is damaged."""
        try:
            self.delta = RunningMean(float(state["delta"]), int(state["count"]))
            self.watch.restore(state)
        except (KeyError, TypeError, ValueError):
            raise RunError(
                "state.json of the newest checkpoint is damaged (`objective`); remove this "
                "checkpoint's folder to go on from the one before"
            ) from None


@dataclass(frozen=True)
class RunningMean:
    """Mean of the mean rewards of all steps so far; 0 before the first one."""

    mean: float = 0.0
    count: int = 0
    """Steps."""

    def updated(self, value: float) -> "RunningMean":
        """Returns the mean with one more step; one that is not finite does not count."""
        if not math.isfinite(value):
            return self
        return RunningMean(self.mean + (value - self.mean) / (self.count + 1), self.count + 1)


@dataclass
class Watch:
    """Notices the known failures of preference training, from the steps' metrics."""

    config: MpoConfig
    chosen: list[float] = field(default_factory=list)
    """Rewards of the chosen answers in the latest steps; `margins` and `accuracies` likewise."""
    margins: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    """Failures that were reported, each once in a run."""

    def step(self, measured: Mapping[str, float]) -> None:
        """Takes in a step; reports a failure as the recipe says.

        Raises:
            RunError: with `watch: stop`.
        """
        most = 2 * self.config.watch_steps
        # New lists: `state` has handed out the old ones.
        self.chosen = [*self.chosen, measured["rewards/chosen"]][-most:]
        self.margins = [*self.margins, measured["rewards/margins"]][-most:]
        self.accuracies = [*self.accuracies, measured["rewards/accuracies"]][-most:]
        if self.config.watch == "off" or len(self.chosen) < most:
            return
        for failure, sentence in self._failures():
            if failure in self.warned:
                continue
            self.warned = [*self.warned, failure]
            if self.config.watch == "stop":
                raise RunError(f"{sentence}, or set objective.watch=warn to go on")
            log.get_logger().warning("%s", sentence)

    def _failures(self) -> Iterator[tuple[str, str]]:
        """Yields (name, sentence with remedy)."""
        steps = self.config.watch_steps
        (chosen_before, chosen), (margin_before, margin) = (
            (fmean(values[:steps]), fmean(values[steps:])) for values in (self.chosen, self.margins)
        )
        # Both failures are of training that goes on: a margin at rest says nothing.
        if margin <= margin_before:
            return
        if chosen < min(chosen_before, 0.0):
            yield (
                "chosen",
                f"the chosen answers become less probable (reward {chosen_before:.3g}, now "
                f"{chosen:.3g}) while the margin grows ({margin_before:.3g}, now {margin:.3g}): "
                "raise objective.weights.sft or objective.beta, or lower optim.lr",
            )
        if min(self.accuracies[steps:]) == 1.0:
            yield (
                "accuracy",
                f"all pairs of the last {counted(steps, 'step')} were right and the margin still "
                f"grows ({margin_before:.3g}, now {margin:.3g}), so the pairs are learned by "
                "heart: end the run here, take harder pairs, or lower optim.lr",
            )

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as plain values."""
        names = ("chosen", "margins", "accuracies", "warned")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Any) -> None:
        """Restores what `state` returned; wrong values raise what reading them raises."""
        for name in ("chosen", "margins", "accuracies"):
            setattr(self, name, [float(value) for value in state[name]])
        self.warned = [str(value) for value in state["warned"]]


def _num_targets(example: Example) -> int:
    """Counts the supervised tokens of an example that another token predicts."""
    return int((example.labels[1:] != IGNORE).sum())


def _content(unit: Unit) -> str:
    """Returns a digest of all that decides the log-probabilities of a pair."""
    digest = hashlib.blake2b(digest_size=12)
    for example in unit.examples:
        digest.update(np.int64(len(example.input_ids)).tobytes())
        digest.update(np.ascontiguousarray(example.input_ids).tobytes())
        digest.update(np.ascontiguousarray(example.labels).tobytes())
    if unit.tiles is not None:
        digest.update(unit.tiles.numpy().tobytes())
    return digest.hexdigest()
