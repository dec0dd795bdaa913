"""A model, adapter or run folder, measured: `evaluate.run(...)`."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from internvl import checkpoint, evals, handles, zoo
from internvl.config import ConfigError, EvalConfig, eval_config
from internvl.data import benchmarks
from internvl.evals import caption
from internvl.recipes import load_recipe

_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
_CAPTION_METRICS = {f"bleu_{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)} | {
    "meteor": "METEOR",
    "rouge_l": "ROUGE_L",
    "cider": "CIDEr",
}
"""Our names and pycocoevalcap's, in its order."""

_METRICS = {"image_retrieval": "t2i", "text_retrieval": "i2t"}
"""CLIP_benchmark's words for the two directions, and those of the papers."""


@dataclass(frozen=True)
class Job:
    """An evaluation, and what result files call it."""

    config: EvalConfig
    dataset: str
    language: str


@dataclass(frozen=True)
class Measured:
    """What was found of a model."""

    metrics: dict[str, float]
    """Named "evaluation/metric", each from 0 to 1 unless its evaluator says otherwise."""
    counts: dict[str, dict[str, int]]
    """Evaluation -> what it measured on, such as pictures and texts, and how many."""


def run(model_or_run: str | Path, tasks: Sequence[str] = (), **how: Any) -> dict[str, float]:
    """The metrics of `measure`, which takes the same."""
    return measure(model_or_run, tasks, **how).metrics


def measure(
    model_or_run: str | Path,
    tasks: Sequence[str] = (),
    *,
    to: Path | None = None,
    root: Path = Path("data"),
    dataset_root: str | None = None,
    languages: Sequence[str] = (),
    split: str = "test",
    output: Path | None = None,
    features: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **fields: Any,
) -> Measured:
    """Evaluates a model on published sets, on one's own files, or as the recipe of its run says.

    What is wrong with the data is found before the model is loaded. Features are kept while they
    are computed, so the same call goes on after an interruption.

    Args:
        tasks: names of benchmarks.TASKS or OWN, or of evaluations of the run's recipe; by default
            all of the recipe's, or `caption-file` for a model.
        to: folder for `result.json` and the answers; the run's evals folder, or out/evaluate.
        root: folder that the published sets lie in.
        dataset_root: the folder of the one set itself; `{dataset}` is filled in.
        languages: of sets that have several, as CLIP_benchmark writes them.
        output: file that the originals' result lines are appended to; by default `to`/result.jsonl.
        features: folder where features stay; otherwise they go when everything is measured.
        fields: of EvalConfig, such as `annotations`, `modes`, `limit`; they override a recipe's.

    Returns:
        Metrics, and what they were measured on.

    Raises:
        ConfigError: an unknown task, or files of a set that are not there, with their addresses.
        UserError: data that cannot be used.
    """
    is_run = handles.is_run(Path(model_or_run))
    in_run = load_recipe(Path(model_or_run) / "recipe.yaml").evals if is_run else {}
    own_file = not in_run or "annotations" in fields
    names = list(tasks) or (["caption-file"] if own_file else list(in_run))
    jobs: dict[str, Job] = {}
    for name in names:
        if name in in_run:
            jobs[name] = Job(eval_config(**{**vars(in_run[name]), **fields}), name, "en")
        elif name in benchmarks.TASKS:
            jobs |= _published_set(name, root, dataset_root, languages, split, fields)
        elif name in benchmarks.OWN:
            jobs[name] = _own(name, languages, split, fields)
        else:
            raise ConfigError(benchmarks.no_such(name, in_run))
    folder = to or (Path(model_or_run) / "evals/evaluate" if is_run else Path("out/evaluate"))
    evaluators = evals.build({name: job.config for name, job in jobs.items()})
    handle = handles.load(model_or_run, device=device, dtype=dtype)
    kept = features or folder / "features"
    own = kept / _identity(Path(model_or_run), handle)
    metrics = evals.run_all(evaluators, handle, folder, features=own)
    if features is None:
        shutil.rmtree(kept, ignore_errors=True)
    for name, job in jobs.items():
        mine = f"{name}/"
        values = {m.removeprefix(mine): v for m, v in metrics.items() if m.startswith(mine)}
        if job.config.type == "caption":
            _write_captions(folder, name, job)
            lines: list[Any] = [_caption_line(job, values, handle, str(model_or_run))]
        else:
            lines = _benchmark_lines(job, values, str(model_or_run))
        _append(output or folder / "result.jsonl", lines)
    return Measured(metrics, {name: evaluators[name].counts() for name in jobs})


def _published_set(
    name: str,
    root: Path,
    dataset_root: str | None,
    languages: Sequence[str],
    split: str,
    fields: dict[str, Any],
) -> dict[str, Job]:
    task = benchmarks.TASKS[name]
    folder = root / task.root
    if dataset_root is not None:
        folder = Path(dataset_root.format(dataset=task.dataset, dataset_cleaned=task.dataset))
    found = benchmarks.configs(name, folder, languages=languages, split=split, **fields)
    chosen = languages or task.languages[:1]
    return {
        key: Job(config, task.dataset, language)
        for (key, config), language in zip(found.items(), chosen, strict=True)
    }


def _own(name: str, languages: Sequence[str], split: str, fields: dict[str, Any]) -> Job:
    annotations = fields.get("annotations")
    if annotations is None:
        raise ConfigError(f"{name} needs --annotations: {benchmarks.OWN[name]}")
    images = annotations if annotations.is_dir() else annotations.parent
    given = {"images": images, "split": split, **fields, "type": name.partition("-")[0]}
    language = languages[0] if languages else "en"
    return Job(eval_config(**given), annotations.stem, language)


