"""`clip_benchmark eval …`: CLIP_benchmark's evaluations of InternVL-14B as `internvl evaluate`."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from internvl.compat.translation import Translation, take_flags
from internvl.datasets import labelled
from internvl.errors import ConfigError
from internvl.files import read_yaml

_MODEL = re.compile(r"internvl_(?P<mode>[cg])_(?P<task>retrieval|classification)(_hf)?")


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_yaml(Path(__file__).with_suffix(".yaml"))
    return table


def translate(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates `eval --model_type internvl …`; `build FILE …` is done here."""
    if words[:1] == ["build"]:
        return _build(words[1:])
    table = _table()
    positional, flags = take_flags(
        words, table["valued"], table["switches"], several=table["several"]
    )
    if positional != ["eval"]:
        raise ConfigError("clip_benchmark: `eval` or `build` and its flags are expected")
    for flag in flags:
        if flag in table["refused"]:
            raise ConfigError(f"--{flag}: {table['refused'][flag]}")
    last = {flag: values[-1] for flag, values in flags.items() if values}
    # Its default is open_clip, whose models this package does not have.
    if last.get("model_type") != "internvl":
        raise ConfigError(f"--model_type {last.get('model_type', 'open_clip')}: internvl only")
    for flag in ("model", "pretrained"):
        if flag not in last:
            raise ConfigError(f"--{flag}: missing")
    model = _MODEL.fullmatch(last["model"])
    if model is None:
        raise ConfigError(
            f"--model {last['model']}: internvl_c_retrieval_hf or internvl_g_retrieval_hf (or "
            "internvl_c_retrieval for a .pth, and classification for retrieval) is expected"
        )
    groups = _groups(flags, last)
    # CLIP_benchmark calls the default folder root.
    root = last.get("dataset_root", "root")
    options = [
        *("--mode", model["mode"]),
        *("--dataset-root", root, "--split", last.get("split", "test")),
    ]
    more = [
        *("--batch-size", last.get("batch_size", "64")),
        *(_probe_options(last) if last.get("task") == "linear_probe" else ()),
        *(("--recall-k", ",".join(flags["recall_k"])) if "recall_k" in flags else ()),
        *(("--features", last["feature_root"]) if "feature_root" in last else ()),
        # Autocast off leaves the weights in float32.
        *(("--dtype", "float32") if "no_amp" in flags else ()),
        *("--output", _output(last)),
    ]
    # Without the last slash, as its result lines have the path.
    pretrained = last["pretrained"].rstrip("/") or "/"
    commands = tuple(
        (
            *("evaluate", pretrained, *tasks, *options),
            *(("--language", ",".join(languages)) if languages else ()),
            *more,
        )
        for tasks, languages in groups
    )
    # Those of a linear probe change nothing elsewhere.
    nothing = {*table["nothing"]}
    if last.get("task") == "linear_probe":
        nothing -= {*PROBE_OPTIONS}
    notes = [f"--{flag}: changes nothing here" for flag in flags if flag in nothing]
    if "skip_existing" in flags and Path(_output(last)).exists():
        return Translation(notes=tuple(notes), done=f"{_output(last)} exists: skipped")
    return Translation(commands=commands, notes=tuple(notes))


