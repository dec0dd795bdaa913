"""`clip_benchmark eval …`: CLIP_benchmark's retrieval of InternVL-14B as `internvl evaluate`."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from internvl.compat.translation import Translation, take_flags
from internvl.errors import ConfigError

_MODEL = re.compile(r"internvl_(?P<mode>[cg])_(?P<task>retrieval|classification)(_hf)?")


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def translate(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates `eval --model_type internvl …`."""
    table = _table()
    positional, flags = take_flags(
        words, table["valued"], table["switches"], several=table["several"]
    )
    # `build`, its other verb, makes tables of result files only.
    if positional != ["eval"]:
        raise ConfigError("clip_benchmark: `eval` and its flags are expected")
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
            "internvl_c_retrieval for a .pth) is expected"
        )
    tasks, languages = _tasks(flags, last, model["task"])
    # CLIP_benchmark calls the default folder root.
    root = last.get("dataset_root", "root")
    command = [
        # Without the last slash, as its result lines have the path.
        *("evaluate", last["pretrained"].rstrip("/") or "/", *tasks, "--mode", model["mode"]),
        *("--dataset-root", root, "--split", last.get("split", "test")),
        *(("--language", ",".join(languages)) if languages else ()),
        *("--batch-size", last.get("batch_size", "64")),
        *(("--recall-k", ",".join(flags["recall_k"])) if "recall_k" in flags else ()),
        *(("--features", last["feature_root"]) if "feature_root" in last else ()),
        # Autocast off leaves the weights in float32.
        *(("--dtype", "float32") if "no_amp" in flags else ()),
        *("--output", _output(last)),
    ]
    notes = [f"--{flag}: changes nothing here" for flag in flags if flag in table["nothing"]]
    if "skip_existing" in flags and Path(_output(last)).exists():
        return Translation(notes=tuple(notes), done=f"{_output(last)} exists: skipped")
    return Translation(commands=(tuple(command),), notes=tuple(notes))


def _tasks(
    flags: Mapping[str, Sequence[str]], last: Mapping[str, str], model_task: str
) -> tuple[list[str], list[str]]:
    """Returns the tasks of `internvl evaluate`, and the languages of a multilingual one.

    Raises:
        ConfigError: a task, data set or language that it does not have.
    """
    task = last.get("task", "auto")
    # The model decides, as its name tells what it is for.
    if task == "auto":
        task = f"zeroshot_{model_task}"
    if task == "zeroshot_retrieval_with_itm":
        raise ConfigError(
            "--task zeroshot_retrieval_with_itm: its module is missing in the original; use "
            "`internvl evaluate MODEL TASK --rerank 20`"
        )
    if task != "zeroshot_retrieval":
        raise ConfigError(
            f"--task {task}: for a folder of images for each class use `internvl evaluate MODEL "
            "classify-folder --annotations FOLDER`; other tasks are not here"
        )
    # A repeated --language is the last; several after one flag are all measured.
    languages = list(flags.get("language", ["en"]))
    table = _table()["retrieval"]
    names = []
    for dataset in flags.get("dataset", ["cifar10"]):
        if dataset not in table:
            raise ConfigError(f"--dataset {dataset}: not one of {', '.join(table)}")
        rows = table[dataset]
        for language in languages:
            name = rows.get(language, rows.get("*"))
            if name is None:
                raise ConfigError(f"--language {language}: {dataset} has {', '.join(rows)}")
            names.append(name)
    # Tasks of one language take no option for it.
    multilingual = any("*" in table[dataset] for dataset in flags.get("dataset", ()))
    return list(dict.fromkeys(names)), languages if multilingual else []


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
