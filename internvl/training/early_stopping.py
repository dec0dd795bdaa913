"""What a run's evaluations decide: the best checkpoint, an early end, and whether too much is
forgotten. All of it follows from the files in the run's evals folder, so a resumed run decides
alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internvl.config import EvalConfig, Recipe
from internvl.log import read_numbers

_REMEDY = "remove it; without it, its step counts as not measured"

History = Mapping[int, Mapping[str, float]]
"""Step -> metric -> value, ascending."""


@dataclass(frozen=True)
class Verdict:
    """What follows from the evaluations of a step."""

    best: bool = False
    """No earlier step was better."""
    stop: str | None = None
    """Why nothing more is to be gained, or None."""
    forgotten: tuple[str, ...] = ()
    """What got worse than its guard allows, and ends the run."""
    warnings: tuple[str, ...] = ()
    """The same, for guards that only warn."""


def history(folder: Path, last: int) -> History:
    """The evaluations in `folder` up to step `last`. Raises UserError for a damaged file."""
    files = {int(p.stem): p for p in folder.glob("*.json") if p.stem.isdigit()}
    return {step: read_numbers(files[step], _REMEDY) for step in sorted(files) if step <= last}


def smaller_is_better(metric: str) -> bool:
    """Whether a metric, alone or as "evaluation/metric", is an error and not a score."""
    return metric.rpartition("/")[2] == "loss"


def judge(recipe: Recipe, found: History, step: int) -> Verdict:
    """What the evaluations of `step`, the last in `found`, lead to."""
    if step not in found:
        return Verdict()
    best, stop = _selection(recipe, found, step)
    forgotten: list[str] = []
    warnings: list[str] = []
    for name, spec in recipe.evals.items():
        sentence = _worsening(name, spec, found, step)
        if sentence is not None and spec.guard is not None:
            (forgotten if spec.guard.action == "stop" else warnings).append(sentence)
    return Verdict(best, stop, tuple(forgotten), tuple(warnings))


def _selection(recipe: Recipe, found: History, step: int) -> tuple[bool, str | None]:
    """Whether `step` is the best so far, and why training should end, or None."""
    metric = recipe.checkpoint.best
    if metric is None or metric not in found[step]:
        return False, None
    wanted = recipe.checkpoint.best_is
    sign = -1 if wanted == "min" or (wanted == "auto" and smaller_is_better(metric)) else 1
    # What was before training is no checkpoint of it.
    values = {s: sign * row[metric] for s, row in found.items() if s > 0 and metric in row}
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


def _worsening(name: str, spec: EvalConfig, found: History, step: int) -> str | None:
    """One sentence where an evaluation is worse than its guard allows against step 0."""
    if spec.guard is None:
        return None
    metric = f"{name}/{spec.guard.metric}"
    before, now = found.get(0, {}).get(metric), found[step].get(metric)
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
