"""Evaluates a model, adapter or run folder: `evaluate.run(...)`."""

import itertools
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from internvl import dist, evals, log, zoo
from internvl.compute import backends, compilation, placement
from internvl.config import (
    CaptionEval,
    ClassifyEval,
    EvalConfig,
    EvalSection,
    RetrievalEval,
    eval_config,
    eval_keys,
)
from internvl.config.recipes import load_recipe
from internvl.data.arguments import list_texts
from internvl.datasets import published as published_sets
from internvl.datasets import tasks as benchmarks
from internvl.errors import ConfigError, ModelFolderError, UnknownModel, UserError, counted
from internvl.evals.answers import read_file
from internvl.evals.scores import Table
from internvl.files import no_such_model, write_json, write_text
from internvl.inference import load as loading
from internvl.inference.families import LoadOptions
from internvl.inference.opened import OpenedModel, RunStep, find_run, open_model
from internvl.models import hub
from internvl.models.bases import Replacements

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pth")
_CAPTION_METRICS = {f"bleu_{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)} | {
    "meteor": "METEOR",
    "rouge_l": "ROUGE_L",
    "cider": "CIDEr",
}
"""Metric name -> pycocoevalcap's name, in its order."""

_IN_POINTS = ("average_length", "perception", "cognition", "overall", "score")
"""Metrics that are no shares of 1."""
_CALL = "call.json"  # of a folder of results: whose they are
_LONGEST_NAME = 100
_DIRECTIONS = {"image_retrieval": "t2i", "text_retrieval": "i2t"}
"""CLIP_benchmark's name of a retrieval direction -> the papers' name."""


@dataclass(frozen=True)
class Job:
    """An evaluation, with the data set and language that result files name."""

    config: EvalSection
    dataset: str
    language: str


@dataclass(frozen=True)
class Measured:
    """Results of `measure`."""

    metrics: dict[str, float]
    """"evaluation/metric" -> value, from 0 to 1 unless its evaluator says otherwise."""
    counts: dict[str, dict[str, int]]
    """Evaluation -> counts of what it measured, such as {"images": 1000, "texts": 5000}."""
    tables: Mapping[str, Table | None]
    """Evaluation -> how its metrics are shown; None for a line each."""
    folder: Path
    """Where the results are written."""
    computed: str = ""
    """Precision, device and attention of this evaluation. If the run computes differently, only the
    differences: "float32; inside the run: bfloat16 autocast"."""
    ranks: int = 1
    """Processes that shared the items."""


@dataclass(frozen=True)
class _Numerics:
    """How the forward pass is computed, in words: now, and in the run or folder of the model."""

    current: tuple[str, ...]
    reference: tuple[str, ...]
    """The same properties in the same order."""
    reference_name: str

    @property
    def differences(self) -> str:
        """The properties that differ, as in `Measured.computed`; empty if none does."""
        changed = [
            (current, reference)
            for current, reference in zip(self.current, self.reference, strict=True)
            if current != reference
        ]
        if not changed:
            return ""
        current_text, reference_text = (", ".join(words) for words in zip(*changed, strict=True))
        return f"{current_text}; {self.reference_name}: {reference_text}"

    def __str__(self) -> str:
        return self.differences or ", ".join(self.current)


def run(
    model_or_run: str | Path, tasks: Sequence[str] | str = (), **options: Any
) -> dict[str, float]:
    """Returns the metrics of `measure`, which takes the same arguments."""
    return measure(model_or_run, tasks, **options).metrics


