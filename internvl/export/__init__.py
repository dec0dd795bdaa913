"""Writes a model as a folder for plain `transformers` (hf) or the original code (official).

A folder is complete or absent: it is written under a temporary name, read back, compared, renamed.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration, PreTrainedConfig

from internvl.data.templates import jinja
from internvl.data.tokenizers import save_tokenizer
from internvl.errors import ExportError, UserError
from internvl.export.layouts import LAYOUTS, Format, Layout, probe, processor_files
from internvl.files import complete_folder
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.families import FAMILIES, Description, LoadOptions
from internvl.inference.opened import OpenedModel, open_model
from internvl.models import configs, hub, kernels, keys
from internvl.models import weights as model_weights
from internvl.models.bases import Replacements
from internvl.models.tensors import LazyTensor

__all__ = ["Exported", "check_free", "has_adapters", "probe", "processor_files", "run"]

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class Exported:
    """A model to export: weights by the model's names, read on access."""

    config: PreTrainedConfig
    weights: Mapping[str, Tensor]
    chat: Chat | Description | None
    """Tokenizer and template; None for InternVL-14B, which holds no conversations."""
    folder: Path
    dtype: torch.dtype | None
    """Dtype of the floating-point weights; None keeps each tensor's."""
    answer: Callable[[], Tensor]
    """Returns the model's logits for the probe input; called once, before anything is written."""
    device: torch.device
    """Device of both probes: of the model and of the folder read back."""
    layout: Layout
    """Files and formats of the model's family."""


def run(
    model_or_folder: Chat | Dual | str | Path,
    to: str | Path,
    format: Format = "hf",
    *,
    code_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    step: int | None = None,
    base: Replacements = None,
) -> Path:
    """Writes a model, with its adapters merged, as a self-contained folder; returns its path.

    Args:
        model_or_folder: a handle, a model, adapter or run folder, one of a run's checkpoints
            (RUN/checkpoints/000400, RUN/best), or a hub id.
        to: the new folder; it must not exist, or be empty.
        format: "hf" for plain transformers, "official" for the original code.
        code_from: a folder with the original's Python files and `auto_map`, copied into an official
            export so that `AutoModel` works with it in one step.
        dtype: of the floating-point weights; by default as they are.
        verify: read the folder back and compare its logits.
        step, base: as of `internvl.load`; only for a folder.

    Raises:
        ExportError: the target is taken, the format cannot hold this model, or what was written
            does not compute the same.
        ModelFolderError: the model cannot be read.
        UserError: a step of what is no run, or a base that nothing needs.
    """
    if format not in ("hf", "official"):
        raise ExportError(f"format {format!r}: choose hf or official")
    # Before the model: reading it may take minutes.
    check_free(Path(to))
    exported = _open(model_or_folder, step, base)
    exported.layout.check_format(exported.config, format)
    if code_from is not None and format == "hf":
        raise ExportError("code_from belongs to format official; hf needs no code")
    # Before writing: a model that cannot run the probe leaves no half-written folder.
    expected = exported.answer() if verify else None
    target_dtype = dtype or exported.dtype
    with _complete_or_absent(Path(to)) as folder:
        if format == "hf":
            _write_hf(exported, folder, target_dtype)
        else:
            code_folder = None if code_from is None else Path(code_from)
            _write_official(exported, folder, target_dtype, code_folder)
        if expected is not None:
            _compare(exported, folder, format, expected)
    return Path(to)


def has_adapters(
    folder: str | Path,
    *,
    step: int | None = None,
    base: Replacements = None,
) -> bool:
    """True if an export of a run, adapter or model folder (or hub id) merges adapters.

    They may be those of a base: a run that trains all weights takes in its base's adapters.
    """
    opened: OpenedModel | None = open_model(folder, step=step, base=base)
    while opened is not None:
        # A run says so in its recipe; its checkpoint need not be opened.
        if opened.adapter is not None or (opened.recipe is not None and opened.recipe.model.lora):
            return True
        files, opened = opened.files, opened.base
    return keys.has_adapters(files.tensors)


