"""Evaluates a model, adapter or run folder: `evaluate.run(...)`."""

import shutil
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from internvl import dist, evals
from internvl.compute import placement
from internvl.config import CaptionEval
from internvl.config.recipes import load_recipe
from internvl.data.arguments import list_texts
from internvl.errors import ConfigError, ModelFolderError
from internvl.evals.answers import read_file
from internvl.evals.call import folders, jobs, lines, opening, page
from internvl.evals.call.measured import Measured as Measured
from internvl.evals.call.measured import closing as closing
from internvl.evals.call.measured import render as render
from internvl.evals.call.measured import render_steps as render_steps
from internvl.evals.call.published import published as published
from internvl.files import no_such_model
from internvl.inference.opened import find_run, open_model
from internvl.models.bases import Replacements


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
    on any number of processes. A run is measured as it measures itself (trained weights in float32,
    products in its `dtype`, its attention and threads), so the scores of its last step are
    reproduced. Differences are in `computed`, in `result.json` as NAME/computed, and in
    CLIP_benchmark's lines.

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
    own_device = opening.join(device, device_map)
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
    default = ["caption-file"] if measures_file else list(run_evals)
    names = jobs.expanded(tasks, run_evals) or default
    model = str(model_or_run)
    todo = jobs.of_tasks(names, run_evals, fields, root, dataset_root, languages, split, model)
    # Its step too is checked before the data are read.
    parent = folders.of_model(model_or_run) if run_step is None else folders.of_step(run_step)
    open_once = cache(partial(open_model, model_or_run, step=step, base=base))
    # A hub id may have to be downloaded for this.
    if Path(model_or_run).exists():
        jobs.check_family(todo, open_once)
    # Before the model: reading the data finds its problems in seconds, loading may take minutes.
    evaluators = evals.build({name: job.config for name, job in todo.items()})
    folder = to
    if folder is None:
        call = {"tasks": list(names), "root": root, "dataset_root": dataset_root, "split": split}
        call |= {"languages": languages, "device": device, "dtype": dtype, **fields}
        call |= {"quantize": quantize} if quantize else {}
        # Neither its processes nor their devices: the same call may go on with others.
        # A run may move, or be named by a checkpoint's folder: its results move with it.
        call |= {"model": folders.absolute(model_or_run)} if run_step is None else {}
        folder = dist.on_main(lambda: folders.of_call(parent, jobs.title(todo), call))
    features_folder = features or folder / "features"
    with placement.threads(None if recipe is None else recipe.threads):
        opened = opening.load(open_once(), own_device, dtype, device_map, quantize)
        numerics = opened.numerics
        # Below the weights' fingerprint: features of another checkpoint must never be reused.
        weights = dist.on_main(lambda: opening.fingerprint(open_once(), numerics))
        with opened.computing:
            metrics = evals.run_all(
                evaluators, opened.handle, folder, features=features_folder / weights
            )
    counts = dist.from_main({name: evaluators[name].counts() for name in todo})

    def finish() -> None:
        lines.record(folder / "result.json", counts, numerics.differences)
        # Only now: until everything is measured, the next call resumes from them.
        if features is None:
            shutil.rmtree(features_folder, ignore_errors=True)
        lines.append(folder, output, todo, metrics, opened, model)
        label = model if run_step is None else f"{model} step {run_step.checkpoint[1]:06d}"
        # Published values are for test splits only.
        whose = model_or_run if split == "test" else ""
        page.write(folder, todo, counts, label=label, model=whose, computed=str(numerics))

    dist.main_alone(finish)
    tables = {name: evaluators[name].table() for name in todo}
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
    todo = jobs.of_tasks([name], run_evals, fields, root, dataset_root, texts, split, str(model))
    if len(todo) > 1:
        raise ConfigError(f"{name}: a file of answers is for one language; name it (--language)")
    ((job_name, job),) = todo.items()
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
        call = {"answers": folders.absolute(file), "task": name, "root": root, "split": split}
        call |= {"dataset_root": dataset_root, "languages": texts, **fields}
        folder = folders.of_call(Path("out/evaluate") / f"answers-{file.stem}", job_name, call)
    metrics = evals.run_all({job_name: evaluator}, None, folder)
    counts = {job_name: evaluator.counts()}
    lines.record(folder / "result.json", counts, "")
    if isinstance(job.config, CaptionEval):
        of_job = {m.removeprefix(f"{job_name}/"): value for m, value in metrics.items()}
        lines.write_captions(folder / "result", job_name, job, of_job, str(model))
    label, whose = str(model or file), model if split == "test" else ""
    page.write(folder, todo, counts, label=label, model=whose, computed="")
    return Measured(metrics, counts, {job_name: evaluator.table()}, folder)


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


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
