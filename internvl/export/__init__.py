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
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedConfig,
)

from internvl.config.recipes import load_recipe
from internvl.data.images import STATISTICS
from internvl.data.templates import jinja
from internvl.data.tokenizers import save_tokenizer
from internvl.errors import ExportError
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.load import Dual
from internvl.models import configs, hub, kernels, keys
from internvl.models import weights as model_weights
from internvl.models.adapters import folder as adapter_folder
from internvl.models.adapters import merging
from internvl.models.chat import model as chat_model
from internvl.models.chat.model import ChatModel
from internvl.models.dual import configs as dual_configs
from internvl.models.dual import files as dual_files
from internvl.models.dual.configs import DualConfig
from internvl.models.dual.model import DualModel

logger = logging.getLogger(__name__)

Format = Literal["hf", "official"]

_TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True)
class Source:
    """What is exported: weights by the model's names, read when needed."""

    config: PreTrainedConfig
    weights: Mapping[str, Tensor]
    chat: Chat | loading.Description | None
    """Tokenizer and template; None for InternVL-14B, which holds no conversations."""
    folder: Path
    dtype: torch.dtype | None
    """Of the floating-point weights; None leaves each as it is."""
    answer: Callable[[], Tensor]
    """What the model answers to the probe; called once, before anything is written."""
    device: torch.device
    """Where it answers, and where what was written is asked the same."""


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
    source = _open(model_or_folder)
    _check_format(source.config, format)
    if code_from is not None and format == "hf":
        raise ExportError("code_from belongs to format official; hf needs no code")
    wanted = source.answer() if verify else None
    kind = dtype or source.dtype
    with _complete_or_absent(Path(to)) as folder:
        if format == "hf":
            _write_hf(source, folder, kind)
        else:
            _write_official(source, folder, kind, None if code_from is None else Path(code_from))
        if wanted is not None:
            _compare(source, folder, format, wanted)
    return Path(to)


def _check_format(config: PreTrainedConfig, format: Format) -> None:
    """Raises ExportError where the format cannot hold the model."""
    if isinstance(config, DualConfig):
        if format == "hf":
            raise ExportError(
                "InternVL-14B exists in no class of transformers; export it with format official"
            )
        if not config.text_config.num_query_tokens:
            raise ExportError(
                "this is InternVL-C alone, and the official layout holds InternVL-14B whole; "
                "export OpenGVLab/InternVL-14B-224px, which has the same InternVL-C"
            )
    elif format == "hf" and configs.chat_settings(config)["ps_version"] == "v1":
        raise ExportError(
            "pixel shuffle v1 (InternVL-Chat 1.1 and 1.2) exists in no class of transformers; "
            "export this model with format official"
        )


def has_adapters(folder: str | Path) -> bool:
    """Whether a run, adapter or model folder (or hub id) holds adapters that an export merges."""
    if loading.is_run(Path(folder)):
        return load_recipe(Path(folder) / "recipe.yaml").model.lora is not None
    found = hub.find_folder(folder)
    if adapter_folder.is_adapter(found) or adapter_folder.is_beside_model(found):
        return True
    return keys.has_adapters(hub.open_folder(found).tensors)


def _open(model_or_folder: Chat | Dual | str | Path) -> Source:
    if isinstance(model_or_folder, Chat | Dual):
        return _from_handle(model_or_folder)
    if loading.is_run(Path(model_or_folder)):
        base = load_recipe(Path(model_or_folder) / "recipe.yaml").model.id
        return _loaded(model_or_folder, loading.open_files(base)[0])
    files, adapter = loading.open_files(model_or_folder)
    if adapter is not None:
        return _loaded(adapter, files)
    if files.layout == "official" and keys.has_adapters(files.tensors):
        return _loaded(files.folder, files)
    return _from_folder(files)


def _loaded(folder: str | Path, base: hub.ModelFolder) -> Source:
    """A folder whose adapters are merged, so that the model must be in memory."""
    place = _place(_num_bytes(base.tensors))
    return _from_handle(loading.load(folder, device=place, dtype=_stored_dtype(base)))


def _from_handle(handle: Chat | Dual) -> Source:
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
    device = model.device

    def answer() -> Tensor:
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        if device.type == "cuda" and _place(num_bytes).type == "cpu":
            raise ExportError(
                f"{device} has no room to read the export back beside the model; move the model to "
                "the CPU first (its .model.cpu()), or export with verify=False"
            )
        return probe(model)

    return Source(
        config=model.config,
        weights=merging.MergedState(model),
        chat=handle if isinstance(handle, Chat) else None,
        folder=handle.folder,
        dtype=None,
        answer=answer,
        device=device,
    )


def _from_folder(files: hub.ModelFolder) -> Source:
    """Weights go from file to file, one at a time."""
    head = None if files.family == "dual" else loading.describe(files.folder)
    if head is None:
        config = dual_files.read_config(files)
        tensors = dual_files.fit_tensors(config, files)
    else:
        config = head.config
        tensors = chat_model.fit_tensors(config, files)
    place = _place(_num_bytes(tensors))
    return Source(
        config=config,
        weights=_Read(tensors),
        chat=head,
        folder=files.folder,
        dtype=None,
        answer=lambda: probe(_load(files, config, place, _stored_dtype(files))),
        device=place,
    )


