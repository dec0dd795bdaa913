"""What is measured: an evaluator states data, prompt and metric."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from internvl.config import EvalConfig
from internvl.evals import caption
from internvl.generate import Request
from internvl.log import get_logger

Answer = Callable[[Sequence[Request], EvalConfig], list[str]]
"""Generates one answer per request, with the settings of an evaluation."""

EVALS = {"caption": caption.Caption}


def run_all(
    configs: Mapping[str, EvalConfig], answer: Answer, folder: Path, step: int
) -> dict[str, float]:
    """Runs every evaluation; adds to STEP.json (metric -> value) and writes the answers.

    Returns the metrics of this call, named "evaluation/metric".
    """
    stem = f"{step:06d}"
    found: dict[str, float] = {}
    for name, config in configs.items():
        scores = EVALS[config.type](config).run(answer)
        values = {f"{name}/{metric}": value for metric, value in scores.values.items()}
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows)
        (folder / stem).mkdir(parents=True, exist_ok=True)
        (folder / stem / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.values.items())
        get_logger().info("step %d, %s: %s", step, name, shown)
        found |= values
    path = folder / f"{stem}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**before, **found}, indent=1), encoding="utf-8")
    return found
