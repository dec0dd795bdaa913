"""Result files next to the metrics: the originals' lines, and what `result.json` notes."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from internvl.config import CaptionEval, ClassifyEval, RetrievalEval
from internvl.evals.call.jobs import Job
from internvl.evals.call.opening import Opened
from internvl.evals.scores import LEFT_OUT, model_file
from internvl.files import write_json

_CAPTION_METRICS = {f"bleu_{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)} | {
    "meteor": "METEOR",
    "rouge_l": "ROUGE_L",
    "cider": "CIDEr",
}
"""Metric name -> pycocoevalcap's name, in its order."""


def record(file: Path, counts: Mapping[str, Mapping[str, int]], differences: str) -> None:
    """Sets NAME/computed and NAME/left_out of these evaluations in `result.json`; no differences
    and nothing left out remove them."""
    results = json.loads(file.read_text(encoding="utf-8"))
    for name, of_evaluation in counts.items():
        noted = {"computed": differences, "left_out": of_evaluation.get(LEFT_OUT)}
        for key, value in noted.items():
            # The file may hold the value of an earlier call.
            results.pop(f"{name}/{key}", None)
            results |= {f"{name}/{key}": value} if value else {}
    write_json(file, results, indent=1)


def append(
    folder: Path,
    output: Path | None,
    jobs: Mapping[str, Job],
    metrics: Mapping[str, float],
    opened: Opened,
    model: str,
) -> None:
    """Appends the originals' result lines of all jobs; writes the files of caption jobs."""
    differences = opened.numerics.differences
    for name, job in jobs.items():
        prefix = f"{name}/"
        values = {m.removeprefix(prefix): v for m, v in metrics.items() if m.startswith(prefix)}
        if isinstance(job.config, CaptionEval):
            # InternVL-14B's script has no file of lines.
            checkpoint = model if opened.handle.family == "chat" else ""
            write_captions(folder / "result", name, job, values, checkpoint)
            lines: list[Any] = [_caption_line(job, job.config, values, opened.handle, model)]
        else:
            lines = _benchmark_lines(job, values, model)
            # A caption line is a list and has no room for another key.
            lines = [line | ({"computed": differences} if differences else {}) for line in lines]
        _append_to(output or folder / "result.jsonl", lines)


def _benchmark_lines(job: Job, values: dict[str, float], pretrained: str) -> list[dict[str, Any]]:
    """Returns CLIP_benchmark's result lines: one for each mode, and for each re-ranked one."""
    if not isinstance(job.config, RetrievalEval | ClassifyEval):
        return []
    task_name = "retrieval" if job.config.type == "retrieval" else "classification"
    # CLIP_benchmark's names of a folder end in _hf, that of InternVL-C's own file does not.
    form = "" if pretrained.endswith(".pth") else "_hf"
    lines = []
    more: dict[str, Any] = {}
    name_of_task = f"zeroshot_{task_name}"
    if isinstance(job.config, ClassifyEval) and job.config.method == "probe":
        name_of_task, config = "linear_probe", job.config
        more = {"lr": config.probe_lr, "epochs": config.probe_epochs, "seed": config.probe_seed}
        more |= {"fewshot_k": config.shots or -1}
    for mode in job.config.modes:
        for prefix, task in (
            (mode, name_of_task),
            (f"{mode}_itm", f"zeroshot_{task_name}_with_itm"),
        ):
            metrics = {
                name.removeprefix(f"{prefix}_"): value
                for name, value in values.items()
                if name.startswith(f"{prefix}_")
                # CLIP_benchmark has no mean recall.
                and not name.endswith("mean_recall")
                # "c_" is a prefix of "c_itm_" too.
                and name.startswith(f"{mode}_itm_") == prefix.endswith("_itm")
            }
            # None were re-ranked without `rerank`.
            if metrics:
                lines.append(
                    {
                        "dataset": job.dataset,
                        "model": f"internvl_{mode}_{task_name}{form}",
                        "pretrained": pretrained,
                        "task": task,
                        "metrics": metrics | more,
                        "language": job.language,
                    }
                )
    return lines


def _append_to(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_captions(
    folder: Path, name: str, job: Job, values: Mapping[str, float], model: str
) -> None:
    """Writes the original's results file, [{image_id, caption}] in DATASET_yymmddHHMMSS.json, and
    appends its line to MODEL.txt.

    Args:
        model: its name; empty for no line.
    """
    rows = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [
        {"image_id": row["image_id"], "caption": row["answer"]}
        for row in map(json.loads, rows)
        if "answer" in row  # other rows list samples that were left out
    ]
    file = folder / f"{job.dataset}_{datetime.now():%y%m%d%H%M%S}.json"
    file.write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    if not model:
        return
    # As Python prints it: the original writes str() of its list, scores as dict_items.
    line = [model, job.dataset, values["average_length"], _caption_metrics(values).items()]
    with (folder / f"{model_file(model)}.txt").open("a", encoding="utf-8") as summary:
        summary.write(f"{line}\n")


def _caption_metrics(values: Mapping[str, float]) -> dict[str, float]:
    # Fewer with `metrics: exact`.
    return {theirs: values[ours] for ours, theirs in _CAPTION_METRICS.items() if ours in values}


def _caption_line(
    job: Job, config: CaptionEval, values: dict[str, float], handle: Any, model: str
) -> list[Any]:
    """Returns the original's result line: [dataset, prompt, average length, metrics] for
    InternVL-G, [checkpoint, dataset, average length, metrics] for chat models."""
    heads = {
        "chat": [model, job.dataset],
        "dual": [job.dataset, config.prompt or handle.caption_prompt],
    }
    return [*heads[handle.family], values["average_length"], _caption_metrics(values)]
