"""`evaluate.sh CHECKPOINT KEY [flags]`: the original's evaluations as `internvl evaluate`."""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from internvl import zoo
from internvl.compat.translation import Translation, take_flags
from internvl.config import eval_keys, eval_options
from internvl.datasets import published
from internvl.errors import ConfigError, UnknownModel
from internvl.files import read_yaml
from internvl.inference.opened import open_model
from internvl.models import hub


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_yaml(Path(__file__).with_suffix(".yaml"))
    table["keys"] = {key: [key] for key in table["keys"]["same"].split()} | table["keys"]["other"]
    return table


def keys() -> dict[str, list[str]]:
    """Returns every key of the original's evaluate.sh -> its tasks here."""
    keys: dict[str, list[str]] = _table()["keys"]
    return keys


def options() -> dict[str, str]:
    """Returns every flag of the original's evaluate.sh -> what stands for it here."""
    rows = {**_table()["valued"], **_table()["switches"]}
    return {
        flag: row.get("becomes") or (f"--{row['option']}" if "option" in row else "not needed")
        for flag, row in rows.items()
        if "refused" not in row
    }


def tasks() -> set[str]:
    """Returns the names of all tasks that `internvl evaluate` has."""
    return {line.split()[0] for line in published.list_tasks().splitlines()}


def translate(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates `CHECKPOINT KEY [flags]`, with GPUS=n in the environment."""
    table = _table()
    abouts = {flag: row["about"] for flag, row in table["valued"].items()}
    # Such as --limit, which whoever tries a long evaluation out looks for.
    names_of_ours = (key.replace("_", "-") for key in eval_options())
    ours = {flag: f"internvl evaluate CHECKPOINT TASK --{flag} …" for flag in names_of_ours}
    positional, flags = take_flags(words, abouts, tuple(table["switches"]), ours=ours)
    if len(positional) != 2:
        raise ConfigError("evaluate.sh: CHECKPOINT and KEY, such as pretrained/X caption-coco")
    # Results are named by the path, and a trailing slash is no part of it.
    checkpoint, key = positional[0].rstrip("/") or positional[0], positional[1]
    names = _tasks_of(key)
    for flag, row in table["valued"].items():
        if flag in flags and "refused" in row:
            raise ConfigError(f"--{flag}: {row['refused']}")
    _check_fetched(checkpoint)
    # A hub id is not opened: to download is for the evaluation itself.
    family = "chat" if hub.is_hub_id(checkpoint) else open_model(checkpoint).files.family
    notes = [
        f"--{flag}: changes nothing: {row['nothing']}"
        for flag, row in table["valued"].items()
        if flag in flags and "nothing" in row
    ]
    if family == "dual":
        if key not in table["captions"]:
            raise ConfigError(f"{key}: is for chat models, and {checkpoint} is an InternVL-14B")
        # Its evaluate.sh hands no flags on.
        notes += [f"--{flag}: changes nothing for InternVL-14B" for flag in flags]
        flags = {}
        options: list[str] = []
    else:
        options, more = _tiles(key, flags, names)
        notes += more
    options += _plain_options(flags, names)
    # The last two parts of its path, as the original names its file of result lines.
    model = "_".join(Path(checkpoint).parts[-2:])
    folder = Path(flags.get("out-dir", ["results"])[0])
    options += ["--to", str(folder / model), "--output", str(folder / f"{model}.txt")]
    more_options, more_notes = _devices(flags, environment)
    command = ("evaluate", checkpoint, *names, *options, *more_options)
    return Translation(commands=(command,), notes=tuple(notes + more_notes))


def _check_fetched(checkpoint: str) -> None:
    """Raises ConfigError, with the command that fetches it, for a released model that is absent."""
    # The guides fetch into this folder first, and a stranger may have skipped that.
    if Path(checkpoint).exists() or Path(checkpoint).parent.name != "pretrained":
        return
    try:
        released = zoo.find(checkpoint)
    except UnknownModel:
        return
    raise ConfigError(
        f"{checkpoint}: there is no such folder; `internvl models {released.name} --download --to "
        f"{checkpoint}` fetches it"
    )


def _tasks_of(key: str) -> list[str]:
    """Returns the tasks of a key. Raises ConfigError for an unknown or missing one."""
    if key not in keys():
        near = difflib.get_close_matches(key, keys(), n=1)
        hint = f"did you mean {near[0]}?" if near else "its keys are in docs/original.md"
        raise ConfigError(f"{key}: the original's evaluate.sh has no such key; {hint}")
    # Asked of the open set: keys work as soon as their task exists.
    missing = [name for name in keys()[key] if name not in tasks()]
    if missing:
        raise ConfigError(f"{key}: internvl evaluate has no task {missing[0]} yet")
    return keys()[key]


def _tiles(key: str, flags: Mapping[str, Any], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the option of tiles, and what to know about it."""
    table = _table()
    notes: list[str] = []
    if key in table["fixed"]:
        ignored = [
            f"--{flag}: changes nothing: the script of {key} takes no flags" for flag in flags
        ]
        return _option("tiles", names, str(table["fixed"][key])), ignored
    if "dynamic" in flags:
        # The empty beginning comes last and fits every key.
        default = next(n for start, n in table["max_num"].items() if key.startswith(start))
        return _option("tiles", names, flags.get("max-num", [str(default)])[0]), notes
    if "max-num" in flags:
        notes.append("--max-num: changes nothing without --dynamic")
    # A result that is far below the published one needs its reason said.
    notes.append("without --dynamic every image is one tile; published scores are with --dynamic")
    return _option("tiles", names, "one"), notes


def _plain_options(flags: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    """Returns the options of flags that have one."""
    rows = {**_table()["valued"], **_table()["switches"]}
    options: list[str] = []
    for flag, values in flags.items():
        if "option" in rows[flag]:
            options += _option(rows[flag]["option"], names, *values)
    bits = {"load-in-8bit": "8bit", "load-in-4bit": "4bit"}
    options += [word for flag, bit in bits.items() if flag in flags for word in ("--quantize", bit)]
    return options


def _option(name: str, names: Sequence[str], *values: str) -> list[str]:
    """Returns `--name value`. Raises ConfigError if no task has such an option."""
    # Refused here, since the error of `internvl evaluate` names flags nobody typed.
    key = name.replace("-", "_")
    types = {
        published.TASKS[task].type if task in published.TASKS else "benchmark" for task in names
    }
    if key not in eval_options() or not any(key in eval_keys(name) for name in types):
        raise ConfigError(f"--{name}: is no option of {', '.join(names)}")
    return [f"--{name}", *values]


def _devices(
    flags: Mapping[str, Any], environment: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Returns the options of GPUs, and what differs."""
    if "auto" in flags:
        return ["--device-map", "auto"], []
    text = environment.get("GPUS", "8")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"GPUS={text}: a number from 1 on is expected")
    # Here: it is torch that counts GPUs, and --auto needs no count.
    from internvl.launch import local

    available = local.count_gpus()
    if available == 0:
        return [], []
    # The original stops when there are fewer; results do not depend on their number.
    if int(text) <= available:
        return ["--gpus", text], []
    return ["--gpus", str(available)], [f"GPUS={text}: this machine has {available}"]