def measure(
    model_or_run: str | Path,
    tasks: Sequence[str] | str = (),
    *,
    to: str | Path | None = None,
    root: str | Path = Path("data"),
    dataset_root: str | None = None,
    languages: Sequence[str] | str = (),
    split: str = "test",
    output: str | Path | None = None,
    features: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    quantize: str | None = None,
    step: int | None = None,
    base: Replacements = None,
    **fields: Any,
) -> Measured:
    """Evaluates a model on published sets or on the user's files, or a run as its recipe says.

    Problems of the data are reported before the model is loaded. Under torchrun, Slurm or MPI the
    items are shared out over all processes, and the results do not depend on their number. Features
    and answers are cached while they are computed, so the same call resumes after an interruption,
    on any number of processes. A run is measured as it measures
    itself (trained weights in float32, products in its `dtype`, its attention and threads), so the
    scores of its last step are reproduced. Differences are in `computed`, in `result.json` as
    NAME/computed, and in CLIP_benchmark's lines.

    Args:
        tasks: names of published.TASKS or USER_TASKS, or of evaluations of the run's recipe; by
            default all of the recipe's, or `caption-file` for a model.
        to: folder for `result.json` and the answers; by default a folder of this very call below
            RUN/evals/evaluate/STEP, or below out/evaluate/MODEL for a model: the same call writes
            there again, and no other does.
        root: folder of the published sets.
        dataset_root: folder of the one set that is measured; `{dataset}` is replaced by its name.
        languages: languages of a multilingual set, as CLIP_benchmark writes them.
        dtype: for a run, the dtype of the products, by default its own; for a model, that of all
            weights, by default bfloat16 on a GPU and float32 on a CPU.
        device_map: "auto" spreads a model that is larger than a GPU over all of them, in a single
            process.
        quantize: "8bit" or "4bit" loads a chat model's weights by bitsandbytes, on a GPU.
        output: file that the originals' result lines are appended to; by default `to`/result.jsonl.
        features: folder in which features are kept; by default they are deleted at the end.
        step, base: as of `internvl.load`.
        fields: of EvalConfig, such as `annotations`, `modes`, `limit`; they override a recipe's.

    Returns:
        Metrics, and counts of what they were measured on.

    Raises:
        ConfigError: an unknown task, or missing files of a set, with their URLs.
        ModelFolderError: no such run or model.
        UserError: data that cannot be used.
    """
    tasks, languages = list_texts(tasks, "task"), list_texts(languages, "language")
    root, to, output, features = Path(root), _path(to), _path(output), _path(features)
    # A call from Python may name a single mode.
    if isinstance(fields.get("modes"), str):
        fields["modes"] = [fields["modes"]]
    own_device = _join(device, device_map)
    problem = no_such_model(model_or_run)
    if problem is not None:
        raise ModelFolderError(problem)
    if not tasks and "annotations" not in fields and not Path(model_or_run).exists():
        raise ConfigError(
            f"{model_or_run}: there is no such run; to evaluate a model of the hub, name a task or "
            "--annotations"
        )
    run_step = find_run(model_or_run, step)
    recipe = None if run_step is None else load_recipe(run_step.folder / "recipe.yaml")
    run_evals = {} if recipe is None else recipe.run_evals
    # With its own annotations a call means a file, also for a run that has evaluations.
    measures_file = not run_evals or "annotations" in fields
    names = _expanded(tasks, run_evals) or (["caption-file"] if measures_file else list(run_evals))
    jobs = _jobs(names, run_evals, fields, root, dataset_root, languages, split, str(model_or_run))
    # Its step too is checked before the data are read.
    parent = _results_parent(model_or_run) if run_step is None else _step_parent(run_step)
    # Before the model: reading the data finds its problems in seconds, loading may take minutes.
    evaluators = evals.build({name: job.config for name, job in jobs.items()})
    folder = to
    if folder is None:
        call = {"tasks": list(names), "root": root, "dataset_root": dataset_root, "split": split}
        call |= {"languages": languages, "device": device, "dtype": dtype, **fields}
        # Neither its processes nor their devices: the same call may go on with others.
        # A run may move, or be named by a checkpoint's folder: its results move with it.
        call |= {"model": _absolute(model_or_run)} if run_step is None else {}
        folder = dist.on_main(lambda: _results_folder(parent, _jobs_name(jobs), call))
    features_folder = features or folder / "features"
    with placement.threads(None if recipe is None else recipe.threads):
        if recipe is None:
            opened = _open_model(model_or_run, own_device, dtype, device_map, quantize, base)
        elif device_map is not None or quantize is not None:
            option = "quantize" if device_map is None else "device_map"
            raise UserError(
                f"{option} = {device_map or quantize!r} is for model folders, and {model_or_run} is"
                f" a run; `internvl export {model_or_run} --to FOLDER`, and evaluate FOLDER"
            )
        else:
            opened = _open_run(open_model(model_or_run, step=step, base=base), own_device, dtype)
        handle, numerics = opened.handle, opened.numerics
        # Below the weights' fingerprint: features of another checkpoint must never be reused.
        cache = features_folder / dist.on_main(
            lambda: _fingerprint(Path(model_or_run), run_step, handle, numerics)
        )
        with opened.computing:
            metrics = evals.run_all(evaluators, handle, folder, features=cache)
    counts = dist.from_main({name: evaluators[name].counts() for name in jobs})

    def finish() -> None:
        _record(folder / "result.json", counts, numerics.differences)
        # Only now: until everything is measured, the next call resumes from them.
        if features is None:
            shutil.rmtree(features_folder, ignore_errors=True)
        _write_result_lines(folder, output, jobs, metrics, opened, str(model_or_run))

    dist.main_alone(finish)
    tables = {name: evaluators[name].table() for name in jobs}
    return Measured(metrics, counts, tables, folder, str(numerics), dist.world_size())