def _open(
    model_or_folder: Chat | Dual | str | Path,
    step: int | None,
    base: Replacements,
) -> Exported:
    if not isinstance(model_or_folder, str | Path):
        if step is not None or base is not None:
            raise UserError("step, base: only for a folder; a loaded model has its weights")
        return _from_handle(model_or_folder)
    opened = open_model(model_or_folder, step=step, base=base)
    files = opened.files
    if opened.recipe is not None:
        return _from_run(opened)
    merged = opened.base is not None or opened.adapter is not None
    if merged or (files.layout == "official" and keys.has_adapters(files.tensors)):
        # Adapters of a folder may be any that PEFT has; it merges layers in memory.
        device = _probe_device(_num_bytes(files.tensors))
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
    # Here: PEFT takes half a second, and a folder without adapters is written from file to file.
    from internvl.models.adapters import merging

    device, layout = model.device, LAYOUTS[handle.family]

    def answer() -> Tensor:
        # Verification holds a second copy of the model; refuse before minutes of writing.
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if device.type == "cuda" and _probe_device(num_bytes).type == "cpu":
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
    """Describes an export that copies weights from file to file, without loading the model."""
    files = opened.files
    family, layout = FAMILIES[files.family], LAYOUTS[files.family]
    head = layout.describe(opened)
    config = family.read_config(files) if head is None else head.config
    tensors = family.fit_tensors(config, files)
    device = _probe_device(_num_bytes(tensors))
    return Exported(
        config=config,
        weights=_ReadOnAccess(tensors),
        chat=head,
        folder=files.folder,
        dtype=None,
        answer=lambda: probe(layout.load(files, config, device, _stored_dtype(files))),
        device=device,
        layout=layout,
    )


def _from_run(opened: OpenedModel) -> Exported:
    """Describes an export that merges a run's checkpoint weight by weight."""
    dtype = _stored_dtype(opened.files)
    options = LoadOptions(device=torch.device("cpu"), dtype=dtype)
    handle, tensors = loading.without_values(opened, options)
    layout, config = LAYOUTS[handle.family], handle.model.config
    device = _probe_device(_num_bytes(tensors))

    def answer() -> Tensor:
        # With the adapters on their layers: the logits tell whether they were merged well.
        return probe(loading.load_opened(opened, replace(options, device=device)).model)

    embeddings, head = model_weights.EMBEDDINGS
    # A tied matrix is one tensor under two names.
    tensors.setdefault(head, tensors[embeddings])
    # In the model's order, which decides the shards of a large one.
    ordered = {name: _in_dtype(tensors[name], dtype) for name in handle.model.state_dict()}
    return Exported(
        config=config,
        weights=_ReadOnAccess(ordered),
        chat=layout.conversation(handle),
        folder=handle.folder,
        dtype=None,
        answer=answer,
        device=device,
        layout=layout,
    )


def _in_dtype(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(tensor.shape, dtype, lambda: tensor.read().to(dtype))


def _probe_device(num_bytes: int) -> torch.device:
    """Returns the current GPU if a model of `num_bytes` fits there, else the CPU."""
    # A fifth more than the weights, for activations; on a CPU the probe can take minutes.
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * num_bytes:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _num_bytes(tensors: Mapping[str, LazyTensor]) -> int:
    return sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())


class _ReadOnAccess(Mapping[str, Tensor]):
    """A mapping of lazy tensors that reads each on access and keeps none."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _stored_dtype(files: hub.ModelFolder) -> torch.dtype:
    """Returns the dtype that most tensors of a folder have."""
    # Not the first one's: a few float32 tensors in a bfloat16 checkpoint must not double it.
    dtypes = [tensor.dtype for tensor in files.tensors.values()]
    return max(set(dtypes), key=dtypes.count)


@contextmanager
def _complete_or_absent(target: Path) -> Iterator[Path]:
    """Yields a folder to write into that becomes `target` on success and is removed otherwise."""
    check_free(target)
    try:
        with complete_folder(target) as partial:
            yield partial
    except OSError as error:
        raise ExportError(f"{target}: could not be written ({error})") from error


def check_free(target: Path) -> None:
    """Raises ExportError if a folder to write is there and not empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target}: exists and is not empty; choose another folder")


