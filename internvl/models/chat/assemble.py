"""A chat model from parts: a standalone InternViT, a language model, and a projector.

This is how a model of the family starts (original: `internvl_chat_finetune.py`, the branch without
`model_name_or_path`). What comes out is a model folder in the official layout whose tensors are
read or drawn when they are asked for, so that everything that takes a folder takes it.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

from internvl.errors import ModelFolderError
from internvl.models import config_checks, configs, hub
from internvl.models.hub import ModelFolder
from internvl.models.tensors import LazyTensor, in_memory, load_pickled

_PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
"""Names in the original's projector files -> ours."""
_EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight")


@dataclass(frozen=True)
class Parts:
    """Folders and files of the parts."""

    vision: Path
    """A standalone InternViT, or a chat model whose tower is taken."""
    language: Path
    """A causal language model."""
    projector: Path | None = None
    """`mlp_projector/*.pth` of the original, or None for a fresh one."""


@dataclass(frozen=True)
class AssembledFolder(ModelFolder):
    """Parts as one folder in the official layout; `folder` is the language model's."""

    vision: ModelFolder
    language: ModelFolder
    projector: Path | None
    num_new: int
    """New tokens at the end of the vocabulary, whose rows no file holds."""
    seed: int
    """Of a fresh projector and of new rows of the input embeddings."""

    @property
    def weights(self) -> list[Path]:
        """Files of the parts. Raises ModelFolderError if one is missing."""
        projector = [] if self.projector is None else [self.projector]
        return [*self.vision.weights, *self.language.weights, *projector]

    @cached_property
    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor by its official name; random ones are the same at each call."""
        rows = self.config["llm_config"]["vocab_size"]
        with config_checks.building(self.folder / "config.json"):
            # The placeholder's id has no influence on shapes.
            config = configs.from_official(self.config, image_token_id=0)
        language = _language_tensors(self.language)
        for name, tensor in language.items():
            if name.endswith(_EMBEDDINGS):
                std = getattr(config.text_config, "initializer_range", 0.02)
                language[name] = _resized_input(tensor, rows, std, self.seed)
            elif name.endswith(("lm_head.weight", "language_model.output.weight")):
                language[name] = _resized_output(tensor, rows, self.num_new)
        return (
            _tower_tensors(self.vision)
            | language
            | _projector_tensors(self.projector, config, self.seed)
        )


def official_config(
    vision: dict[str, Any], language: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Joins the parts' `config.json` to the official one of a chat model.

    Args:
        vision: of an InternViT, or of a chat model whose tower is taken.
        settings: official keys: `select_layer`, `ps_version`, `template`, `force_image_size` …
    """
    return {
        "model_type": "internvl_chat",
        "vision_config": vision.get("vision_config", vision),
        "llm_config": language,
        **settings,
    }


def assemble(
    parts: Parts, settings: dict[str, Any], *, rows: int, num_new: int, seed: int
) -> AssembledFolder:
    """Joins parts to one model; no weight is read.

    Args:
        settings: see `official_config`.
        rows: tokens of the language model's tokenizer with the new ones: both embedding matrices
            get as many rows. Padding rows go, and a new token may take one over.
        num_new: how many of `rows`, at the end, are new. Their output rows are the mean of all
            earlier ones; input rows that no file has are drawn.
        seed: of everything that is drawn.

    Raises:
        ModelFolderError: a part is missing or has a wrong configuration.
    """
    vision, language = (hub.open_folder(folder) for folder in (parts.vision, parts.language))
    config_checks.check_tower(vision.folder / "config.json", vision.config)
    config_checks.check_language(language.folder / "config.json", language.config)
    if parts.projector is not None and not parts.projector.is_file():
        raise ModelFolderError(
            f"{parts.projector}: no such projector file; name an `mlp_projector/*.pth` of a "
            "release, or none for a fresh projector"
        )
    # Not the file's vocab_size: some language models come with padded tables.
    config = official_config(vision.config, language.config | {"vocab_size": rows}, settings)
    return AssembledFolder(
        language.folder,
        config,
        vision=vision,
        language=language,
        projector=parts.projector,
        num_new=num_new,
        seed=seed,
    )