def _build(words: Sequence[str]) -> Translation:
    """Appends a row for every result line of some files to a CSV file, as the original."""
    files, flags = take_flags(words, {"output": "a file"})
    if not files:
        raise ConfigError("clip_benchmark build: files of result lines are expected")
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
            results = [json.loads(line) for line in lines if line.strip()]
            rows += [
                {
                    **result["metrics"],
                    **{key: value for key, value in result.items() if key != "metrics"},
                    "model_fullname": f"{result['model']} {result['pretrained']}",
                }
                for result in results
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: no file of result lines ({error})") from None
    output = Path(flags.get("output", ["benchmark.csv"])[-1])
    with output.open("a", encoding="utf-8", newline="") as target:
        # In the order in which they first come; the original's order is that of a set.
        writer = csv.DictWriter(target, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return Translation(done=f"{len(rows)} rows appended to {output}")


PROBE_OPTIONS = {
    "fewshot_k": "--shots",
    "fewshot_epochs": "--probe-epochs",
    "fewshot_lr": "--probe-lr",
    "seed": "--probe-seed",
}
"""Flag -> option of `internvl evaluate`, with `--task linear_probe`."""


def _probe_options(last: Mapping[str, str]) -> list[str]:
    """Returns the options of a linear probe."""
    options = ["--method", "probe"]
    for flag, option in PROBE_OPTIONS.items():
        # All images are its -1.
        if flag in last and (flag, last[flag]) != ("fewshot_k", "-1"):
            options += [option, last[flag]]
    return options


def _groups(
    flags: Mapping[str, Sequence[str]], last: Mapping[str, str]
) -> list[tuple[list[str], list[str]]]:
    """Returns, for each command, its tasks and the languages of those that take some.

    Raises:
        ConfigError: a task, data set or language that it does not have.
    """
    table = _table()
    task = last.get("task", "auto")
    if task in table["refused_tasks"]:
        raise ConfigError(f"--task {task}: {table['refused_tasks'][task]}")
    if task not in ("auto", "zeroshot_retrieval", "zeroshot_classification", "linear_probe"):
        raise ConfigError(f"--task {task}: the original has no such task")
    datasets = _datasets(flags.get("dataset", ["cifar10"]))
    # A repeated --language is the last; several after one flag are all measured.
    languages = list(flags.get("language", ["en"]))
    # `auto`: the data set decides, as there.
    retrieval = [dataset for dataset in datasets if dataset in table["retrieval"]]
    others = [dataset for dataset in datasets if dataset not in retrieval]
    if task == "zeroshot_retrieval" and others:
        choices = ", ".join(table["retrieval"])
        raise ConfigError(f"--dataset {others[0]}: not one of {choices}, which have texts")
    if task in ("zeroshot_classification", "linear_probe") and retrieval:
        raise ConfigError(f"--dataset {retrieval[0]}: has no classes; --task zeroshot_retrieval")
    groups = [_retrieval(retrieval, languages)] if retrieval else []
    return [*groups, _classification(others, languages)] if others else groups


def _classification(
    datasets: Sequence[str], languages: Sequence[str]
) -> tuple[list[str], list[str]]:
    names = []
    for dataset in datasets:
        entry = labelled.find(dataset)
        if entry is None:
            # VTAB's tasks on one set share the beginning of their names.
            reason = _table()["unread"].get(dataset.rpartition("/")[2].partition("_")[0])
            names_of_sets = ", ".join(entry.dataset for entry in labelled.entries().values())
            raise ConfigError(f"--dataset {dataset}: {reason or f'not one of {names_of_sets}'}")
        wrong = [language for language in languages if language not in entry.languages]
        if wrong:
            raise ConfigError(f"--language {wrong[0]}: {dataset} has {', '.join(entry.languages)}")
        names.append(entry.name)
    return list(dict.fromkeys(names)), [] if languages == ["en"] else list(languages)


def _datasets(names: Sequence[str]) -> list[str]:
    """Returns data sets, those of collections and of files with a name in each line included."""
    collections = _table()["collections"]
    datasets: list[str] = []
    for name in names:
        if Path(name).is_file():
            lines = Path(name).read_text(encoding="utf-8").splitlines()
            datasets += [line.strip() for line in lines if line.strip()]
        else:
            datasets += collections.get(name, [name])
    return datasets


def _retrieval(datasets: Sequence[str], languages: Sequence[str]) -> tuple[list[str], list[str]]:
    table = _table()["retrieval"]
    names = []
    for dataset in datasets:
        rows = table[dataset]
        for language in languages:
            name = rows.get(language, rows.get("*"))
            if name is None:
                raise ConfigError(f"--language {language}: {dataset} has {', '.join(rows)}")
            names.append(name)
    # Tasks of one language take no option for it.
    multilingual = any("*" in table[dataset] for dataset in datasets)
    return list(dict.fromkeys(names)), list(languages) if multilingual else []


def _output(last: Mapping[str, str]) -> str:
    """Returns the file of result lines, its placeholders filled in."""
    pretrained = last["pretrained"].rstrip("/")
    return last.get("output", "result.json").format(
        model=last["model"],
        pretrained=Path(pretrained).name,
        pretrained_full_path=pretrained.replace("/", "_"),
        task=last.get("task", "auto"),
        dataset=last.get("dataset", "").replace("/", "-"),
        language=last.get("language", "en"),
    )
