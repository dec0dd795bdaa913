"""The evaluations that a call names: tasks, options and files -> sections of a recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl.config import EvalConfig, EvalSection, eval_config, eval_keys
from internvl.datasets import labelled
from internvl.datasets import published as published_sets
from internvl.datasets import tasks as benchmarks
from internvl.errors import ConfigError, UserError
from internvl.inference.opened import OpenedModel

_LONGEST_NAME = 100


@dataclass(frozen=True)
class Job:
    """An evaluation, with the data set and language that result files name."""

    config: EvalSection
    dataset: str
    language: str


def of_tasks(
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
        elif labelled.find(name) is not None:
            jobs |= _labelled_jobs(name, root, dataset_root, languages, split, policy | options)
        else:
            jobs[name] = _user_job(name, languages, split, policy | options)
    return jobs


def check_family(todo: Mapping[str, Job], open_named: Callable[[], OpenedModel]) -> None:
    """Raises UserError for evaluations that a model's family cannot do, before data are read."""
    embedding = [(n, j) for n, j in todo.items() if j.config.type in ("classify", "retrieval")]
    # Opening a model from parts takes a while.
    if not embedding:
        return
    opened = open_named()
    if opened.files.family != "dual":
        name, job = embedding[0]
        raise UserError(
            f"{name}: an evaluation of type {job.config.type} needs an InternVL-14B model; "
            f"{opened.name} is a chat model"
        )


def expanded(names: Sequence[str], run_evals: Mapping[str, EvalConfig]) -> list[str]:
    """Replaces keys that stand for several, such as `vqa`, by these."""
    expanded: dict[str, None] = {}
    for name in names:
        task = None if name in run_evals else benchmarks.find(name)
        expanded |= dict.fromkeys(task.keys if task is not None and task.keys else [name])
    return list(expanded)


def title(jobs: Mapping[str, Job]) -> str:
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
    if labelled.find(name) is not None:
        return "classify"
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


def _labelled_jobs(
    name: str,
    root: Path,
    dataset_root: str | None,
    languages: Sequence[str],
    split: str,
    fields: dict[str, Any],
) -> dict[str, Job]:
    """Returns the classifications of a labelled set, one per language."""
    entry = labelled.find(name)
    assert entry is not None
    keys = {"annotations": labelled.folder_of(entry, root, dataset_root), "set": entry.name}
    keys |= {"split": split, "batch_size": 64, **fields}
    return {
        labelled.evaluation_name(entry, language): Job(
            eval_config(type="classify", language=language, **keys), entry.dataset, language
        )
        for language in languages or entry.languages[:1]
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
    # Only keys of this type: a classification has no `images`.
    keys = {key: value for key, value in defaults.items() if key in eval_keys(type_name)}
    keys |= {**fields, "type": type_name}
    language = languages[0] if languages else "en"
    return Job(eval_config(**keys), annotations.stem, language)