def score(
    answers: str | Path,
    task: str = "",
    *,
    model: str | Path = "",
    to: str | Path | None = None,
    root: str | Path = Path("data"),
    dataset_root: str | None = None,
    languages: Sequence[str] | str = (),
    split: str = "test",
    step: int | None = None,
    **fields: Any,
) -> Measured:
    """Scores a file of answers without a model, as `measure` scores those of one.

    Args:
        answers: rows of an evaluation's result, RESULT/TASK.jsonl, or the original's result file:
            JSON Lines or a list of objects with image_id and answer or caption.
        task: by default `caption-file`, or the only evaluation of the run.
        model: run whose evaluation `task` is, or name of a released model to compare with.
        to: folder for the results, by default out/evaluate/answers-NAME.
        root, dataset_root, languages, split, fields: as of `measure`.

    Raises:
        ConfigError: a task whose answers cannot be scored alone.
        UserError: answers that cannot be used, or do not belong to the task.
    """
    run_step = find_run(model, step) if model else None
    run_evals = {} if run_step is None else load_recipe(run_step.folder / "recipe.yaml").evals
    name = task or (next(iter(run_evals)) if len(run_evals) == 1 else "caption-file")
    root, texts = Path(root), list_texts(languages, "language")
    jobs = _jobs([name], run_evals, fields, root, dataset_root, texts, split, str(model))
    if len(jobs) > 1:
        raise ConfigError(f"{name}: a file of answers is for one language; name it (--language)")
    ((job_name, job),) = jobs.items()
    scorer = evals.FROM_ANSWERS.get(job.config.type)
    if scorer is None:
        raise ConfigError(
            f"{name}: only answers can be scored without a model, those of "
            f"{', '.join(evals.FROM_ANSWERS)}; leave the file of answers out"
        )
    file = Path(answers)
    evaluator = scorer(job.config, read_file(file))
    folder = _path(to)
    if folder is None:
        call = {"answers": _absolute(file), "task": name, "root": root, "split": split}
        call |= {"dataset_root": dataset_root, "languages": texts, **fields}
        folder = _results_folder(Path("out/evaluate") / f"answers-{file.stem}", job_name, call)
    metrics = evals.run_all({job_name: evaluator}, None, folder)
    counts = {job_name: evaluator.counts()}
    _record(folder / "result.json", counts, "")
    return Measured(metrics, counts, {job_name: evaluator.table()}, folder)


def _join(device: str | None, device_map: str | None) -> str | None:
    """Joins the processes that share this evaluation, if any; returns this one's device.

    Raises:
        ConfigError: several processes, and an option that is for a single one.
    """
    joined = dist.init_from_env("cpu" if device == "cpu" else "auto")
    if dist.world_size() == 1:
        return device
    if not dist.is_main():
        log.get_logger().setLevel(logging.WARNING)
    processes = counted(dist.world_size(), "process", "processes")
    if device_map is not None:
        raise ConfigError(
            f"device_map: {device_map} spreads one model over all GPUs of a single process, and "
            f"there are {processes}; start one, or leave the option out"
        )
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"device: {device} is one device, and each of {processes} needs its own; leave the "
            "option out"
        )
    return str(joined)


