"""What is measured: an evaluator states data, prompt and metric."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from internvl.config import EvalConfig
from internvl.data.images import FileSlice
from internvl.evals import caption, classify, loss, retrieval
from internvl.evals.metrics import one_meteor
from internvl.evals.scores import EvalScores
from internvl.files import read_numbers, write_json
from internvl.log import get_logger


class Evaluator(Protocol):
    """One evaluation with its data read. Making it finds what is wrong with the data."""

    def images(self) -> Sequence[str | FileSlice]:
        """Every image that `run` will open."""
        ...

    def counts(self) -> dict[str, int]:
        """What it measures on, such as images and texts, and how many there are."""
        ...

    def run(self, handle: Any, folder: Path | None) -> EvalScores:
        """Measures a model.

        Args:
            handle: a Chat or Dual.
            folder: where features are kept between one call and the next, for this model only;
                None keeps nothing.
        """
        ...


EVALS: dict[str, Callable[..., Evaluator]] = {
    "caption": caption.Caption,
    "loss": loss.Loss,
    "retrieval": retrieval.Retrieval,
    "classify": classify.Classify,
}


def build(configs: Mapping[str, EvalConfig]) -> dict[str, Evaluator]:
    """The evaluations of a recipe, their data read.

    Raises:
        UserError: data that cannot be used.
    """
    return {name: EVALS[config.type](config) for name, config in configs.items()}


def measured(folder: Path, step: int) -> set[str]:
    """Names of the evaluations that STEP.json in `folder` holds already."""
    return {name.rpartition("/")[0] for name in _read(_file(folder, step))}


@one_meteor()
def run_all(
    evaluators: Mapping[str, Evaluator],
    handle: Any,
    folder: Path,
    step: int | None = None,
    features: Path | None = None,
) -> dict[str, float]:
    """Runs every evaluation; adds each to STEP.json (metric -> value) and writes its answers.

    Without a step, of a model that is no run's, the files are called "result".

    Args:
        handle: a Chat or Dual.
        features: where evaluations of this very model keep what an interruption should not cost.

    Returns the metrics of this call, named "evaluation/metric".
    """
    path = _file(folder, step)
    found: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        scores = evaluator.run(handle, features)
        found |= {f"{name}/{metric}": value for metric, value in scores.values.items()}
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows)
        listed = path.with_suffix("") / f"{name}.jsonl"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text(rows, encoding="utf-8")
        # One by one, and in one move: a run that is killed keeps what it has measured.
        write_json(path, {**_read(path), **found}, indent=1)
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.values.items())
        get_logger().info("%s%s: %s", name, "" if step is None else f" at step {step}", shown)
    return found


def _file(folder: Path, step: int | None) -> Path:
    return folder / ("result.json" if step is None else f"{step:06d}.json")


def _read(path: Path) -> dict[str, float]:
    return read_numbers(path, "remove it, to measure again") if path.exists() else {}
