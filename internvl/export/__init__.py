"""A model -> a folder others load: plain `transformers` (hf) or the original code (official).

A folder is complete or absent: it is written beside its place, read back, compared, and renamed.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration, PreTrainedConfig

from internvl.data.templates import jinja
from internvl.data.tokenizers import save_tokenizer
from internvl.errors import ExportError
from internvl.export.layouts import LAYOUTS, Format, Layout, probe, processor_files
from internvl.files import complete_folder
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.families import FAMILIES, Description, LoadOptions
from internvl.inference.opened import OpenedModel, open_model
from internvl.models import configs, hub, kernels, keys
from internvl.models import weights as model_weights
from internvl.models.adapters import merging

__all__ = ["Exported", "has_adapters", "probe", "processor_files", "run"]

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class Exported:
    """What is exported: weights by the model's names, read when needed."""

    config: PreTrainedConfig
    weights: Mapping[str, Tensor]
    chat: Chat | Description | None
    """Tokenizer and template; None for InternVL-14B, which holds no conversations."""
    folder: Path
    dtype: torch.dtype | None
    """Of the floating-point weights; None leaves each as it is."""
    answer: Callable[[], Tensor]
    """What the model answers to the probe; called once, before anything is written."""
    device: torch.device
    """Where it answers, and where what was written is asked the same."""
    layout: Layout
    """What the export of its family holds."""


