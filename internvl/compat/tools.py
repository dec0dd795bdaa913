"""`merge_lora` and the conversions of the original's `tools/` as `internvl merge` and `export`."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from internvl.compat.translation import Translation, take_flags
from internvl.errors import ConfigError
from internvl.files import read_yaml
from internvl.inference.opened import open_model
from internvl.models import hub

_FOLDERS = {"custom_path": "a folder", "hf_path": "a folder", "save_path": "a folder"}


@cache
def without_command() -> dict[str, str]:
    """Returns the tools without a command here -> the reason."""
    table: dict[str, str] = read_yaml(Path(__file__).with_suffix(".yaml"))
    return table


def merge_lora(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates `INPUT OUTPUT`."""
    positional, _ = take_flags(words, {})
    if len(positional) != 2:
        raise ConfigError("merge_lora: an input and an output folder are expected")
    # The guides write a slash after the first folder.
    source, target = (name.rstrip("/") or "/" for name in positional)
    command = ("merge", source, "--to", target, "--format", "official")
    # A hub id has no folder to copy from before it is downloaded.
    code = None if hub.is_hub_id(source) else _code_folder(source)
    if code is None:
        return Translation(commands=(command,))
    note = (
        f"the Python files and the auto_map of {code} come along: AutoModel needs no further step"
    )
    return Translation(commands=((*command, "--code-from", str(code)),), notes=(note,))


def _code_folder(model: str) -> Path | None:
    """Returns the folder of the released model at the bottom, if it has the original's code."""
    opened: Any = open_model(model)
    # A run may start from a run; the released model is at the bottom.
    while opened.base is not None:
        opened = opened.base
    folder: Path = opened.folder
    config = folder / "config.json"
    # AutoModel finds classes through auto_map: files without it are no use.
    has_code = config.is_file() and bool(hub.read_json(config).get("auto_map"))
    return folder if has_code and any(folder.glob("*.py")) else None


def custom2hf(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates `--custom_path IN --hf_path REFERENCE --save_path OUT`."""
    return _convert(words, source="custom_path", unneeded="hf_path", layout="hf")


def hf2custom(words: Sequence[str], environment: Mapping[str, str]) -> Translation:
    """Translates `--hf_path IN --custom_path REFERENCE --save_path OUT`."""
    return _convert(words, source="hf_path", unneeded="custom_path", layout="official")


def _convert(words: Sequence[str], *, source: str, unneeded: str, layout: str) -> Translation:
    _, flags = take_flags(words, _FOLDERS)
    # The third folder is a template there, which an export does not need.
    missing = [flag for flag in (source, "save_path") if flag not in flags]
    if missing:
        raise ConfigError(f"--{missing[0]}: missing")
    command: tuple[str, ...] = (
        "export",
        flags[source][0],
        "--to",
        flags["save_path"][0],
        "--format",
        layout,
    )
    if layout == "official" and unneeded in flags and any(Path(flags[unneeded][0]).glob("*.py")):
        command = (*command, "--code-from", flags[unneeded][0])
        return Translation(commands=(command,))
    note = f"--{unneeded}: changes nothing: names and configuration come from the model itself"
    return Translation(commands=(command,), notes=(note,) if unneeded in flags else ())
