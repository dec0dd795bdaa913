"""The two families by the key that `hub.ModelFolder.family` gives: what differs between them.

Whoever needs to know which one a model is looks it up here instead of asking for its class.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig, PreTrainedConfig, PreTrainedTokenizerFast

from internvl.config import ModelConfig, Recipe, TilesConfig, objective_names
from internvl.data.chat import ChatEncoder
from internvl.data.pairs import CaptionEncoder
from internvl.data.templates import TEMPLATES, Template, template
from internvl.data.tokenizers import check_vocabulary
from internvl.errors import ModelFolderError, UserError
from internvl.inference import inherited
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.inherited import tiling
from internvl.inference.opened import OpenedModel
from internvl.models import configs, hub
from internvl.models.chat import model as chat_model
from internvl.models.dual import files as dual_files
from internvl.models.dual.configs import DualConfig


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded; fields as the arguments of `load`."""

    device: torch.device
    dtype: torch.dtype
    image_token_id: int | None = None
    device_map: str | dict[str, Any] | None = None
    quantize: str | None = None
    drop_path: float = 0.0
    attention: str = "sdpa"
    image_size: int | None = None


@dataclass(frozen=True)
class Description:
    """What a chat folder is, before any weight is read."""

    config: InternVLConfig
    tokenizer: PreTrainedTokenizerFast | None
    template: Template
    tiles: TilesConfig
    system_message: str | None


class Family(ABC):
    """What differs between chat models and InternVL-14B."""

    name: str
    """Key in FAMILIES, which objectives state as theirs."""

    @abstractmethod
    def read_config(
        self, files: hub.ModelFolder, image_token_id: int | None = None, size: int | None = None
    ) -> Any:
        """The configuration in a folder, for tiles of `size` px. Raises ModelFolderError."""

    @abstractmethod
    def empty_model(self, config: Any) -> Any:
        """The model without data (meta device)."""

    @abstractmethod
    def fit_tensors(self, config: Any, files: hub.ModelFolder) -> dict[str, hub.LazyTensor]:
        """The folder's tensors under the model's names. Raises ModelFolderError."""

    @abstractmethod
    def load(self, opened: OpenedModel, options: LoadOptions) -> Chat | Dual:
        """The model of an opened folder, its adapters left out. Raises ModelFolderError."""

    @abstractmethod
    def inherited(self, files: hub.ModelFolder, name: str) -> inherited.Checkpoint:
        """What a recipe takes over; `name` is what messages call config.json."""

    @abstractmethod
    def with_settings(self, handle: Any, recipe: Recipe) -> Chat | Dual:
        """The handle as the recipe wants it used. Raises UserError."""

    @abstractmethod
    def encoder(self, opened: OpenedModel, recipe: Recipe) -> ChatEncoder | CaptionEncoder:
        """The encoder that training uses; no weight is read. Raises ModelFolderError."""

    def check_objective(self, recipe: Recipe) -> None:
        """Raises UserError where the recipe's objective does not train this family."""
        if recipe.objective.family == self.name:
            return
        fitting = " or ".join(objective_names(self.name))
        raise UserError(
            f"objective.name: {recipe.model.name} does not train with {recipe.objective.name}; "
            f"choose {fitting}, or another model"
        )


class ChatFamily(Family):
    """Chat models, of the official or the hf layout."""

    name = "chat"

    def read_config(
        self, files: hub.ModelFolder, image_token_id: int | None = None, size: int | None = None
    ) -> InternVLConfig:
        """See `Family.read_config`; the token id is by default what the tokenizer files say."""
        return chat_model.read_config(files, image_token_id, size)

    def empty_model(self, config: Any) -> chat_model.ChatModel:
        """See `Family.empty_model`."""
        return chat_model.empty_model(config)

    def fit_tensors(self, config: Any, files: hub.ModelFolder) -> dict[str, hub.LazyTensor]:
        """See `Family.fit_tensors`."""
        return chat_model.fit_tensors(config, files)

    def load(self, opened: OpenedModel, options: LoadOptions) -> Chat:
        """See `Family.load`."""
        head = describe(opened, options.image_token_id, options.image_size)
        model = chat_model.materialize(
            head.config,
            opened.files,
            device=options.device,
            dtype=options.dtype,
            drop_path=options.drop_path,
            attention=options.attention,
            device_map=options.device_map,
            quantize=options.quantize,
        )
        return Chat(
            model, head.tokenizer, head.template, head.tiles, head.system_message, opened.folder
        )

    def inherited(self, files: hub.ModelFolder, name: str) -> inherited.Checkpoint:
        """See `Family.inherited`."""
        return inherited.of_chat_files(files, name)

    def with_settings(self, handle: Chat, recipe: Recipe) -> Chat:
        """See `Family.with_settings`."""
        model, data = handle.model, recipe.data
        if configs.language_model(model.config) == "GptOssForCausalLM":
            raise UserError(
                f"{recipe.model.name}: GPT-OSS answers and exports here, but does not train: "
                "packed rows have no sliding windows; choose a model with another language model"
            )
        tiles = data.tiling
        chosen = template(data.template) if data.template else handle.template
        system = handle.system_message if data.system_message is None else data.system_message
        # Into the configuration, so that an export carries what the run was trained with.
        model.config.internvl = configs.chat_settings(model.config) | {
            "template": chosen.name,
            # As a release says it: null where the template's own holds.
            "system_message": None if system == chosen.system_message else system,
            "dynamic_image_size": tiles.max > 1,
            "use_thumbnail": tiles.thumbnail,
            "min_dynamic_patch": tiles.min,
            "max_dynamic_patch": tiles.max,
            "pad2square": tiles.pad_square,
            "normalize": data.statistics,
            "exif": data.exif,
        }
        return replace(handle, template=chosen, system_message=system, tiles=tiles)

    def encoder(self, opened: OpenedModel, recipe: Recipe) -> ChatEncoder:
        """See `Family.encoder`."""
        head, data = describe(opened), recipe.data
        return ChatEncoder(
            _tokenizer(opened),
            template(data.template) if data.template else head.template,
            chat_model.tokens_per_tile(head.config, data.tiling.size),
            head.system_message if data.system_message is None else data.system_message,
        )