def _identity(named: Path, handle: Any) -> str:
    """A word for exactly these weights in this precision: names, sizes and times of their files."""
    folders = {named, Path(handle.folder)}
    files = {file for folder in folders for kind in _WEIGHTS for file in folder.glob(kind)}
    if handles.is_run(named):
        step = checkpoint.steps(named / "checkpoints")[-1]
        files |= {*(named / "checkpoints" / f"{step:06d}").rglob("*")}
    states = sorted((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return blake2b(repr((states, str(handle.model.dtype))).encode(), digest_size=8).hexdigest()


def _benchmark_lines(job: Job, values: dict[str, float], pretrained: str) -> list[dict[str, Any]]:
    """CLIP_benchmark's result lines: one for each mode, and for each re-ranked one."""
    kind = "retrieval" if job.config.type == "retrieval" else "classification"
    found = []
    for mode in job.config.modes:
        for prefix, task in (
            (mode, f"zeroshot_{kind}"),
            (f"{mode}_itm", f"zeroshot_{kind}_with_itm"),
        ):
            metrics = {
                name.removeprefix(f"{prefix}_"): value
                for name, value in values.items()
                if name.startswith(f"{prefix}_")
                and not name.endswith("mean_recall")
                and name.startswith(f"{mode}_itm_") == prefix.endswith("_itm")
            }
            if metrics:
                found.append(
                    {
                        "dataset": job.dataset,
                        "model": f"internvl_{mode}_{kind}_hf",
                        "pretrained": pretrained,
                        "task": task,
                        "metrics": metrics,
                        "language": job.language,
                    }
                )
    return found


def _append(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_captions(folder: Path, name: str, job: Job) -> None:
    """The original's results file: [{image_id, caption}] in DATASET_yymmddHHMMSS.json."""
    rows = (folder / "result" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [
        {"image_id": row["image_id"], "caption": row["answer"]}
        for row in map(json.loads, rows)
        if "answer" in row  # the others say what was left out
    ]
    file = folder / f"{job.dataset}_{datetime.now():%y%m%d%H%M%S}.json"
    file.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def _caption_line(job: Job, values: dict[str, float], handle: Any, model: str) -> list[Any]:
    """The original's result line: [dataset, prompt, average length, metrics] for InternVL-G,
    [checkpoint, dataset, average length, metrics] for chat models."""
    metrics = {theirs: values[ours] for ours, theirs in _CAPTION_METRICS.items() if ours in values}
    head = [model, job.dataset]
    if hasattr(handle, "encode_images"):
        head = [job.dataset, job.config.prompt or caption.DUAL_PROMPT]
    return [*head, values["average_length"], metrics]


def published(model: str | Path, name: str) -> float | None:
    """The published value of a metric that `run` returned as `name`, on the same scale, or None.

    Only for a released model as it is: by hub id, or by a folder of the same name.
    """
    if handles.is_run(Path(model)):
        return None
    try:
        released = zoo.find(str(model))
    except zoo.UnknownModel:
        return None
    evaluation, _, metric = name.partition("/")
    task, language = _task_of(evaluation)
    percent = released.family == "dual"
    mode = "g" if percent else "chat"
    if metric[:2] in ("c_", "g_") and "_itm_" not in metric:
        mode, metric = metric[0], metric[2:]
        for theirs, ours in _METRICS.items():
            metric = metric.replace(theirs, ours)
    for score in zoo.scores(released.name):
        if (score.task, score.metric, score.mode) != (task, metric, mode) or score.recipe:
            continue
        if score.language == language:
            return score.value / 100 if percent and metric != "average_length" else score.value
    return None


def _task_of(evaluation: str) -> tuple[str, str]:
    """(task, language) as zoo.py has them."""
    for name in ("retrieval-flickr30k", "retrieval-coco"):
        if evaluation == f"{name}-cn":
            return name, "zh"
    if evaluation.startswith("retrieval-xtd-"):
        return "retrieval-xtd", evaluation.removeprefix("retrieval-xtd-")
    return evaluation, "en"


def render(
    metrics: dict[str, float],
    model: str | Path = "",
    counts: Mapping[str, Mapping[str, int]] | None = None,
) -> str:
    """A table of metrics, one line each, and beside each what was published for it.

    Args:
        model: whose published values; empty for none.
        counts: of `Measured`. A published value stands only beside an evaluation of as many
            pictures and texts as the whole published set has; others get a note.
    """
    width = max(map(len, metrics), default=0)
    rows, notes, compared = [], dict[str, None](), False
    for name, value in metrics.items():
        row = f"{name:{width}}  {value:8.4f}"
        known = published(model, name) if model and counts is not None else None
        if known is not None and counts is not None:
            evaluation = name.partition("/")[0]
            note = _partial(evaluation, counts[evaluation])
            if note:
                notes[note] = None
            else:
                row, compared = f"{row}  {known:9.4f}", True
        rows.append(row)
    head = [f"{'':{width}}  measured  published"] if compared else []
    return "\n".join([*head, *rows, *notes])


def _partial(evaluation: str, counts: Mapping[str, int]) -> str:
    """How the set that was measured on differs from the whole published one; empty if not."""
    task = benchmarks.published_set(evaluation)
    if task is None:
        return ""
    whole = f"{task.num_pictures:,} pictures and {task.num_texts:,} texts"
    here = " and ".join(f"{number:,} {what}" for what, number in counts.items())
    if here == whole:
        return ""
    return f"{evaluation}: published values are for {whole}; this set has {here}"
