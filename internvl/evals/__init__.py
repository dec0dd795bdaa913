"""What is measured: an evaluator states data, prompt and metric."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl.config import EvalConfig, TilesConfig
from internvl.data.chat import ChatEncoder
from internvl.evals import caption
from internvl.generate import Request, Settings, answers
from internvl.log import Progress, get_logger

EVALS = {"caption": caption.Caption}


def measured(folder: Path, step: int) -> set[str]:
    """Names of the evaluations that STEP.json in `folder` holds already."""
    return {name.rpartition("/")[0] for name in _read(_file(folder, step))}


def run_all(
    configs: Mapping[str, EvalConfig],
    model: Any,
    encoder: ChatEncoder,
    tiles: TilesConfig,
    folder: Path,
    step: int | None = None,
) -> dict[str, float]:
    """Runs every evaluation; adds each to STEP.json (metric -> value) and writes its answers.

    Without a step, of a model that is no run's, the files are called "result".

    Returns the metrics of this call, named "evaluation/metric".
    """

    def answer(requests: Sequence[Request], spec: EvalConfig) -> list[str]:
        settings = Settings(max_new_tokens=spec.max_new_tokens)
        with Progress("answers", total=len(requests)) as progress:
            return answers(
                model,
                encoder,
                tiles,
                requests,
                settings,
                batch_size=spec.batch_size,
                progress=progress.update,
            )

    path = _file(folder, step)
    found: dict[str, float] = {}
    for name, config in configs.items():
        scores = EVALS[config.type](config).run(answer)
        found |= {f"{name}/{metric}": value for metric, value in scores.values.items()}
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows)
        listed = path.with_suffix("") / f"{name}.jsonl"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text(rows, encoding="utf-8")
        # One by one, and in one move: a run that is killed keeps what it has measured.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**_read(path), **found}, indent=1), encoding="utf-8")
        partial.replace(path)
        shown = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.values.items())
        get_logger().info("%s%s: %s", name, "" if step is None else f" at step {step}", shown)
    return found


def _file(folder: Path, step: int | None) -> Path:
    return folder / ("result.json" if step is None else f"{step:06d}.json")


def _read(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
