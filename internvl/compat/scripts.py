"""Training scripts of the original by their paths there, as data (`scripts.yaml`)."""

import difflib
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from internvl.errors import ConfigError
from internvl.files import read_yaml


@cache
def paths() -> dict[str, str]:
    """Returns every script by its path below the original: path -> folder in the table."""
    return {
        f"{folder}/{name}.sh": folder
        for folder, group in _table().items()
        for name in group["scripts"]
    }


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_yaml(Path(__file__).with_suffix(".yaml"))
    return table


def locate(script: str, folder: Path, among: Collection[str] | None = None) -> str | None:
    """Returns the path of a script below the original, None if it is none of its scripts.

    Args:
        script: as it was typed, such as shell/finetune/x.sh, with or without internvl_chat/.
        folder: the working directory, whose name decides between scripts of the same path.
        among: paths to choose from; by default all training scripts.
    """
    choices = paths() if among is None else among
    typed = Path(script).as_posix().removeprefix("./")
    # The longest path first: in a folder called internvl_g its own scripts are meant.
    for candidate in (f"{folder.resolve().name}/{typed}", typed):
        matches = [path for path in choices if f"/{candidate}".endswith(f"/{path}")]
        if matches:
            return matches[0]
    return next((path for path in choices if path.partition("/")[2] == typed), None)


def nearest(script: str, among: Collection[str] | None = None) -> str | None:
    """Returns the path of the script whose name is closest; `among` as in `locate`."""
    names = {Path(path).name: path for path in (paths() if among is None else among)}
    # By file name: folders are long, and their names are rarely the mistake.
    near = difflib.get_close_matches(Path(script).name, names, n=1, cutoff=0.5)
    return names[near[0]] if near else None


def text(path: str) -> str:
    """Returns a script of the table in shell's own words. Raises ConfigError for another path."""
    folder = paths().get(path)
    if folder is None:
        raise ConfigError(f"{path}: no script of the original")
    group = _table()[folder]
    script = group["scripts"][Path(path).stem] or {}
    variables = {**(group.get("variables") or {}), **script.get("variables", {})}
    flags = {**(group.get("flags") or {}), **script.get("flags", {})}
    settings = {**group, **script}
    # As text: what is read is the same for these and for a user's copy.
    lines = [_assignment(name, value) for name, value in variables.items()]
    if "accumulation" in settings:
        lines.append(f"GRADIENT_ACC=$(({settings['accumulation']}))")
    lines.append(f"{_start(settings)} internvl/train/{settings['entry']}.py \\")
    lines += [f"  --{flag}{_value(value)} \\" for flag, value in flags.items()]
    return "\n".join([*lines, ""])


def _assignment(name: str, value: Any) -> str:
    # These two are fixed in the scripts; all others are defaults.
    if name.endswith("_LAYER_DECAY_RATE"):
        return f"export {name}={value}"
    return f"{name}=${{{name}:-{value}}}"


def _start(settings: dict[str, Any]) -> str:
    if settings["launcher"] == "srun":
        return (
            'srun -p "${PARTITION}" --nodes=$((GPUS / GPUS_PER_NODE)) --ntasks=${GPUS} '
            "--ntasks-per-node=${GPUS_PER_NODE} ${SRUN_ARGS} python -u"
        )
    # These count nodes, not processes, by WORLD_SIZE.
    if "NPROC_PER_NODE" in settings.get("accumulation", ""):
        return "torchrun --nnodes=$WORLD_SIZE --nproc-per-node=$NPROC_PER_NODE"
    return "torchrun --nproc_per_node=${GPUS}"


def _value(value: Any) -> str:
    return f" {value}" if str(value).startswith("$") else f" '{value}'"
