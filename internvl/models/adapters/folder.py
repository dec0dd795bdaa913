"""Recognizes an adapter folder and the base model that it names. Imports no torch and no PEFT.

`settings.py` reads what the folder holds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.errors import ModelFolderError
from internvl.models import hub
from internvl.models.bases import Located, Search, is_model

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
BASE_KEY = "base_model_name_or_path"
SETTINGS_FILE = "internvl.json"
"""Official keys of images and conversations that the adapters were trained with. A file of its own:
PEFT warns of keys in its configuration that it does not know."""


def is_adapter(folder: Path) -> bool:
    """True if a folder holds adapters and no model (a `config.json` alone is no model)."""
    return (folder / CONFIG_FILE).is_file() and not _has_model(folder)


def is_beside_model(folder: Path) -> bool:
    """True if a model folder also holds adapters, which then belong to it, as in transformers."""
    return (folder / CONFIG_FILE).is_file() and _has_model(folder)


def _has_model(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    names = ("model.safetensors", "pytorch_model.bin")
    files = [folder / f"{name}{end}" for name in names for end in ("", ".index.json")]
    # A shard may have any name; an index alone is a model that was copied in part.
    shards = (file for file in folder.glob("*.safetensors") if file.name != WEIGHTS_FILE)
    return any(file.is_file() for file in files) or any(True for _ in shards)


def check_complete(folder: Path) -> None:
    """Raises ModelFolderError for the weights of an adapter without its configuration."""
    for name in (WEIGHTS_FILE, PICKLED_FILE):
        if (folder / name).is_file() and not (folder / CONFIG_FILE).is_file():
            raise ModelFolderError(
                f"{folder / CONFIG_FILE}: missing beside {name}; copy the adapter folder again"
            )


def base_of(folder: Path, search: Search | None = None) -> Located:
    """Returns the place of an adapter's base model, which may be an adapter folder itself.

    Args:
        search: looks up the base; by default without replacements.

    Raises:
        ModelFolderError: no base is named, or it does not exist.
    """
    file = folder / CONFIG_FILE
    config = hub.read_json(file)
    base = config.get("base_model_name_or_path")
    # PEFT writes null for a base that it has only seen in memory.
    if not base or not isinstance(base, str):
        raise ModelFolderError(
            f"{file}: names no base_model_name_or_path; set it to the model the adapters were "
            "trained on"
        )
    # Nearby first, so that both can be moved together.
    candidates = [*_beside(folder, base), Path(base).expanduser()]
    located = (search or Search()).locate(folder, BASE_KEY, base, candidates)
    if located is None:
        located = Located(_named_base(file, base, config.get("revision")))
    # Loading the base would read this folder again, without end.
    if located.path.resolve() == folder.resolve():
        raise ModelFolderError(
            f"{file}: base_model_name_or_path is this folder, which has no model; set it to the "
            "model the adapters were trained on"
        )
    if not is_model(located.path):
        raise ModelFolderError(
            f"{file}: base_model_name_or_path = {base!r} is {located.path.resolve()} here, "
            "where no model is (no config.json); set it to the whole path of the model the "
            "adapters were trained on"
        )
    return located


def _named_base(file: Path, base: str, revision: Any) -> Path:
    """Returns the folder of a base that is no model on this disk, mostly a hub id."""
    if not Path(base).expanduser().exists() and revision not in (None, "main"):
        raise ModelFolderError(
            f"{file}: revision = {revision!r} of the base is not fetched here; download "
            "it into a folder and set base_model_name_or_path to that"
        )
    try:
        return hub.find_folder(base)
    except ModelFolderError as error:
        raise ModelFolderError(
            f"{file}: its base model is not there ({error}); set base_model_name_or_path to the "
            "folder of that model, or name it with --base DIR (base=DIR in Python)"
        ) from error


def _beside(folder: Path, base: str) -> Iterator[Path]:
    """Yields a relative base in the adapter's folder and next to it."""
    # Any other name is the hub's or the working directory's.
    if Path(base).expanduser().is_absolute():
        return
    for above in (folder, folder.parent):
        path = above / base
        if path.resolve() != folder.resolve():
            yield path
