"""A chat model from parts: a standalone InternViT, a language model, and a projector.

This is how a model of the family starts (original: `internvl_chat_finetune.py`, the branch without
`model_name_or_path`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from internvl.errors import ModelFolderError
from internvl.models import config_checks, configs, hub
from internvl.models.chat import model as chat_model
from internvl.models.chat.model import ChatModel
from internvl.models.hub import LazyTensor, ModelFolder

_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
"""Names in the original's projector files -> ours."""


@dataclass(frozen=True)
class Parts:
    """Where the parts lie."""

    vision: Path
    """A standalone InternViT, or a chat model whose tower is taken."""
    language: Path
    """A causal language model."""
    projector: Path | None = None
    """`mlp_projector/*.pth` of the original, or None for a fresh one."""


@dataclass(frozen=True)
class _Assembled(ModelFolder):
    given: dict[str, LazyTensor]

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        return self.given


def assemble(
    parts: Parts,
    settings: dict[str, Any],
    *,
    image_token_id: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ChatModel:
    """The parts as one model, with the language model's own vocabulary; see `resize_vocabulary`.

    Args:
        settings: official keys: `select_layer`, `ps_version`, `template`, `force_image_size` …

    Raises:
        ModelFolderError: a part is missing or does not fit.
    """
    vision_folder, language_folder = (hub.open_folder(f) for f in (parts.vision, parts.language))
    language_file = language_folder.folder / "config.json"
    config_checks.check_tower(vision_folder.folder / "config.json", vision_folder.config)
    config_checks.check_language(language_file, language_folder.config)
    tensors = _tower_tensors(vision_folder) | _language_tensors(language_folder)
    vision = vision_folder.config
    config = {
        "vision_config": vision.get("vision_config", vision),
        "llm_config": language_folder.config,
        **settings,
    }
    # The files' rows count, not the config's: some language models come with padded tables.
    rows = next(t.shape[0] for n, t in tensors.items() if n.endswith(_EMBEDDINGS))
    config["llm_config"] = config["llm_config"] | {"vocab_size": rows}
    with config_checks.building(language_file):
        shape = configs.from_official(config, image_token_id)
    tensors |= _projector_tensors(parts.projector, shape)
    source = _Assembled(parts.language, config, tensors)
    return chat_model.materialize(
        chat_model.read_config(source, image_token_id), source, device=device, dtype=dtype
    )


_EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight")


def _tower_tensors(folder: ModelFolder) -> dict[str, LazyTensor]:
    prefix = "vision_model."
    tower = {n: t for n, t in folder.tensors.items() if n.startswith(prefix)}
    return tower or {prefix + name: tensor for name, tensor in folder.tensors.items()}


def _language_tensors(folder: ModelFolder) -> dict[str, LazyTensor]:
    """Under official names; an output matrix tied to the input becomes one of its own."""
    tensors = {f"language_model.{name}": tensor for name, tensor in folder.tensors.items()}
    embeddings = next((name for name in tensors if name.endswith(_EMBEDDINGS)), None)
    if embeddings is None:
        raise ModelFolderError(f"{folder.folder}: has no token embeddings; not a language model")
    internlm2 = embeddings.endswith("tok_embeddings.weight")
    head = "language_model.output.weight" if internlm2 else "language_model.lm_head.weight"
    return {head: tensors[embeddings]} | tensors


def _projector_tensors(file: Path | None, config: InternVLConfig) -> dict[str, LazyTensor]:
    """The projector under official names; fresh with torch's own initialization."""
    if file is None:
        fresh = InternVLMultiModalProjector(config).state_dict()
        back = {ours: theirs for theirs, ours in _PROJECTOR.items()}
        named = {
            f"{back[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor
            for name, tensor in fresh.items()
        }
    else:
        named = hub.load_pickled(file)
    return {f"mlp1.{name}": _held(tensor) for name, tensor in named.items()}


def _held(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def resize_vocabulary(model: ChatModel, rows: int, num_new: int) -> None:
    """Give both embedding matrices `rows` rows, of which the last `num_new` are new tokens.

    Padding rows go (a new token may then take one over). A new output row is the mean of all
    earlier ones; a new input row stays as the resize left it.
    """
    model.resize_token_embeddings(rows, mean_resizing=False)
    if num_new:
        with torch.no_grad():
            weight = model.lm_head.weight
            weight[-num_new:] = weight[:-num_new].mean(dim=0)