def _tower_tensors(folder: ModelFolder) -> dict[str, LazyTensor]:
    prefix = "vision_model."
    tower = {n: t for n, t in folder.tensors.items() if n.startswith(prefix)}
    return tower or {prefix + name: tensor for name, tensor in folder.tensors.items()}


def _language_tensors(folder: ModelFolder) -> dict[str, LazyTensor]:
    """Returns the tensors under official names; an output matrix tied to the input becomes one of
    its own."""
    tensors = {f"language_model.{name}": tensor for name, tensor in folder.tensors.items()}
    embeddings = next((name for name in tensors if name.endswith(_EMBEDDINGS)), None)
    if embeddings is None:
        raise ModelFolderError(f"{folder.folder}: has no token embeddings; not a language model")
    internlm2 = embeddings.endswith("tok_embeddings.weight")
    head = "language_model.output.weight" if internlm2 else "language_model.lm_head.weight"
    return {head: tensors[embeddings]} | tensors


def _resized_input(tensor: LazyTensor, rows: int, std: float, seed: int) -> LazyTensor:
    """Wraps input embeddings (V, D) to read as (rows, D); rows beyond V are drawn, as
    `transformers` initializes embeddings."""

    def read() -> Tensor:
        table = tensor.read()
        # Its own generator: a draw from torch's global one would move everything drawn after it,
        # and a resumed run that rebuilds frozen embeddings would get others. Not `seed` itself,
        # from which a fresh projector draws.
        generator = torch.Generator().manual_seed(seed + 1)
        fresh = torch.empty(max(0, rows - len(table)), table.shape[1])
        fresh.normal_(0.0, std, generator=generator)
        return torch.cat([table[:rows], fresh.to(table.dtype)])

    def read_rows(start: int, stop: int) -> Tensor:
        # Drawn rows follow from all before them, so a slice that has some reads the whole.
        return tensor.rows(start, stop) if stop <= tensor.shape[0] else read()[start:stop]

    return LazyTensor((rows, *tensor.shape[1:]), tensor.dtype, read, read_rows)


def _resized_output(tensor: LazyTensor, rows: int, num_new: int) -> LazyTensor:
    """Wraps an output matrix (V, D) to read as (rows, D), the new tokens' rows the mean of all
    earlier ones, as in the original."""

    def read() -> Tensor:
        table = tensor.read()
        # float32, for the mean of a bfloat16 table would be rounded before the model's dtype is.
        earlier = table[: rows - num_new].float()
        if not num_new:
            return table[:rows]
        # Rows that neither the file nor a new token has: ids that the tokenizer leaves out.
        gap = rows - num_new - len(earlier)
        mean = earlier.mean(dim=0, keepdim=True)
        return torch.cat([earlier, mean.expand(gap + num_new, -1)])

    dtype = torch.float32 if num_new else tensor.dtype

    def read_rows(start: int, stop: int) -> Tensor:
        if stop <= min(rows - num_new, tensor.shape[0]):
            return tensor.rows(start, stop).to(dtype)
        return read()[start:stop]

    return LazyTensor((rows, *tensor.shape[1:]), dtype, read, read_rows)


def _projector_tensors(
    file: Path | None, config: InternVLConfig, seed: int
) -> dict[str, LazyTensor]:
    """Returns the projector under official names; fresh with torch's own initialization."""
    if file is not None:
        named = load_pickled(file)
    else:
        # Forked: what is drawn later (adapters, dropout) must not depend on there being a file.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            fresh = InternVLMultiModalProjector(config).state_dict()
        official = {ours: theirs for theirs, ours in _PROJECTOR.items()}
        split = {name: name.partition(".") for name in fresh}
        named = {f"{official[split[n][0]]}.{split[n][2]}": tensor for n, tensor in fresh.items()}
    return {f"mlp1.{name}": in_memory(tensor) for name, tensor in named.items()}
