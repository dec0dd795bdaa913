"""Evaluators: each states its data, its prompt and its metrics."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from internvl import dist
from internvl.config import EvalConfig
from internvl.data.images import FileSlice
from internvl.evals import benchmark, caption, classify, loss, preference, qa, retrieval
from internvl.evals.features import images_once
from internvl.evals.metrics import one_meteor
from internvl.evals.scores import LEFT_OUT as LEFT_OUT
from internvl.evals.scores import EvalScores, Table
from internvl.files import read_numbers, write_json, write_text
from internvl.log import get_logger
from internvl.report.results.thumbnails import with_thumbnails


class Evaluator(Protocol):
    """One evaluation. Its constructor reads and checks the data, before any model is loaded."""

    def images(self) -> Sequence[str | FileSlice]:
        """Returns every image that `run` will open."""
        ...

    def counts(self) -> dict[str, int]:
        """Returns the size of the data by name, such as images and texts."""
        ...

    def table(self) -> Table | None:
        """Returns how the metrics are shown, or None if a line for each suits them."""
        ...

    def run(self, handle: Any, folder: Path | None) -> EvalScores | None:
        """Measures a model on all ranks together; returns the scores on rank 0, None on the others.

        They do not depend on the number of ranks.

        Args:
            handle: a Chat or Dual.
            folder: cache of features and answers of this very model, so that an interrupted
                evaluation resumes; None caches nothing.
        """
        ...


# A recipe names these in `type`, so a literal: nothing registers itself by being imported.
EVALS: dict[str, Callable[..., Evaluator]] = {
    "caption": caption.Caption,
    "loss": loss.Loss,
    "preference": preference.Preference,
    "retrieval": retrieval.Retrieval,
    "classify": classify.Classify,
    "benchmark": benchmark.Benchmark,
    "qa": qa.QuestionAnswers,
}

FROM_ANSWERS: dict[str, Callable[[Any, Mapping[Any, str]], Evaluator]] = {
    "caption": caption.CaptionAnswers,
}
"""Types whose answers can be scored without a model: (section, id -> answer) -> evaluator."""


def build(configs: Mapping[str, EvalConfig]) -> dict[str, Evaluator]:
    """Builds the evaluators of a recipe by name; reads their data.

    Raises:
        UserError: data that cannot be used.
    """
    return {name: EVALS[config.type](config) for name, config in configs.items()}


def measured(folder: Path, step: int) -> set[str]:
    """Returns the names of the evaluations that `folder`/STEP.json already holds, as rank 0 sees
    it."""
    # From the right: an evaluation's name may have a slash, a metric's has none.
    return dist.on_main(
        lambda: {name.rpartition("/")[0] for name in _read_metrics(_metrics_path(folder, step))}
    )


# METEOR loads its tables for 9 CPU seconds: one process serves all evaluations of a call.
@one_meteor()
@images_once()
def run_all(
    evaluators: Mapping[str, Evaluator],
    handle: Any,
    folder: Path,
    step: int | None = None,
    features: Path | None = None,
) -> dict[str, float]:
    """Runs every evaluation; adds its metrics to STEP.json and writes STEP/NAME.jsonl.

    Args:
        handle: a Chat or Dual.
        step: of the run; None, for a model outside a run, names the files "result".
        features: cache folder of this very model, see `Evaluator.run`.

    All ranks call it; rank 0 writes.

    Returns:
        The metrics of this call, named "evaluation/metric".
    """
    path = _metrics_path(folder, step)
    metrics: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        scores = evaluator.run(handle, features)
        if scores is None:
            continue
        metrics |= {f"{name}/{metric}": value for metric, value in scores.values.items()}
        if step is None and scores.images is not None:
            # Only `internvl evaluate` makes a page, which has no other place to find them.
            images = path.with_suffix("") / f"{name}_images"
            rows = with_thumbnails(scores.rows, scores.images, images)
            scores = replace(scores, rows=rows)
        rows_path = _write(path, name, scores, metrics)
        for note in scores.notes:
            get_logger().info("%s: %s", name, note)
        if step is None:  # the caller shows the metrics
            get_logger().info("%s: measured; its rows are in %s", name, rows_path)
        else:
            shown = _shown(evaluator.table(), scores.values)
            get_logger().info("%s at step %d: %s", name, step, shown)
    return dist.from_main(metrics)


def _write(path: Path, name: str, scores: EvalScores, metrics: Mapping[str, float]) -> Path:
    """Writes the rows of an evaluation, then all metrics so far; returns the path of the rows."""
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows)
    rows_path = path.with_suffix("") / f"{name}.jsonl"
    write_text(rows_path, rows)
    _write_files(path.with_suffix(""), scores)
    # After each evaluation and atomically: a killed run does not measure it again. After the
    # rows: metrics in the file mean that the rows are complete.
    write_json(path, {**_read_metrics(path), **metrics}, indent=1)
    return rows_path


def _write_files(folder: Path, scores: EvalScores) -> None:
    """Writes the result files of an evaluation in the original's form below a folder."""
    for name, content in scores.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content, encoding="utf-8")
    for name, lines in scores.lines.items():
        # As the original, which collects the lines of all its calls in one file.
        with (folder / name).open("a", encoding="utf-8") as summary:
            summary.write(lines)


def _shown(table: Table | None, values: Mapping[str, float]) -> str:
    """Returns metrics as text: one line, or lines of a table."""
    if table is None:
        return ", ".join(f"{metric} {value:.4f}" for metric, value in values.items())
    return "\n  ".join(["", *table.render(values)])


def _metrics_path(folder: Path, step: int | None) -> Path:
    return folder / ("result.json" if step is None else f"{step:06d}.json")


def _read_metrics(path: Path) -> dict[str, Any]:
    """Reads a metrics file, {} if there is none; NAME/computed, of `internvl evaluate`, is text."""
    if not path.exists():
        return {}
    return read_numbers(path, "remove it, to measure again", text_suffix="/computed")
