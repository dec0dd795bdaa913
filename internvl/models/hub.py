"""Resolves a model folder or hub id to local files, family and layout. Imports no torch.

Nothing from a checkpoint is ever run: `config.json` is read as data.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from internvl import files
from internvl.errors import ModelFolderError
from internvl.files import read_object

if TYPE_CHECKING:
    from internvl.models.tensors import LazyTensor

logger = logging.getLogger(__name__)

_FORMATS = (("model.safetensors", True), ("pytorch_model.bin", False))
"""Names of the weights in the order in which `transformers` looks for them; whether safetensors."""

# As save_pretrained names shards: NAME-00001-of-00004.safetensors.
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class ModelFolder:
    """A model folder: its config.json and its lazily read tensors."""

    folder: Path
    config: dict[str, Any]
    """Content of config.json."""

    @cached_property
    def reader(self) -> files.FolderReader:
        """Reads other files of the folder, each once."""
        return files.FolderReader(self.folder)

    @property
    def family(self) -> str:
        """ "chat" or "dual" (InternVL-14B). Raises ModelFolderError for anything else."""
        # By section: model_type differs between the two layouts of one model.
        if self._has("llm_config") or self._has("text_config"):
            return "chat"
        if self._has("qllama_config"):
            return "dual"
        raise ModelFolderError(
            f"{self.folder / 'config.json'}: model type {self.config.get('model_type')!r} is "
            "neither an InternVL chat model (llm_config or text_config) nor InternVL-14B "
            "(qllama_config); copy the config.json of the release there, or name the folder of one "
            "of the models that `internvl models` lists"
        )

    @property
    def layout(self) -> str:
        """ "official" (names of the original repository) or "hf" (names of transformers)."""
        return "hf" if self._has("text_config") else "official"

    def _has(self, section: str) -> bool:
        return self.config.get(section) is not None

    @cached_property
    def tensors(self) -> "dict[str, LazyTensor]":
        """Every tensor of the folder by its name in the file. Raises ModelFolderError."""
        # Here: a folder is opened, and refused, before torch is imported.
        from internvl.models.tensors import merge_tensors

        # Cached: a shard's header is parsed once, however many callers ask for names.
        return merge_tensors(self.weights)

    @property
    def weights(self) -> list[Path]:
        """Files of the weights. Raises ModelFolderError if one is missing."""
        return weight_files(self.folder, self.config.get("transformers_weights"))

    def check(self, *, weights: bool = True) -> None:
        """Raises ModelFolderError for another model, and for missing `weights`; reads none."""
        # Both properties raise, without torch.
        _ = self.family, self.weights if weights else ()


def open_folder(name_or_folder: str | Path, cache: Path | None = None) -> ModelFolder:
    """Opens the model in a folder, or of a hub id (downloaded to the hub's cache at first use).

    Raises:
        ModelFolderError: no such folder or id, no config, or no network.
    """
    folder = find_folder(name_or_folder, cache)
    return ModelFolder(folder, read_json(folder / "config.json"))


def find_folder(name_or_folder: str | Path, cache: Path | None = None) -> Path:
    """Returns a local folder unchanged; downloads the files of a hub id to the cache."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    problem = files.no_such_model(name_or_folder)
    if problem is not None:
        raise ModelFolderError(problem)
    return download(str(name_or_folder), cache=cache)


def is_hub_id(name_or_folder: str | Path) -> bool:
    """Returns whether a name is no folder or file here, and may be one of the hub."""
    here = Path(name_or_folder).expanduser().exists()
    return not here and files.no_such_model(name_or_folder) is None


def download(name: str, to: Path | None = None, cache: Path | None = None) -> Path:
    """Downloads hub id `name` into `to` or the hub's cache; an interrupted download resumes.

    Raises:
        ModelFolderError: offline, no network, or no such id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    local = f"pretrained/{name.rpartition('/')[2]}"
    named = f"name that (in a recipe, model.id={local})"
    remedy = f"put its files into a folder (for instance {local}) and {named}"
    # Where the guides fetch to; the recipes name the release.
    if (Path(local) / "config.json").is_file():
        remedy = f"{local} is here: {named}"
    # With local_dir, snapshot_download returns whatever lies there when it is offline.
    if to is not None and os.environ.get("HF_HUB_OFFLINE", "0").upper() in {
        "1",
        "ON",
        "YES",
        "TRUE",
    }:
        raise ModelFolderError(
            f"{name}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or {remedy}"
        )
    unused = ["*.h5", "*.msgpack"]  # the same weights for TensorFlow and Flax

    def fetch(ignore: list[str]) -> Path:
        return Path(snapshot_download(name, local_dir=to, cache_dir=cache, ignore_patterns=ignore))

    try:
        path = fetch([*unused, "*.bin", "*.bin.index.json"])
        # Only then: next to safetensors, `.bin` files hold the same weights once more.
        if not any(path.glob("*.safetensors")):
            path = fetch(unused)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelFolderError(
            f"{name}: no such folder, not in the local hub cache, and the hub cannot be reached; "
            f"{remedy}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelFolderError(
            f"{name}: the hub answers: {reason}; check the name, or {remedy}"
        ) from error
    return path


read_json = read_object


def weight_files(folder: Path, named: Any = None) -> list[Path]:
    """Lists the weight files that `transformers` takes: model.safetensors, else the shards of its
    index, else pytorch_model.bin, else the shards of that one's index.

    Without any of the four: a complete set of numbered shards, or a lone safetensors file.

    Args:
        named: `transformers_weights` of config.json, which names the file or index outright.

    Raises:
        ModelFolderError: no weights, shards that are not there, or files of which nothing says
            which ones are the model's.
    """
    if named is not None:
        return _named_file(folder, named)
    # transformers' order of preference: several formats in one folder must load alike in both.
    candidates = [folder / f"{name}{end}" for name, _ in _FORMATS for end in ("", ".index.json")]
    present = [file for file in candidates if file.is_file()]
    if not present:
        return _unnamed_files(folder)
    taken = present[0]
    if len(present) > 1:
        logger.warning(
            "%s: takes %s, as transformers does; %s beside it %s not read",
            folder,
            taken.name,
            ", ".join(file.name for file in present[1:]),
            "is" if len(present) == 2 else "are",
        )
    return _shards(taken) if taken.name.endswith(".index.json") else [taken]


def _named_file(folder: Path, named: Any) -> list[Path]:
    # A bare file name only: a path could lead out of the folder.
    ends = (".safetensors", ".safetensors.index.json")
    if not isinstance(named, str) or PurePath(named).name != named or not named.endswith(ends):
        raise ModelFolderError(
            f"{folder / 'config.json'}: transformers_weights is {named!r}, a safetensors file of "
            "this folder or its index is expected; remove the key to take model.safetensors"
        )
    file = folder / named
    if not file.is_file():
        raise ModelFolderError(
            f"{file}: missing, and transformers_weights of config.json names it; copy it there, or "
            "remove the key to take model.safetensors"
        )
    return _shards(file) if named.endswith(".json") else [file]


def _unnamed_files(folder: Path) -> list[Path]:
    """Lists weights under other names and without an index."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    weights = [name for name in names if not name.startswith("adapter_")]
    if not weights:
        raise ModelFolderError(
            f"{folder}: no model.safetensors, no pytorch_model.bin, and no index of either; "
            "download it again"
        )
    if len(weights) > 1 and not _is_whole_set(weights):
        raise ModelFolderError(
            f"{folder}: {weights[0]} and {weights[1]} lie side by side without an index, and "
            "nothing says which are the model's; keep one and name it model.safetensors, or copy "
            "model.safetensors.index.json of the release there"
        )
    return [folder / name for name in weights]


def _is_whole_set(names: Sequence[str]) -> bool:
    """True if `names` are exactly the shards 1 to N of one "NAME-0000i-of-0000N.safetensors"."""
    matches = [_NUMBERED.fullmatch(name) for name in names]
    shards = [match.groups() for match in matches if match]
    if len(shards) < len(names) or len({(stem, count) for stem, _, count in shards}) > 1:
        return False
    return sorted(int(index) for _, index, _ in shards) == [*range(1, int(shards[0][2]) + 1)]


def _shards(index: Path) -> list[Path]:
    """Lists the files that an index names."""
    weight_map = read_object(index).get("weight_map")
    again = "copy it again from the release"
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(
            f"{index}: weight_map must say in which file each tensor is, found "
            f"{type(weight_map).__name__ if weight_map != {} else 'nothing in it'}; {again}"
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or PurePath(name).name != name or "\0" in name:
            raise ModelFolderError(
                f"{index}: weight_map names {name!r} for {tensor}, which is no file of this "
                f"folder; {again}"
            )
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        raise ModelFolderError(
            f"{index}: names {len(missing)} shards that are not there "
            f"({', '.join(missing[:3])}); the download is not complete, start it again"
        )
    return shards


def special_token_id(folder: Path, token: str) -> int | None:
    """Returns the id of an added token from the folder's tokenizer files; None if none names it.

    Raises:
        ModelFolderError: one of the files is damaged, or gives the token an id that is no number.
    """
    for name, find in _TOKEN_FILES:
        file = folder / name
        token_id = find(read_object(file), token) if file.is_file() else None
        if token_id is None:
            continue
        # Keys of added_tokens_decoder are strings, as all keys of JSON.
        if isinstance(token_id, int | str) and re.fullmatch(r"\d{1,9}", str(token_id)):
            return int(token_id)
        raise ModelFolderError(
            f"{file}: the id of {token} is {token_id!r}, not a number; copy it again from the "
            "release"
        )
    return None


def _by_content(entries: Any, token: str) -> dict[str, Any]:
    items = entries if isinstance(entries, list) else []
    return next((e for e in items if isinstance(e, dict) and e.get("content") == token), {})


def _in_decoder(tree: dict[str, Any], token: str) -> Any:
    entries = tree.get("added_tokens_decoder")
    items = entries.items() if isinstance(entries, dict) else ()
    named = (n for n, e in items if isinstance(e, dict) and e.get("content") == token)
    return next(named, None)


_TOKEN_FILES: tuple[tuple[str, Callable[[dict[str, Any], str], Any]], ...] = (
    ("added_tokens.json", lambda tree, token: tree.get(token)),
    ("tokenizer_config.json", _in_decoder),
    ("tokenizer.json", lambda tree, token: _by_content(tree.get("added_tokens"), token).get("id")),
)
"""Files that name added tokens, and how each gives an id."""