def compare(
    run_folder: str | Path,
    steps: Sequence[int],
    tasks: Sequence[str] | str = (),
    *,
    to: str | Path | None = None,
    **options: Any,
) -> dict[int, Measured]:
    """Evaluates several checkpoints of a run; returns step -> what `measure` returns.

    Args:
        to: as of `measure`; each step has a subfolder of it.
        options: of `measure`.

    Raises:
        ConfigError, UserError: as `measure`; every step is checked before the first is measured.
    """
    for step in steps:
        run_step = find_run(run_folder, step)
        if run_step is not None:
            _ = run_step.checkpoint
    return {
        step: measure(
            run_folder,
            tasks,
            to=None if to is None else Path(to) / f"{step:06d}",
            step=step,
            **options,
        )
        for step in dict.fromkeys(steps)
    }


def _jobs(
    names: Sequence[str],
    run_evals: Mapping[str, EvalConfig],
    fields: Mapping[str, Any],
    root: Path,
    dataset_root: str | None,
    languages: Sequence[str],
    split: str,
    model: str,
) -> dict[str, Job]:
    """Makes the jobs of `measure`: several for a published set with several languages.

    Args:
        model: its name in the original's result files.
    """
    types = {name: _type_of(name, run_evals) for name in names}
    # A broken image costs its own line, not the evaluation; a recipe says itself what it does.
    policy = {"on_bad_sample": "skip_broken"}
    jobs: dict[str, Job] = {}
    for name, type_name in types.items():
        options = _options_of(type_name, set(types.values()), fields)
        # The run's evaluations first: their names are the user's, and may equal a published one.
        if name in run_evals:
            jobs[name] = Job(eval_config(**{**vars(run_evals[name]), **options}), name, "en")
        elif type_name == "benchmark":
            jobs[name] = _benchmark_job(name, root, dataset_root, model, policy | options)
        elif name in published_sets.TASKS:
            jobs |= _published_jobs(name, root, dataset_root, languages, split, policy | options)
        else:
            jobs[name] = _user_job(name, languages, split, policy | options)
    return jobs


def _expanded(names: Sequence[str], run_evals: Mapping[str, EvalConfig]) -> list[str]:
    """Replaces keys that stand for several, such as `vqa`, by these."""
    expanded: dict[str, None] = {}
    for name in names:
        task = None if name in run_evals else benchmarks.find(name)
        expanded |= dict.fromkeys(task.keys if task is not None and task.keys else [name])
    return list(expanded)


def _jobs_name(jobs: Mapping[str, Job]) -> str:
    """Returns a name for a folder of the results of these evaluations."""
    # A user's file has a name, its task is one of all files.
    names = [
        f"{name}-{job.dataset}" if name in published_sets.USER_TASKS else name
        for name, job in jobs.items()
    ]
    joined = "+".join(names).replace("/", "-")
    # File systems end at 255 bytes; the call itself is in the folder.
    short = joined if len(joined) <= _LONGEST_NAME else f"{names[0]}+{len(names) - 1}-more"
    return short[:_LONGEST_NAME]


def _absolute(model: str | Path) -> Path:
    """Returns the path of a folder wherever it is named from; a hub id as it is."""
    path = Path(model).expanduser()
    return path.resolve() if path.exists() else path


def _results_parent(model: str | Path) -> Path:
    # Two levels tell exports of several runs apart, and the owners of a hub id.
    path = _absolute(model)
    return Path("out/evaluate") / "-".join(name for name in path.parts[-2:] if name != path.anchor)


def _step_parent(run_step: RunStep) -> Path:
    _, step = run_step.checkpoint
    return run_step.folder / "evals/evaluate" / f"{step:06d}"


