"""A model folder or hub id -> local files, family, layout, and tensors read one at a time.

Nothing from a checkpoint is ever run: `config.json` is read as data, weights are safetensors, or
`.bin` files through torch's `weights_only=True`.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internvl.config import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class ModelFolderError(UserError):
    """A model folder that cannot be used: which file, why, and what to do."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that stays in its file until `read`.

    `transformers` materializes whatever answers to `[...]`, so a mapping of these streams.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        return self.read()[index]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder as it lies."""

    folder: Path
    config: dict[str, Any]
    """`config.json`."""

    @property
    def family(self) -> str:
        """ "chat" or "dual" (InternVL-14B). Raises ModelFolderError for anything else."""
        if "llm_config" in self.config or "text_config" in self.config:
            return "chat"
        if "qllama_config" in self.config:
            return "dual"
        raise ModelFolderError(
            f"{self.folder / 'config.json'}: model type {self.config.get('model_type')!r} is "
            "neither an InternVL chat model (llm_config or text_config) nor InternVL-14B "
            "(qllama_config)"
        )

    @property
    def layout(self) -> str:
        """ "official" (names of the original repository) or "hf" (names of transformers)."""
        return "hf" if "text_config" in self.config else "official"

    @cached_property
    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the folder by its name in the file. Raises ModelFolderError."""
        tensors: dict[str, LazyTensor] = {}
        for file in weight_files(self.folder):
            tensors.update(open_tensors(file))
        return tensors


def open_folder(name_or_folder: str | Path, cache: Path | None = None) -> ModelFolder:
    """The model in a folder, or of a hub id (downloaded to the hub's cache at first use).

    Raises:
        ModelFolderError: no such folder or id, no config, or no network.
    """
    folder = find_folder(name_or_folder, cache)
    return ModelFolder(folder, read_json(folder / "config.json"))


def find_folder(name_or_folder: str | Path, cache: Path | None = None) -> Path:
    """A local folder as it is; otherwise the hub id's files, fetched where they are missing."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    text = str(name_or_folder)
    if folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise ModelFolderError(
            f"{text}: no such folder, and not a hub id of the form owner/name; "
            "`internvl models` lists the released models"
        )
    return download(text, cache=cache)


def download(name: str, to: Path | None = None, cache: Path | None = None) -> Path:
    """The files of hub id `name`, into `to` or the hub's cache; an interrupted download resumes.

    Raises:
        ModelFolderError: one sentence when offline, without network, or when there is no such id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    where = (
        f"put its files into a folder (for instance pretrained/{name.split('/')[-1]}) and name that"
    )
    if to is not None and os.environ.get("HF_HUB_OFFLINE", "0").upper() in {
        "1",
        "ON",
        "YES",
        "TRUE",
    }:
        raise ModelFolderError(
            f"{name}: HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or {where}"
        )
    unused = ["*.h5", "*.msgpack"]

    def fetch(ignore: list[str]) -> Path:
        return Path(snapshot_download(name, local_dir=to, cache_dir=cache, ignore_patterns=ignore))

    try:
        path = fetch([*unused, "*.bin", "*.bin.index.json"])
        if not any(path.glob("*.safetensors")):  # else the same weights once more
            path = fetch(unused)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelFolderError(
            f"{name}: no such folder, not in the local hub cache, and the hub cannot be reached; "
            f"{where}"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelFolderError(
            f"{name}: the hub answers: {reason}; check the name, or {where}"
        ) from error
    return path


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelFolderError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{file}: missing, so this is not a complete model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(
            f"{file}: not JSON ({error}); copy it again from the release"
        ) from error
    if not isinstance(value, dict):
        raise ModelFolderError(f"{file}: expected an object, found {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The shards of a folder: those of its index, else every weight file; safetensors first."""
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ModelFolderError(
                    f"{index}: names {len(missing)} shards that are not there "
                    f"({', '.join(missing[:3])}); the download is not complete, start it again"
                )
            return files
        single = folder / f"{stem}{suffix}"
        if single.is_file():
            return [single]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelFolderError(
            f"{folder}: no model.safetensors, no pytorch_model.bin, and no index of either"
        )
    return found


def open_tensors(file: Path) -> Iterator[tuple[str, LazyTensor]]:
    """(name, lazy tensor) of one weight file. Raises ModelFolderError when it is damaged."""
    if file.suffix != ".safetensors":
        for name, tensor in load_pickled(file).items():
            yield name, LazyTensor(tuple(tensor.shape), tensor.dtype, _constant(tensor))
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype(), torch.float32)
                yield name, LazyTensor(tuple(part.get_shape()), dtype, _reader(file, name))
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(
            f"{file}: cannot be read ({error}); it is truncated or damaged, download it again"
        ) from error


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Opened for each tensor: an open file keeps every page it has shown resident, so that a
        # model loaded in another dtype would need its files' size on top of its own.
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    return read


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


@lru_cache(maxsize=1)
def load_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` or `.pth` file, mapped into memory. Raises ModelFolderError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ModelFolderError(
            f"{file}: not a plain file of tensors ({str(error).splitlines()[0]}); "
            "use the safetensors files of the release"
        ) from error


def special_token_id(folder: Path, token: str) -> int | None:
    """The id of an added token, read from the folder's tokenizer files; None if none names it."""
    added = folder / "added_tokens.json"
    if added.is_file() and token in (known := read_json(added)):
        return int(known[token])
    config = folder / "tokenizer_config.json"
    if config.is_file():
        for number, entry in read_json(config).get("added_tokens_decoder", {}).items():
            if entry.get("content") == token:
                return int(number)
    full = folder / "tokenizer.json"
    if full.is_file():
        for entry in read_json(full).get("added_tokens", []):
            if entry["content"] == token:
                return int(entry["id"])
    return None
