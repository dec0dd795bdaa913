"""Decisions from a run's evaluations: the best checkpoint, an early end, too much forgotten.

All of them follow from the files in the run's evals folder, so a resumed run decides alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internvl.config import EvalConfig, Recipe
from internvl.files import read_numbers

_REMEDY = "remove it; without it, its step counts as not measured"

History = Mapping[int, Mapping[str, float]]
"""Step -> metric -> value, ascending."""


@dataclass(frozen=True)
class Verdict:
    """Decisions after the evaluations of a step."""

    best: bool = False
    """No earlier step was better."""
    stop: str | None = None
    """Reason to end the run, or None."""
    forgotten: tuple[str, ...] = ()
    """One sentence for each metric that got worse than its guard allows, which ends the run."""
    warnings: tuple[str, ...] = ()
    """The same, for guards that only warn."""


def history(folder: Path, last: int) -> History:
    """Reads the evaluations in `folder` up to step `last`. Raises UserError for a damaged file."""
    # Answers lie in the same folder; the files of evaluations are named by their step alone.
    files = {int(p.stem): p for p in folder.glob("*.json") if p.stem.isdigit()}
    return {step: read_numbers(files[step], _REMEDY) for step in sorted(files) if step <= last}


def smaller_is_better(metric: str) -> bool:
    """True if a metric, alone or as "evaluation/metric", is an error and not a score."""
    return metric.rpartition("/")[2] == "loss"


def judge(recipe: Recipe, measured: History, step: int) -> Verdict:
    """Returns the decisions after the evaluations of `step`, the last in `measured`."""
    if step not in measured:
        return Verdict()
    best, stop = _selection(recipe, measured, step)
    forgotten: list[str] = []
    warnings: list[str] = []
    for name, spec in recipe.evals.items():
        sentence = _worsening(name, spec, measured, step)
        if sentence is not None and spec.guard is not None:
            (forgotten if spec.guard.action == "stop" else warnings).append(sentence)
    return Verdict(best, stop, tuple(forgotten), tuple(warnings))


def _selection(recipe: Recipe, measured: History, step: int) -> tuple[bool, str | None]:
    """Returns (True if `step` is the best so far, reason to end training or None)."""
    metric = recipe.checkpoint.best
    if metric is None or metric not in measured[step]:
        return False, None
    direction = recipe.checkpoint.best_is
    # Signed, so that the best is the largest of either kind.
    sign = -1 if direction == "min" or (direction == "auto" and smaller_is_better(metric)) else 1
    # Step 0 is the untrained model, which has no checkpoint.
    values = {s: sign * row[metric] for s, row in measured.items() if s > 0 and metric in row}
    if step not in values:
        return False, None
    top = max(values, key=lambda s: values[s])  # the first of equals
    since = sum(s > top for s in values)
    if recipe.stop.patience is None or since < recipe.stop.patience:
        return top == step, None
    return top == step, (
        f"{metric} was best at step {top} ({sign * values[top]:.4g}) and did not improve in "
        f"{since} evaluations (stop.patience = {recipe.stop.patience})"
    )


def _worsening(name: str, spec: EvalConfig, measured: History, step: int) -> str | None:
    """Returns a sentence if an evaluation is worse than its guard allows against step 0."""
    if spec.guard is None:
        return None
    metric = f"{name}/{spec.guard.metric}"
    before, now = measured.get(0, {}).get(metric), measured[step].get(metric)
    if before is None or now is None:
        return None
    change = now - before if smaller_is_better(metric) else before - now
    if change <= spec.guard.max_worsening * abs(before):
        return None
    return (
        f"{metric} was {before:.4g} before the first step and is {now:.4g} at step {step}: worse "
        f"by {change / max(abs(before), 1e-12):.1%}, and evals.{name}.guard.max_worsening allows "
        f"{spec.guard.max_worsening:.1%}"
    )