def _results_folder(parent: Path, name: str, call: Mapping[str, Any]) -> Path:
    """Returns the folder of this call of `measure`; creates it with the call in a file.

    A folder `name` of another call, with other options or another model of the same name, is left
    alone: this one's is then `name`-2, `name`-3, …
    """
    text = json.dumps(call, default=str, indent=1, sort_keys=True)
    candidates = (parent / (f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    folder = next(folder for folder in candidates if _is_free_for(folder, text))
    write_text(folder / _CALL, text)
    return folder


def _is_free_for(folder: Path, call: str) -> bool:
    saved = folder / _CALL
    return not folder.exists() or (saved.exists() and saved.read_text("utf-8") == call)


@dataclass(frozen=True)
class _Opened:
    """A loaded model and the context in which it is measured."""

    handle: Any
    """A Chat or Dual."""
    computing: AbstractContextManager[None]
    numerics: _Numerics


def _open_run(opened: OpenedModel, device: str | None, dtype: str | None) -> _Opened:
    """Loads a run's model as its own evaluations have it; `dtype` replaces the recipe's."""
    recipe = opened.recipe
    assert recipe is not None
    actual_device = loading.resolve_device(device)
    chosen = dtype or recipe.dtype
    run_precision = _precision(recipe.dtype)
    run_precision += " with float8 products" if recipe.compute.float8 else ""
    run_precision += f" on {recipe.model.quantize} weights" if recipe.model.quantize else ""
    # What `auto` meant in the run is unknown, so it does not count as a difference.
    run_device = actual_device.type if recipe.device == "auto" else recipe.device
    computing: AbstractContextManager[None]
    # float16, which no run trains in: all weights in it, as `load` gives any model.
    if chosen not in placement.DTYPES:
        weights_dtype = loading.resolve_dtype(chosen, actual_device)
        options = LoadOptions(device=actual_device, dtype=weights_dtype)
        handle = loading.load_opened(opened, options)
        precision, computing = f"{chosen} weights", nullcontext()
        attention = "torch's own"
    else:
        handle = loading.load_as_trained(opened, actual_device, chosen)
        precision, computing = _precision(chosen), compilation.evaluating(actual_device, chosen)
        attention = backends.available_compute(recipe.compute, actual_device).attention
    numerics = _Numerics(
        (precision, actual_device.type, f"attention {attention}"),
        (run_precision, run_device, f"attention {recipe.compute.attention}"),
        "inside the run",
    )
    return _Opened(handle, computing, numerics)


def _precision(dtype: str) -> str:
    """Returns a recipe's `dtype` in words."""
    # Not "bfloat16 weights": trained weights are float32 in any case.
    return dtype if dtype == "float32" else f"{dtype} autocast"


def _open_model(
    name: str | Path,
    device: str | None,
    dtype: str | None,
    device_map: str | None,
    quantize: str | None,
    base: Replacements,
) -> _Opened:
    """Loads a model that is no run's, all weights in one dtype."""
    options: dict[str, Any] = {"device_map": device_map, "quantize": quantize}
    handle = loading.load(name, device=device, dtype=dtype, base=base, **options)
    loaded_dtype = str(handle.model.dtype).removeprefix("torch.")
    loaded_dtype += f" on {quantize} weights" if quantize else ""
    # A folder that does not say its dtype cannot differ from it.
    stored_dtype = _stored_dtype(Path(handle.folder)) or loaded_dtype
    numerics = _Numerics((loaded_dtype,), (stored_dtype,), "the folder's weights")
    return _Opened(handle, nullcontext(), numerics)


def _stored_dtype(folder: Path) -> str | None:
    """Returns the dtype of the weights by config.json, or None."""
    if not (folder / "config.json").is_file():
        return None
    config = hub.read_json(folder / "config.json")
    # Newer versions of transformers write `dtype`, earlier ones `torch_dtype`.
    return config.get("dtype") or config.get("torch_dtype")


def _record(file: Path, counts: Mapping[str, Mapping[str, int]], differences: str) -> None:
    """Sets NAME/computed and NAME/left_out of these evaluations in `result.json`; no differences
    and nothing left out remove them."""
    results = json.loads(file.read_text(encoding="utf-8"))
    for name, of_evaluation in counts.items():
        noted = {"computed": differences, "left_out": of_evaluation.get(evals.LEFT_OUT)}
        for key, value in noted.items():
            # The file may hold the value of an earlier call.
            results.pop(f"{name}/{key}", None)
            results |= {f"{name}/{key}": value} if value else {}
    write_json(file, results, indent=1)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _type_of(name: str, run_evals: Mapping[str, EvalConfig]) -> str:
    """Returns the type of a task. Raises ConfigError if there is no task of that name."""
    if name in run_evals:
        return run_evals[name].type
    if benchmarks.find(name) is not None:
        return "benchmark"
    if name in published_sets.TASKS:
        return published_sets.TASKS[name].type
    if name in published_sets.USER_TASKS:
        return name.partition("-")[0]
    raise ConfigError(published_sets.no_such(name, run_evals))


def _options_of(name: str, types: set[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `fields` that are keys of type `name`, in a call with tasks of these `types`."""
    # A key of none of the types is passed on, so that the evaluation refuses it by name.
    valid = set[str]().union(*map(eval_keys, types))
    return {k: v for k, v in fields.items() if k in eval_keys(name) or k not in valid}


def _published_jobs(
    name: str,
    root: Path,
    dataset_root: str | None,
    languages: Sequence[str],
    split: str,
    fields: dict[str, Any],
) -> dict[str, Job]:
    """Returns the evaluations of a published set, one per language."""
    task = published_sets.TASKS[name]
    folder = root / task.root
    if dataset_root is not None:
        # Both placeholders of CLIP_benchmark's option of this name.
        folder = Path(dataset_root.format(dataset=task.dataset, dataset_cleaned=task.dataset))
    configs = published_sets.configs(name, folder, languages=languages, split=split, **fields)
    chosen = languages or task.languages[:1]
    return {
        key: Job(config, task.dataset, language)
        for (key, config), language in zip(configs.items(), chosen, strict=True)
    }


def _benchmark_job(
    name: str, root: Path, dataset_root: str | None, model: str, fields: dict[str, Any]
) -> Job:
    """Returns the evaluation of a benchmark below the folder of the published sets."""
    task = benchmarks.find(name)
    assert task is not None
    folder = root if dataset_root is None else Path(dataset_root)
    keys = {"checkpoint": model, "annotations": folder, **fields}
    return Job(eval_config(type="benchmark", task=task.name, **keys), task.name, "en")


def _user_job(name: str, languages: Sequence[str], split: str, fields: dict[str, Any]) -> Job:
    """Returns the evaluation of the user's files that `fields` name."""
    if fields.get("annotations") is None:
        raise ConfigError(f"{name} needs --annotations: {published_sets.USER_TASKS[name]}")
    annotations = Path(fields["annotations"])
    # By default image paths are relative to the folder of the annotation file.
    images = annotations if annotations.is_dir() else annotations.parent
    type_name = name.partition("-")[0]
    defaults = {"images": images, "split": split}
    # Only keys of this type: a classification has no `images` and no `split`.
    keys = {key: value for key, value in defaults.items() if key in eval_keys(type_name)}
    keys |= {**fields, "type": type_name}
    language = languages[0] if languages else "en"
    return Job(eval_config(**keys), annotations.stem, language)


def _fingerprint(named: Path, run_step: RunStep | None, handle: Any, numerics: _Numerics) -> str:
    """Returns a hash of the weight files' names, sizes and times, and of the precision."""
    # Not of their content, which may be tens of gigabytes.
    folders = {named, Path(handle.folder)}
    files = {
        file for folder in folders for pattern in _WEIGHT_FILES for file in folder.glob(pattern)
    }
    if run_step is not None:
        checkpoints, step = run_step.checkpoint
        files |= {*(checkpoints / f"{step:06d}").rglob("*")}
    states = sorted((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return blake2b(repr((states, numerics.current)).encode(), digest_size=8).hexdigest()


def _write_result_lines(
    folder: Path,
    output: Path | None,
    jobs: Mapping[str, Job],
    metrics: Mapping[str, float],
    opened: _Opened,
    model: str,
) -> None:
    """Appends the originals' result lines of all jobs; writes the captions of caption jobs."""
    differences = opened.numerics.differences
    for name, job in jobs.items():
        prefix = f"{name}/"
        values = {m.removeprefix(prefix): v for m, v in metrics.items() if m.startswith(prefix)}
        if isinstance(job.config, CaptionEval):
            _write_captions(folder, name, job)
            lines: list[Any] = [_caption_line(job, job.config, values, opened.handle, model)]
        else:
            lines = _benchmark_lines(job, values, model)
            # A caption line is a list and has no room for another key.
            lines = [line | ({"computed": differences} if differences else {}) for line in lines]
        _append(output or folder / "result.jsonl", lines)


def _benchmark_lines(job: Job, values: dict[str, float], pretrained: str) -> list[dict[str, Any]]:
    """Returns CLIP_benchmark's result lines: one for each mode, and for each re-ranked one."""
    if not isinstance(job.config, RetrievalEval | ClassifyEval):
        return []
    task_name = "retrieval" if job.config.type == "retrieval" else "classification"
    lines = []
    for mode in job.config.modes:
        for prefix, task in (
            (mode, f"zeroshot_{task_name}"),
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
                        "model": f"internvl_{mode}_{task_name}_hf",
                        "pretrained": pretrained,
                        "task": task,
                        "metrics": metrics,
                        "language": job.language,
                    }
                )
    return lines


def _append(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_captions(folder: Path, name: str, job: Job) -> None:
    """Writes the original's results file, [{image_id, caption}] in DATASET_yymmddHHMMSS.json."""
    rows = (folder / "result" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [
        {"image_id": row["image_id"], "caption": row["answer"]}
        for row in map(json.loads, rows)
        if "answer" in row  # other rows list samples that were left out
    ]
    file = folder / f"{job.dataset}_{datetime.now():%y%m%d%H%M%S}.json"
    file.write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")


def _caption_line(
    job: Job, config: CaptionEval, values: dict[str, float], handle: Any, model: str
) -> list[Any]:
    """Returns the original's result line: [dataset, prompt, average length, metrics] for
    InternVL-G, [checkpoint, dataset, average length, metrics] for chat models."""
    # Fewer with `metrics: exact`.
    metrics = {theirs: values[ours] for ours, theirs in _CAPTION_METRICS.items() if ours in values}
    heads = {
        "chat": [model, job.dataset],
        "dual": [job.dataset, config.prompt or handle.caption_prompt],
    }
    return [*heads[handle.family], values["average_length"], metrics]


def published(model: str | Path, name: str) -> float | None:
    """Returns the published value of metric `name` of `run`, on the same scale, or None.

    Only for an unchanged released model (its hub id, or a folder of the same name), and for a run
    folder with the name of a published training.
    """
    run = find_run(model)
    training = (str(model), "") if run is None else zoo.training(run.folder.resolve().name)
    if training is None:
        return None
    base, recipe = training
    try:
        released = zoo.find(base)
    except UnknownModel:
        return None
    evaluation, _, metric = name.partition("/")
    task, language = _task_of(evaluation)
    # zoo/ has the numbers as printed: percent but for chat captions, which are fractions.
    percent = released.family == "dual" or benchmarks.find(task) is not None
    mode = "g" if released.family == "dual" else "chat"
    # Scores after re-ranking (ITM) are not published.
    if metric[:2] in ("c_", "g_") and "_itm_" not in metric:
        mode, metric = metric[0], metric[2:]
        for benchmark_name, paper_name in _DIRECTIONS.items():
            metric = metric.replace(benchmark_name, paper_name)
    for score in zoo.scores(released.name):
        # A score with a recipe is of the model after fine-tuning.
        if (score.task, score.metric, score.mode) != (task, metric, mode) or score.recipe != recipe:
            continue
        if score.language == language:
            return score.value / 100 if percent and metric not in _IN_POINTS else score.value
    return None


def _task_of(evaluation: str) -> tuple[str, str]:
    """Returns (task, language) of an evaluation, as zoo/ names them."""
    # CLIP_benchmark, whose names we keep, writes Chinese "cn", and XTD "zh".
    for name in ("retrieval-flickr30k", "retrieval-coco"):
        if evaluation == f"{name}-cn":
            return name, "zh"
    if evaluation.startswith("retrieval-xtd-"):
        return "retrieval-xtd", evaluation.removeprefix("retrieval-xtd-")
    return evaluation, "en"


def render(
    metrics: Mapping[str, float],
    model: str | Path = "",
    counts: Mapping[str, Mapping[str, int]] | None = None,
    tables: Mapping[str, Table | None] | None = None,
) -> str:
    """Renders the metrics with the published values: a table or lines for each evaluation.

    Args:
        model: the model whose published values are shown; empty for none.
        counts: of `Measured`. A published value is shown only if as many images and texts were
            measured as the published set has; otherwise a note says so.
        tables: of `Measured`; an evaluation without one has a line for every metric.
    """
    width = max(map(len, metrics), default=0)
    # A dict as an ordered set: metrics of one evaluation share their note.
    lines, notes = [], dict[str, None]()
    by_evaluation: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        evaluation, _, metric = name.rpartition("/")
        by_evaluation.setdefault(evaluation, {})[metric] = value
    for evaluation, values in by_evaluation.items():
        references = {}
        if model and counts is not None:
            pairs = ((metric, published(model, f"{evaluation}/{metric}")) for metric in values)
            references = {metric: value for metric, value in pairs if value is not None}
            note = _incomplete_set_note(evaluation, counts[evaluation]) if references else ""
            if note:
                notes[note], references = None, {}
        table = (tables or {}).get(evaluation)
        if table is not None:
            measured = _listed((counts or {}).get(evaluation, {}))
            lines += [f"{evaluation}: {measured}" if measured else f"{evaluation}:"]
            lines += [f"  {line}" for line in table.render(values, references)]
            lines += ["  (in brackets: published)"] if references else []
            continue
        lines += [f"{'':{width}}  measured  published"] if references else []
        for metric, value in values.items():
            line = f"{f'{evaluation}/{metric}':{width}}  {value:8.4f}"
            reference = references.get(metric)
            lines.append(line if reference is None else f"{line}  {reference:9.4f}")
    return "\n".join([*lines, *notes])


def closing(measured: Measured) -> str:
    """Renders what was measured, how and by how many processes, and where the results are."""
    # A table's head says already what it was measured on.
    sizes = [
        f"{name}: {_listed(counts)}"
        for name, counts in measured.counts.items()
        if measured.tables.get(name) is None
    ]
    processes = f" by {measured.ranks} processes" if measured.ranks > 1 else ""
    # Nothing was computed of answers that were there.
    how = f"computed in {measured.computed}{processes}; " if measured.computed else ""
    computed = f"{how}written to {measured.folder}"
    return "; ".join([*sizes, computed])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {noun}" for noun, count in counts.items())


def render_steps(measured: Mapping[int, Measured]) -> str:
    """Renders a table of metrics with a column for each step."""
    names = dict.fromkeys(name for result in measured.values() for name in result.metrics)
    heads = [f"step {step}" for step in measured]
    width, column = max(map(len, names), default=0), max(8, *map(len, heads))
    lines = ["  ".join([" " * width, *(f"{head:>{column}}" for head in heads)])]
    for name in names:
        # A step may lack a metric, such as one of answers that are all empty.
        values = (result.metrics.get(name) for result in measured.values())
        cells = (f"{'' if value is None else f'{value:.4f}':>{column}}" for value in values)
        lines.append("  ".join([f"{name:{width}}", *cells]))
    return "\n".join(lines)


def _incomplete_set_note(evaluation: str, counts: Mapping[str, int]) -> str:
    """Returns a note if the measured set is not the whole published one, else an empty text."""
    benchmark = benchmarks.find(evaluation)
    if benchmark is not None:
        sizes = [dataset.questions for dataset in benchmark.sets.values()]
        questions = sum(size for size in sizes if size is not None)
        if None in sizes or questions == counts.get("questions"):
            return ""
        return (
            f"{evaluation}: published values are for {questions:,} questions; this set has "
            f"{counts.get('questions', 0):,}"
        )
    task = published_sets.published_set(evaluation)
    if task is None:
        return ""
    whole = f"{task.num_images:,} images and {task.num_texts:,} texts"
    measured = " and ".join(f"{count:,} {noun}" for noun, count in counts.items())
    if measured == whole:
        return ""
    return f"{evaluation}: published values are for {whole}; this set has {measured}"