def _write_hf(exported: Exported, folder: Path, dtype: torch.dtype | None) -> None:
    chat = exported.chat
    assert chat is not None
    tied = bool(exported.config.tie_word_embeddings)
    # A tied output matrix is not stored: from_pretrained ties it to the embeddings.
    named = (
        (name, tensor)
        for name, tensor in keys.model_to_hf(exported.config, exported.weights)
        if not (tied and name == keys.HF_HEAD)
    )
    dtype_name = model_weights.write_weights(folder, named, dtype)
    config = exported.config.to_dict() | {"architectures": ["InternVLForConditionalGeneration"]}
    # Settings without a field in transformers' config; our loader reads them back.
    config["internvl"] = configs.chat_settings(exported.config)
    # vLLM and LMDeploy build the language model from this section alone; transformers does not.
    config["text_config"] |= {"tie_word_embeddings": tied}
    config = _without_paths(config | {"dtype": dtype_name})
    model_weights.write_json(folder / "config.json", config)
    if chat.tokenizer is None:
        logger.warning("%s has no tokenizer files, so neither has the export", exported.folder)
        return
    save_tokenizer(chat.tokenizer, folder)
    if (exported.folder / "tokenizer.model").is_file():
        _copy(exported.folder / "tokenizer.model", folder)
    # Without it `generate` would go on past the template's end of turn.
    end = chat.tokenizer.convert_tokens_to_ids(chat.template.end)
    generation = {"eos_token_id": end, "pad_token_id": chat.tokenizer.pad_token_id}
    model_weights.write_json(folder / "generation_config.json", generation)
    text = jinja(chat.template, chat.system_message)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    for name, values in processor_files(exported.config).items():
        model_weights.write_json(folder / name, values)


def _without_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a config without the folders that transformers notes it was read from."""
    cleaned = {k: _without_paths(v) if isinstance(v, dict) else v for k, v in tree.items()}
    # Somebody's disk, which a shared folder should not show; a hub id may stay.
    if str(cleaned.get("_name_or_path", "")).startswith(("/", "~", ".")):
        cleaned["_name_or_path"] = ""
    return cleaned


def _write_official(
    exported: Exported, folder: Path, dtype: torch.dtype | None, code_from: Path | None
) -> None:
    named = keys.ours_to_official(exported.config, exported.weights)
    dtype_name = model_weights.write_weights(folder, named, dtype)
    config = exported.layout.to_official(exported.config) | {"torch_dtype": dtype_name}
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
    # Byte for byte from an official source: the original's slow tokenizers read these very files.
    if exported.chat is None or hub.read_json(exported.folder / "config.json").get("llm_config"):
        for name in _TOKENIZER_FILES:
            if (exported.folder / name).is_file():
                _copy(exported.folder / name, folder)
    elif exported.chat.tokenizer is not None:
        save_tokenizer(exported.chat.tokenizer, folder)
        if (exported.folder / "tokenizer.model").is_file():
            _copy(exported.folder / "tokenizer.model", folder)


def _copy(file: Path, folder: Path) -> None:
    # Content alone: `shutil.copy` takes over the mode too, and a private file would stay private.
    shutil.copyfile(file, folder / file.name)


def _copy_code(code_from: Path, folder: Path) -> dict[str, Any]:
    """Copies the original's Python files; returns the `auto_map` of their config."""
    files = sorted(code_from.glob("*.py"))
    # `AutoModel` finds the classes in these files through auto_map only.
    auto_map = hub.read_json(code_from / "config.json").get("auto_map")
    if not files or not auto_map:
        raise ExportError(
            f"{code_from}: has no Python files or no auto_map in config.json; name a folder of an "
            "official release"
        )
    for file in files:
        _copy(file, folder)
    return auto_map


_FLOAT32_NOISE = 2e-4
"""Of a standard deviation of logits; a weight out of place makes a difference of about one."""


def _compare(exported: Exported, folder: Path, format: Format, expected: Tensor) -> None:
    """Reads `folder` as its users will and compares logits. Raises ExportError if they differ."""
    dtype = getattr(torch, hub.read_json(folder / "config.json")[_DTYPE_KEY[format]])
    if format == "hf":
        # transformers' own class, not ours: it must load the folder without this package.
        model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        model.to(exported.device)
    else:
        model = exported.layout.load(
            hub.open_folder(folder), exported.config, exported.device, dtype
        )
    actual = probe(model)
    # In standard deviations: the scale of logits differs between models and families.
    difference = float((actual - expected).abs().max() / expected.std())
    # Merging and a narrower dtype round every weight once more, and layers add that up.
    # Float32 sums in another order, with another number of threads, were 3e-5 apart.
    allowed = max(64 * torch.finfo(dtype).eps, _FLOAT32_NOISE)
    # Not `>`: NaN must be refused as well.
    if not difference <= allowed:
        raise ExportError(
            f"the export's answers are {difference:.1e} of a standard deviation away from the "
            f"model's (allowed: {allowed:.1e}); nothing was kept"
        )


_DTYPE_KEY = {"hf": "dtype", "official": "torch_dtype"}