def run(
    model_or_folder: Chat | Dual | str | Path,
    to: str | Path,
    format: Format = "hf",
    *,
    code_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Path:
    """Write a model, with its adapters merged, as a self-contained folder; returns the folder.

    Args:
        model_or_folder: a handle, a model, adapter or run folder, or a hub id.
        to: the new folder; it must not exist, or be empty.
        format: "hf" for plain transformers, "official" for the original code.
        code_from: a folder with the original's Python files and `auto_map`, copied into an official
            export so that `AutoModel` works with it in one step.
        dtype: of the floating-point weights; by default as they are.
        verify: read the folder back and compare its logits.

    Raises:
        ExportError: the target is taken, the format cannot hold this model, or what was written
            does not compute the same.
        ModelFolderError: the model cannot be read.
    """
    if format not in ("hf", "official"):
        raise ExportError(f"format {format!r}: choose hf or official")
    exported = _open(model_or_folder)
    exported.layout.check_format(exported.config, format)
    if code_from is not None and format == "hf":
        raise ExportError("code_from belongs to format official; hf needs no code")
    wanted = exported.answer() if verify else None
    kind = dtype or exported.dtype
    with _complete_or_absent(Path(to)) as folder:
        if format == "hf":
            _write_hf(exported, folder, kind)
        else:
            _write_official(exported, folder, kind, None if code_from is None else Path(code_from))
        if wanted is not None:
            _compare(exported, folder, format, wanted)
    return Path(to)


def has_adapters(folder: str | Path) -> bool:
    """Whether a run, adapter or model folder (or hub id) holds adapters that an export merges."""
    opened = open_model(folder)
    if opened.recipe is not None:
        return opened.recipe.model.lora is not None
    return opened.adapter is not None or keys.has_adapters(opened.files.tensors)


def _open(model_or_folder: Chat | Dual | str | Path) -> Exported:
    if not isinstance(model_or_folder, str | Path):
        return _from_handle(model_or_folder)
    opened = open_model(model_or_folder)
    files = opened.files
    merged = opened.base is not None or opened.adapter is not None
    if merged or (files.layout == "official" and keys.has_adapters(files.tensors)):
        # Adapters are merged, or a checkpoint is put in place: the model must be in memory.
        device = _place(_num_bytes(files.tensors))
        options = LoadOptions(device=device, dtype=_stored_dtype(files))
        return _from_handle(loading.load_opened(opened, options))
    return _from_folder(opened)


def _from_handle(handle: Chat | Dual) -> Exported:
    model = handle.model
    if getattr(model, "hf_quantizer", None) is not None:
        raise ExportError(
            "the model's weights are quantized, and what was rounded off is lost; load it without "
            "quantize and export that"
        )
    if kernels.uses_float8(model):
        raise ExportError(
            "the model's frozen weights are in float8 for training; export the run folder instead, "
            "which takes them as released"
        )
    device, layout = model.device, LAYOUTS[handle.family]

    def answer() -> Tensor:
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if device.type == "cuda" and _place(num_bytes).type == "cpu":
            raise ExportError(
                f"{device} has no room to read the export back beside the model; move the model to "
                "the CPU first (its .model.cpu()), or export with verify=False"
            )
        return probe(model)

    return Exported(
        config=model.config,
        weights=merging.MergedState(model),
        chat=layout.conversation(handle),
        folder=handle.folder,
        dtype=None,
        answer=answer,
        device=device,
        layout=layout,
    )


def _from_folder(opened: OpenedModel) -> Exported:
    """Weights go from file to file, one at a time."""
    files = opened.files
    family, layout = FAMILIES[files.family], LAYOUTS[files.family]
    head = layout.describe(opened)
    config = family.read_config(files) if head is None else head.config
    tensors = family.fit_tensors(config, files)
    device = _place(_num_bytes(tensors))
    return Exported(
        config=config,
        weights=_Read(tensors),
        chat=head,
        folder=files.folder,
        dtype=None,
        answer=lambda: probe(layout.load(files, config, device, _stored_dtype(files))),
        device=device,
        layout=layout,
    )


def _place(num_bytes: int) -> torch.device:
    """The GPU if a model of this size fits there, which a CPU takes minutes for; else the CPU."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * num_bytes:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _num_bytes(tensors: Mapping[str, hub.LazyTensor]) -> int:
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())


class _Read(Mapping[str, Tensor]):
    """Lazy tensors as a mapping of tensors."""

    def __init__(self, tensors: Mapping[str, hub.LazyTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _stored_dtype(files: hub.ModelFolder) -> torch.dtype:
    """The type most weights of a folder have."""
    kinds = [tensor.dtype for tensor in files.tensors.values()]
    return max(set(kinds), key=kinds.count)


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` on success and is removed otherwise."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target}: exists and is not empty; choose another folder")
    try:
        with complete_folder(target) as partial:
            yield partial
    except OSError as error:
        raise ExportError(f"{target}: could not be written ({error})") from error


def _write_hf(exported: Exported, folder: Path, dtype: torch.dtype | None) -> None:
    chat = exported.chat
    assert chat is not None
    tied = bool(exported.config.tie_word_embeddings)
    named = (
        (name, tensor)
        for name, tensor in keys.model_to_hf(exported.config, exported.weights)
        if not (tied and name == keys.HF_HEAD)
    )
    kind = model_weights.write_weights(folder, named, dtype)
    config = exported.config.to_dict() | {"architectures": ["InternVLForConditionalGeneration"]}
    config["internvl"] = configs.chat_settings(exported.config)
    model_weights.write_json(folder / "config.json", config | {"dtype": kind})
    if chat.tokenizer is None:
        logger.warning("%s has no tokenizer files, so neither has the export", exported.folder)
        return
    save_tokenizer(chat.tokenizer, folder)
    if (exported.folder / "tokenizer.model").is_file():
        shutil.copy(exported.folder / "tokenizer.model", folder)
    end = chat.tokenizer.convert_tokens_to_ids(chat.template.end)
    generation = {"eos_token_id": end, "pad_token_id": chat.tokenizer.pad_token_id}
    model_weights.write_json(folder / "generation_config.json", generation)
    text = jinja(chat.template, chat.system_message)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    for name, values in processor_files(exported.config).items():
        model_weights.write_json(folder / name, values)


def _write_official(
    exported: Exported, folder: Path, dtype: torch.dtype | None, code_from: Path | None
) -> None:
    named = keys.ours_to_official(exported.config, exported.weights)
    kind = model_weights.write_weights(folder, named, dtype)
    config = exported.layout.to_official(exported.config) | {"torch_dtype": kind}
    if code_from is not None:
        config["auto_map"] = _copy_code(code_from, folder)
    else:
        logger.warning(
            "the original's Python files are not part of this export: `AutoModel` needs them and "
            "`auto_map`; copy both with code_from (--code-from FOLDER of the release)"
        )
    model_weights.write_json(folder / "config.json", config)
    for name, content in exported.layout.official_files(exported.config).items():
        model_weights.write_json(folder / name, content)
    if exported.chat is None or hub.read_json(exported.folder / "config.json").get("llm_config"):
        for name in _TOKENIZER_FILES:
            if (exported.folder / name).is_file():
                shutil.copy(exported.folder / name, folder)
    elif exported.chat.tokenizer is not None:
        save_tokenizer(exported.chat.tokenizer, folder)
        if (exported.folder / "tokenizer.model").is_file():
            shutil.copy(exported.folder / "tokenizer.model", folder)


def _copy_code(code_from: Path, folder: Path) -> dict[str, Any]:
    """Copy the original's Python files; the `auto_map` of their config."""
    files = sorted(code_from.glob("*.py"))
    auto_map = hub.read_json(code_from / "config.json").get("auto_map")
    if not files or not auto_map:
        raise ExportError(
            f"{code_from}: has no Python files or no auto_map in config.json; name a folder of an "
            "official release"
        )
    for file in files:
        shutil.copy(file, folder)
    return auto_map


def _compare(exported: Exported, folder: Path, format: Format, wanted: Tensor) -> None:
    """Read `folder` as its users will and compare; bfloat16 and merging may round differently."""
    kind = getattr(torch, hub.read_json(folder / "config.json")[_DTYPE_KEY[format]])
    if format == "hf":
        model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=kind)
        model.to(exported.device)
    else:
        model = exported.layout.load(
            hub.open_folder(folder), exported.config, exported.device, kind
        )
    found = probe(model)
    difference = float((found - wanted).abs().max() / wanted.std())
    allowed = 64 * torch.finfo(kind).eps
    if not difference <= allowed:
        raise ExportError(
            f"the export's answers are {difference:.1e} of a standard deviation away from the "
            f"model's (allowed: {allowed:.1e}); nothing was kept"
        )


_DTYPE_KEY = {"hf": "dtype", "official": "torch_dtype"}
