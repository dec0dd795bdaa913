"""A model -> a folder others load: plain `transformers` (hf) or the original code (official).

A folder is complete or absent: it is written beside its place, read back, compared, and renamed.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from internvl import handles
from internvl.config import UserError, load_recipe
from internvl.data.images import STATISTICS
from internvl.data.templates import Template
from internvl.data.tokenizers import save_tokenizer
from internvl.handles import Chat
from internvl.models import configs, hub, keys, lora, vlm

logger = logging.getLogger(__name__)

Format = Literal["hf", "official"]
SHARD_BYTES = 5 * 10**9

_TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)


class ExportError(UserError):
    """An export that cannot be written, or that does not compute what the model does."""


@dataclass(frozen=True)
class Source:
    """What is exported: weights by the model's names, read when needed."""

    config: InternVLConfig
    weights: Mapping[str, Tensor]
    tokenizer: PreTrainedTokenizerFast | None
    template: Template
    system_message: str | None
    folder: Path
    dtype: torch.dtype | None
    """Of the floating-point weights; None leaves each as it is."""
    logits: Callable[[], Tensor]
    """What the model answers to the probe; called once, before anything is written."""
    device: torch.device
    """Where it answers, and where what was written is asked the same."""


def run(
    model_or_folder: Chat | str | Path,
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
    source = _open(model_or_folder)
    if format == "hf" and configs.chat_settings(source.config)["ps_version"] == "v1":
        raise ExportError(
            "pixel shuffle v1 (InternVL-Chat 1.1 and 1.2) exists in no class of transformers; "
            "export this model with format official"
        )
    if code_from is not None and format == "hf":
        raise ExportError("code_from belongs to format official; hf needs no code")
    wanted = source.logits() if verify else None
    kind = dtype or source.dtype
    with _complete_or_absent(Path(to)) as folder:
        if format == "hf":
            _write_hf(source, folder, kind)
        else:
            _write_official(source, folder, kind, None if code_from is None else Path(code_from))
        if wanted is not None:
            _compare(source, folder, format, wanted)
    return Path(to)


def has_adapters(folder: str | Path) -> bool:
    """Whether a run, adapter or model folder (or hub id) holds adapters that an export merges."""
    if handles.is_run(Path(folder)):
        return load_recipe(Path(folder) / "recipe.yaml").model.lora is not None
    found = hub.find_folder(folder)
    return lora.is_adapter(found) or keys.has_adapters(hub.open_folder(found).tensors)


def _open(model_or_folder: Chat | str | Path) -> Source:
    if isinstance(model_or_folder, Chat):
        return _from_chat(model_or_folder)
    if handles.is_run(Path(model_or_folder)):
        base = load_recipe(Path(model_or_folder) / "recipe.yaml").model.id
        return _loaded(model_or_folder, hub.open_folder(base))
    folder = hub.find_folder(model_or_folder)
    if lora.is_adapter(folder):
        return _loaded(folder, hub.open_folder(lora.base_of(folder)))
    files = hub.open_folder(folder)
    if files.layout == "official" and keys.has_adapters(files.tensors):
        return _loaded(folder, files)
    return _from_folder(files)


def _loaded(folder: str | Path, base: hub.ModelFolder) -> Source:
    """A folder whose adapters are merged, so that the model must be in memory."""
    place = _place(_num_bytes(base.tensors))
    return _from_chat(handles.load(folder, device=place, dtype=_stored_dtype(base)))


def _from_chat(chat: Chat) -> Source:
    if getattr(chat.model, "hf_quantizer", None) is not None:
        raise ExportError(
            "the model's weights are quantized, and what was rounded off is lost; load it without "
            "quantize and export that"
        )
    device = chat.model.device

    def logits() -> Tensor:
        num_bytes = sum(parameter.nbytes for parameter in chat.model.parameters())
        if device.type == "cuda" and _place(num_bytes).type == "cpu":
            raise ExportError(
                f"{device} has no room to read the export back beside the model; move the model to "
                "the CPU first (chat.model.cpu()), or export with verify=False"
            )
        return probe(chat.model)

    return Source(
        config=chat.model.config,
        weights=lora.MergedState(chat.model),
        tokenizer=chat.tokenizer,
        template=chat.template,
        system_message=chat.system_message,
        folder=chat.folder,
        dtype=None,
        logits=logits,
        device=device,
    )


def _from_folder(files: hub.ModelFolder) -> Source:
    """Weights go from file to file, one at a time."""
    head = handles.describe(files.folder)
    tensors = vlm.fit_tensors(head.config, files)
    place = _place(_num_bytes(tensors))

    def logits() -> Tensor:
        model = vlm.load_model(
            files.folder,
            device=place,
            dtype=_stored_dtype(files),
            image_token_id=head.config.image_token_id,
        )
        return probe(model)

    return Source(
        config=head.config,
        weights=_Read(tensors),
        tokenizer=head.tokenizer,
        template=head.template,
        system_message=head.system_message,
        folder=files.folder,
        dtype=None,
        logits=logits,
        device=place,
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
    partial = target.parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.is_dir():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise ExportError(f"{target}: could not be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_hf(source: Source, folder: Path, dtype: torch.dtype | None) -> None:
    tied = bool(source.config.tie_word_embeddings)
    named = (
        (name, tensor)
        for name, tensor in keys.model_to_hf(source.config, source.weights)
        if not (tied and name == keys.HF_HEAD)
    )
    kind = _write_weights(folder, named, dtype)
    config = source.config.to_dict() | {"architectures": ["InternVLForConditionalGeneration"]}
    config["internvl"] = configs.chat_settings(source.config)
    _write_json(folder / "config.json", config | {"dtype": kind})
    if source.tokenizer is None:
        logger.warning("%s has no tokenizer files, so neither has the export", source.folder)
        return
    save_tokenizer(source.tokenizer, folder)
    if (source.folder / "tokenizer.model").is_file():
        shutil.copy(source.folder / "tokenizer.model", folder)
    end = source.tokenizer.convert_tokens_to_ids(source.template.end)
    generation = {"eos_token_id": end, "pad_token_id": source.tokenizer.pad_token_id}
    _write_json(folder / "generation_config.json", generation)
    text = chat_template(source.template, source.system_message)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    for name, values in processor_files(source.config).items():
        _write_json(folder / name, values)


def _write_official(
    source: Source, folder: Path, dtype: torch.dtype | None, code_from: Path | None
) -> None:
    named = keys.ours_to_official(source.config, source.weights)
    kind = _write_weights(folder, named, dtype)
    config = configs.to_official(source.config) | {"torch_dtype": kind}
    if code_from is not None:
        config["auto_map"] = _copy_code(code_from, folder)
    else:
        logger.warning(
            "the original's Python files are not part of this export: `AutoModel` needs them and "
            "`auto_map`; copy both with code_from (--code-from FOLDER of the release)"
        )
    _write_json(folder / "config.json", config)
    if hub.read_json(source.folder / "config.json").get("llm_config"):
        for name in _TOKENIZER_FILES:
            if (source.folder / name).is_file():
                shutil.copy(source.folder / name, folder)
    elif source.tokenizer is not None:
        save_tokenizer(source.tokenizer, folder)
        if (source.folder / "tokenizer.model").is_file():
            shutil.copy(source.folder / "tokenizer.model", folder)


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


def _write_weights(
    folder: Path, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None
) -> str:
    """Write safetensors shards of at most `SHARD_BYTES`; returns the name of the last dtype.

    No more than one shard is held in memory beside the model.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0
    kind = torch.float32

    def flush() -> None:
        save_file(pending, folder / f"{len(shards):05d}.partial", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in named:
        kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        kind = kept.dtype
        if pending and size + kept.nbytes > SHARD_BYTES:
            flush()
            size = 0
        # Cloned where it shares its memory: a file holds every tensor on its own.
        pending[name] = kept.contiguous().clone() if kept.data_ptr() == tensor.data_ptr() else kept
        size, total = size + kept.nbytes, total + kept.nbytes
    flush()
    _name_shards(folder, shards, total)
    return str(kind).removeprefix("torch.")


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """One file is model.safetensors; several are numbered and indexed."""
    if len(shards) == 1:
        (folder / "00000.partial").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number:05d}.partial").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def chat_template(template: Template, system_message: str | None) -> str:
    """A Jinja template that renders what our encoder renders.

    Image parts become the placeholder and a newline, which the processor expands.
    """
    system = template.system_message if system_message is None else system_message

    def text(value: str) -> str:
        return json.dumps(value, ensure_ascii=False)

    strip = " | trim" if template.strip else ""
    inner = template.end_before_more or template.end
    return (
        "{%- macro body(message) -%}"
        "{%- if message.content is string -%}{{ message.content" + strip + " }}"
        "{%- else -%}{%- for part in message.content -%}"
        '{%- if part.type == "image" -%}{{ "<IMG_CONTEXT>\\n" }}'
        '{%- elif part.type == "video" -%}{{ "<video>\\n" }}'
        '{%- elif part.type == "text" -%}{{ part.text' + strip + " }}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        '{%- if messages[0].role != "system" -%}'
        f"{{{{ {text(template.system[0] + system + template.system[1])} }}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        '{%- if message.role == "system" -%}'
        f"{{{{ {text(template.system[0])} + body(message) + {text(template.system[1])} }}}}"
        '{%- elif message.role == "user" -%}'
        f"{{{{ {text(template.user[0])} + body(message) + {text(template.user[1])} }}}}"
        "{%- else -%}"
        f"{{{{ {text(template.assistant + template.lead)} + body(message) + "
        f"({text(template.end)} if loop.last else {text(inner)}) + {text(template.after)} }}}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {text(template.open)} }}}}{{%- endif -%}}"
    )


def processor_files(config: InternVLConfig) -> dict[str, dict[str, Any]]:
    """The processor's files as the -hf releases have them: file name -> content."""
    settings = configs.chat_settings(config)
    side = config.vision_config.image_size[0]
    mean, std = STATISTICS[settings["normalize"]]
    dynamic = settings["dynamic_image_size"]
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": {"height": side, "width": side},
        "crop_to_patches": dynamic,
        "min_patches": settings["min_dynamic_patch"] if dynamic else 1,
        "max_patches": settings["max_dynamic_patch"] if dynamic else 1,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    shared = ("size", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    videos = {key: images[key] for key in (*shared, "rescale_factor", "resample")}
    videos |= {key: images[key] for key in ("image_mean", "image_std", "processor_class")}
    videos["video_processor_type"] = "InternVLVideoProcessor"
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": config.image_seq_length,
    }
    return {
        "preprocessor_config.json": images,
        "video_preprocessor_config.json": videos,
        "processor_config.json": processor,
    }


@torch.no_grad()
def probe(model: InternVLForConditionalGeneration) -> Tensor:
    """float32 (1, T, V) on CPU: the logits of a fixed picture-and-text input."""
    config, device = model.config, model.device
    side = config.vision_config.image_size[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, side, side, generator=generator)
    words = torch.randint(0, config.text_config.vocab_size, (8,), generator=generator)
    words = torch.where(words == config.image_token_id, 0, words)
    image = torch.full((vlm.tokens_per_tile(config, side),), config.image_token_id)
    ids = torch.cat([words[:4], image, words[4:]])[None]
    training = model.training
    model.eval()
    output = model(
        input_ids=ids.to(device), pixel_values=pixels.to(device), logits_to_keep=8, use_cache=False
    )
    model.train(training)
    return output.logits.float().cpu()


def _compare(source: Source, folder: Path, format: Format, wanted: Tensor) -> None:
    """Read `folder` as its users will and compare; bfloat16 and merging may round differently."""
    kind = getattr(torch, hub.read_json(folder / "config.json")[_DTYPE_KEY[format]])
    if format == "hf":
        model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=kind)
        model.to(source.device)
    else:
        image_token_id = source.config.image_token_id
        model = vlm.load_model(
            folder, device=source.device, dtype=kind, image_token_id=image_token_id
        )
    found = probe(model)
    difference = float((found - wanted).abs().max() / wanted.std())
    allowed = 64 * torch.finfo(kind).eps
    if not difference <= allowed:
        raise ExportError(
            f"the export's logits are {difference:.1e} of a standard deviation away from the "
            f"model's (allowed: {allowed:.1e}); nothing was kept"
        )


_DTYPE_KEY = {"hf": "dtype", "official": "torch_dtype"}


def _write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