def _load(
    files: hub.ModelFolder, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> ChatModel | DualModel:
    """The model in a folder of the official layout, or of the hf layout as we read it."""
    if isinstance(config, DualConfig):
        return dual_files.load_model(files, device=device, dtype=dtype)
    image_token_id = config.image_token_id
    return chat_model.load_model(
        files.folder, device=device, dtype=dtype, image_token_id=image_token_id
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
    chat = source.chat
    assert chat is not None
    tied = bool(source.config.tie_word_embeddings)
    named = (
        (name, tensor)
        for name, tensor in keys.model_to_hf(source.config, source.weights)
        if not (tied and name == keys.HF_HEAD)
    )
    kind = model_weights.write_weights(folder, named, dtype)
    config = source.config.to_dict() | {"architectures": ["InternVLForConditionalGeneration"]}
    config["internvl"] = configs.chat_settings(source.config)
    model_weights.write_json(folder / "config.json", config | {"dtype": kind})
    if chat.tokenizer is None:
        logger.warning("%s has no tokenizer files, so neither has the export", source.folder)
        return
    save_tokenizer(chat.tokenizer, folder)
    if (source.folder / "tokenizer.model").is_file():
        shutil.copy(source.folder / "tokenizer.model", folder)
    end = chat.tokenizer.convert_tokens_to_ids(chat.template.end)
    generation = {"eos_token_id": end, "pad_token_id": chat.tokenizer.pad_token_id}
    model_weights.write_json(folder / "generation_config.json", generation)
    text = jinja(chat.template, chat.system_message)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    for name, values in processor_files(source.config).items():
        model_weights.write_json(folder / name, values)


def _write_official(
    source: Source, folder: Path, dtype: torch.dtype | None, code_from: Path | None
) -> None:
    named = keys.ours_to_official(source.config, source.weights)
    kind = model_weights.write_weights(folder, named, dtype)
    dual = isinstance(source.config, DualConfig)
    to_official = dual_configs.to_official if dual else configs.to_official
    config = to_official(source.config) | {"torch_dtype": kind}
    if code_from is not None:
        config["auto_map"] = _copy_code(code_from, folder)
    else:
        logger.warning(
            "the original's Python files are not part of this export: `AutoModel` needs them and "
            "`auto_map`; copy both with code_from (--code-from FOLDER of the release)"
        )
    model_weights.write_json(folder / "config.json", config)
    if dual:
        model_weights.write_json(
            folder / "preprocessor_config.json", _clip_processor(source.config)
        )
    if dual or hub.read_json(source.folder / "config.json").get("llm_config"):
        for name in _TOKENIZER_FILES:
            if (source.folder / name).is_file():
                shutil.copy(source.folder / name, folder)
    elif source.chat is not None and source.chat.tokenizer is not None:
        save_tokenizer(source.chat.tokenizer, folder)
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


def _clip_processor(config: DualConfig) -> dict[str, Any]:
    """`preprocessor_config.json` as InternVL-14B's releases have it."""
    mean, std = STATISTICS["imagenet"]
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": config.image_size,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": config.image_size,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


@torch.no_grad()
def probe(model: InternVLForConditionalGeneration | DualModel) -> Tensor:
    """float32 on CPU: what a model answers to a fixed image and text. For a chat model logits
    (1, T, V), for InternVL-14B its embeddings and logits one after another."""
    training = model.training
    model.eval()
    answer = _dual_answer(model) if isinstance(model, DualModel) else _chat_answer(model)
    model.train(training)
    return answer.float().cpu()


def _dual_answer(model: DualModel) -> Tensor:
    side, vocabulary = model.config.image_size, model.config.text_config.vocab_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, side, side, generator=generator).to(model.device)
    ids = torch.randint(1, vocabulary, (1, 8), generator=generator).to(model.device)
    mask = model.joint_mask("itm", torch.ones_like(ids))
    queries, text = model.joint_states(model.encode_kv(model.vision_tokens(pixels)), ids, mask)
    answers = (
        *model.encode_image(pixels, ("c", "g")),
        *(model.encode_text(ids), model.itm_logits(queries), model.lm_head(text)),
    )
    return torch.cat([answer.float().flatten() for answer in answers])


def _chat_answer(model: InternVLForConditionalGeneration) -> Tensor:
    config, device = model.config, model.device
    side = config.vision_config.image_size[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, side, side, generator=generator)
    words = torch.randint(0, config.text_config.vocab_size, (8,), generator=generator)
    words = torch.where(words == config.image_token_id, 0, words)
    image = torch.full((chat_model.tokens_per_tile(config, side),), config.image_token_id)
    ids = torch.cat([words[:4], image, words[4:]])[None]
    output = model(
        input_ids=ids.to(device), pixel_values=pixels.to(device), logits_to_keep=8, use_cache=False
    )
    return output.logits


def _compare(source: Source, folder: Path, format: Format, wanted: Tensor) -> None:
    """Read `folder` as its users will and compare; bfloat16 and merging may round differently."""
    kind = getattr(torch, hub.read_json(folder / "config.json")[_DTYPE_KEY[format]])
    if format == "hf":
        model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=kind)
        model.to(source.device)
    else:
        model = _load(hub.open_folder(folder), source.config, source.device, kind)
    found = probe(model)
    difference = float((found - wanted).abs().max() / wanted.std())
    allowed = 64 * torch.finfo(kind).eps
    if not difference <= allowed:
        raise ExportError(
            f"the export's answers are {difference:.1e} of a standard deviation away from the "
            f"model's (allowed: {allowed:.1e}); nothing was kept"
        )


_DTYPE_KEY = {"hf": "dtype", "official": "torch_dtype"}