class DualFamily(Family):
    """InternVL-14B, whole or InternVL-C alone."""

    name = "dual"

    def read_config(
        self, files: hub.ModelFolder, image_token_id: int | None = None, size: int | None = None
    ) -> DualConfig:
        """See `Family.read_config`; there is no placeholder token."""
        return dual_files.read_config(files, size)

    def empty_model(self, config: Any) -> Any:
        """See `Family.empty_model`."""
        return dual_files.empty_model(config)

    def fit_tensors(self, config: Any, files: hub.ModelFolder) -> dict[str, hub.LazyTensor]:
        """See `Family.fit_tensors`."""
        return dual_files.fit_tensors(config, files)

    def load(self, opened: OpenedModel, options: LoadOptions) -> Dual:
        """See `Family.load`."""
        if options.quantize is not None:
            raise UserError(
                f"quantize={options.quantize!r}: InternVL-14B is used in bfloat16 or float32"
            )
        model = dual_files.load_model(
            opened.files,
            device=options.device,
            dtype=options.dtype,
            image_size=options.image_size,
            drop_path=options.drop_path,
            attention=options.attention,
            device_map=options.device_map,
        )
        if opened.tokenizer is not None:
            check_vocabulary(opened.tokenizer, model.config.text_config.vocab_size, opened.folder)
        return Dual(model, opened.tokenizer, opened.folder)

    def inherited(self, files: hub.ModelFolder, name: str) -> inherited.Checkpoint:
        """See `Family.inherited`."""
        return inherited.of_config(dual_files.read_config(files), name)

    def with_settings(self, handle: Dual, recipe: Recipe) -> Dual:
        """See `Family.with_settings`; a caption has no template and an image one square tile."""
        return handle

    def encoder(self, opened: OpenedModel, recipe: Recipe) -> CaptionEncoder:
        """See `Family.encoder`."""
        return CaptionEncoder(_tokenizer(opened))


FAMILIES: dict[str, Family] = {"chat": ChatFamily(), "dual": DualFamily()}
_MODEL_TYPES = {InternVLConfig.model_type: "chat", DualConfig.model_type: "dual"}


def name_of(config: PreTrainedConfig) -> str:
    """The key of a configuration's family: "chat" or "dual"."""
    return _MODEL_TYPES[config.model_type]


def describe(
    opened: OpenedModel, image_token_id: int | None = None, image_size: int | None = None
) -> Description:
    """Configuration, tokenizer, template and tiling of a chat model; no weight is read.

    Raises:
        ModelFolderError: not a chat model, or tokenizer files of another model.
    """
    folder, tokenizer = opened.folder, opened.tokenizer
    if tokenizer is not None and image_token_id is None:
        image_token_id = placeholder_id(tokenizer, folder)
    config = chat_model.read_config(opened.files, image_token_id, image_size)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.text_config.vocab_size, folder)
    settings = configs.chat_settings(config)
    return Description(
        config=config,
        tokenizer=tokenizer,
        template=_named_template(settings["template"], opened),
        tiles=tiling(settings, config.vision_config.image_size[0]),
        system_message=settings["system_message"],
    )


def inherited_of_parts(model: ModelConfig, files: hub.ModelFolder) -> inherited.Checkpoint:
    """What a recipe takes over from a model from parts, with the part or default it is from.

    Args:
        files: see `assemble`.
    """
    start = inherited.of_chat_files(files, "default of a model from parts")
    sources = dict.fromkeys(start.sources, "default of a model from parts")
    sources["data.tiles.size"] = f"the tower of {model.vision}"
    sources["data.template"] = "model.template"
    # By this beginning `inherited.complete` knows that another template brings another message.
    sources["data.system_message"] = f"template {model.template}"
    return replace(start, sources=sources)


def _named_template(name: str | None, opened: OpenedModel) -> Template:
    if name not in TEMPLATES:
        raise ModelFolderError(
            f"{opened.folder / 'config.json'}: its conversation template {name!r} is not known "
            f"here; known are {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def placeholder_id(tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """The id of `<IMG_CONTEXT>`. Raises ModelFolderError where the tokenizer has none."""
    vocabulary = tokenizer.get_vocab()
    if chat_model.IMAGE_TOKEN not in vocabulary:
        raise ModelFolderError(
            f"{folder}: its tokenizer has no {chat_model.IMAGE_TOKEN}; this is a language "
            "model's, take the tokenizer files of the chat model's release"
        )
    return vocabulary[chat_model.IMAGE_TOKEN]


def _tokenizer(opened: OpenedModel) -> PreTrainedTokenizerFast:
    if opened.tokenizer is None:
        raise UserError(f"{opened.folder}: no tokenizer files; copy those of the release there")
    return opened.tokenizer
