"""The model families by name: reading, building, loading and encoding of each.

Code that depends on the family looks it up in FAMILIES instead of testing a class.
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
from internvl.inference.opened import OpenedModel, check_trains
from internvl.models import configs, hub
from internvl.models.chat import model as chat_model
from internvl.models.dual import files as dual_files
from internvl.models.dual.configs import DualConfig
from internvl.models.tensors import LazyTensor
from internvl.models.vision import resize_tower


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Arguments of `load`, with device and dtype resolved."""

    device: torch.device
    dtype: torch.dtype
    image_token_id: int | None = None
    device_map: str | dict[str, Any] | None = None
    quantize: str | None = None
    drop_path: float = 0.0
    attention: str = "sdpa"
    image_size: int | None = None
    values: bool = True
    """False for weights of zeros that take no memory, in the right shapes."""


@dataclass(frozen=True)
class Description:
    """Configuration, tokenizer, template and tiling of a chat folder, read without weights."""

    config: InternVLConfig
    tokenizer: PreTrainedTokenizerFast | None
    template: Template
    tiles: TilesConfig
    system_message: str | None


class Family(ABC):
    """A model family; everything that differs between chat models and InternVL-14B."""

    name: str
    """Key in FAMILIES; an objective states it as the family it trains."""

    @abstractmethod
    def read_config(
        self, files: hub.ModelFolder, image_token_id: int | None = None, size: int | None = None
    ) -> Any:
        """Reads a folder's configuration, for tiles of `size` px. Raises ModelFolderError."""

    @abstractmethod
    def empty_model(self, config: Any) -> Any:
        """Builds the model without data (meta device)."""

    @abstractmethod
    def fit_tensors(self, config: Any, files: hub.ModelFolder) -> dict[str, LazyTensor]:
        """Returns the folder's tensors under the model's names. Raises ModelFolderError."""

    @abstractmethod
    def load(self, opened: OpenedModel, options: LoadOptions) -> Chat | Dual:
        """Loads the model of an opened folder without its adapters. Raises ModelFolderError."""

    @abstractmethod
    def checkpoint_settings(self, files: hub.ModelFolder, name: str) -> inherited.Checkpoint:
        """Reads the settings that a recipe inherits; `name` is config.json's in messages."""

    @abstractmethod
    def with_settings(self, handle: Any, recipe: Recipe) -> Chat | Dual:
        """Returns the handle with the recipe's settings. Raises UserError."""

    @abstractmethod
    def settings(self, handle: Any) -> dict[str, Any]:
        """Returns the official keys of images and conversations, as `stored` reads them."""

    @abstractmethod
    def stored(self, handle: Any, settings: dict[str, Any], file: Path) -> Chat | Dual:
        """Returns the handle with official keys of a file, but for the tile's side.

        Raises:
            ModelFolderError: unknown conversation template.
        """

    @abstractmethod
    def resized(self, handle: Any, side: int) -> Chat | Dual:
        """Returns the handle for tiles of `side` px; its position embeddings are resized."""

    @abstractmethod
    def encoder(self, opened: OpenedModel, recipe: Recipe) -> ChatEncoder | CaptionEncoder:
        """Builds the encoder of training; no weight is read. Raises ModelFolderError."""

    def check_config(self, config: Any, recipe: Recipe) -> None:  # noqa: B027 (most have none)
        """Raises UserError if a model of this configuration does not train here."""

    def check_objective(self, recipe: Recipe) -> None:
        """Raises UserError if the recipe's objective does not train this family."""
        if recipe.objective.family == self.name:
            return
        fitting = " or ".join(objective_names(self.name))
        raise UserError(
            f"objective.name: {recipe.model.name} does not train with {recipe.objective.name}; "
            f"choose {fitting}, or another model"
        )


class ChatFamily(Family):
    """Chat models, in the official or hf layout."""

    name = "chat"

    def read_config(
        self, files: hub.ModelFolder, image_token_id: int | None = None, size: int | None = None
    ) -> InternVLConfig:
        """See `Family.read_config`; by default the token id is read from the tokenizer files."""
        return chat_model.read_config(files, image_token_id, size)

    def empty_model(self, config: Any) -> chat_model.ChatModel:
        """See `Family.empty_model`."""
        return chat_model.empty_model(config)

    def fit_tensors(self, config: Any, files: hub.ModelFolder) -> dict[str, LazyTensor]:
        """See `Family.fit_tensors`."""
        return chat_model.fit_tensors(config, files)

    def load(self, opened: OpenedModel, options: LoadOptions) -> Chat:
        """See `Family.load`."""
        # Before the weights: an unknown template or a wrong tokenizer costs no reading of them.
        description = describe(opened, options.image_token_id, options.image_size)
        model = chat_model.materialize(
            description.config,
            opened.files,
            device=options.device,
            dtype=options.dtype,
            drop_path=options.drop_path,
            attention=options.attention,
            device_map=options.device_map,
            quantize=options.quantize,
            values=options.values,
        )
        return Chat(
            model=model,
            tokenizer=description.tokenizer,
            template=description.template,
            tiles=description.tiles,
            system_message=description.system_message,
            folder=opened.folder,
        )

    def checkpoint_settings(self, files: hub.ModelFolder, name: str) -> inherited.Checkpoint:
        """See `Family.checkpoint_settings`."""
        return inherited.read_chat_checkpoint(files, name)

    def check_config(self, config: Any, recipe: Recipe) -> None:
        """See `Family.check_config`."""
        check_trains(recipe.model.name, configs.language_model(config))

    def with_settings(self, handle: Chat, recipe: Recipe) -> Chat:
        """See `Family.with_settings`."""
        model, data = handle.model, recipe.data
        self.check_config(model.config, recipe)
        tiles = data.tiling
        own_template = template(data.template) if data.template else handle.template
        system = handle.system_message if data.system_message is None else data.system_message
        # In the configuration, so that an export carries the settings of the training.
        model.config.internvl = configs.chat_settings(model.config) | {
            "template": own_template.name,
            # As in a release: null stands for the template's own message.
            "system_message": None if system == own_template.system_message else system,
            "dynamic_image_size": tiles.max > 1,
            "use_thumbnail": tiles.thumbnail,
            "min_dynamic_patch": tiles.min,
            "max_dynamic_patch": tiles.max,
            "pad2square": tiles.pad_square,
            "normalize": data.statistics,
            "exif": data.exif,
        }
        return replace(handle, template=own_template, system_message=system, tiles=tiles)

    def settings(self, handle: Chat) -> dict[str, Any]:
        """See `Family.settings`."""
        # Not the pixel shuffle's version: it is the base's, whatever an adapter folder says.
        settings = configs.chat_settings(handle.model.config)
        return {key: settings[key] for key in configs.RUN_KEYS}

    def stored(self, handle: Chat, settings: dict[str, Any], file: Path) -> Chat:
        """See `Family.stored`."""
        config, side = handle.model.config, handle.model.config.vision_config.image_size[0]
        # A file by hand may omit keys, whose values are then the base's.
        merged = configs.chat_settings(config) | settings | {"force_image_size": side}
        config.internvl = merged
        return replace(
            handle,
            template=_named_template(merged["template"], file),
            tiles=tiling(merged, side),
            system_message=merged["system_message"],
        )

    def resized(self, handle: Chat, side: int) -> Chat:
        """See `Family.resized`."""
        config = handle.model.config
        resize_tower(handle.model, side)
        config.internvl = configs.chat_settings(config) | {"force_image_size": side}
        config.image_seq_length = chat_model.tokens_per_tile(config, side)
        return replace(handle, tiles=replace(handle.tiles, size=side))

    def encoder(self, opened: OpenedModel, recipe: Recipe) -> ChatEncoder:
        """See `Family.encoder`."""
        description, data = describe(opened), recipe.data
        return ChatEncoder(
            _tokenizer(opened),
            template(data.template) if data.template else description.template,
            # Of the recipe's tile size: it decides the visual tokens, not the checkpoint's.
            chat_model.tokens_per_tile(description.config, data.tiling.size),
            # "" is a message of its own, which removes the checkpoint's.
            description.system_message if data.system_message is None else data.system_message,
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

    def fit_tensors(self, config: Any, files: hub.ModelFolder) -> dict[str, LazyTensor]:
        """See `Family.fit_tensors`."""
        return dual_files.fit_tensors(config, files)

    def load(self, opened: OpenedModel, options: LoadOptions) -> Dual:
        """See `Family.load`."""
        # Refused, not ignored: the loader below has no quantization.
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
            values=options.values,
        )
        # Ids of another model's tokenizer, past the embeddings, would fail in a GPU kernel.
        if opened.tokenizer is not None:
            check_vocabulary(opened.tokenizer, model.config.text_config.vocab_size, opened.folder)
        return Dual(model, opened.tokenizer, opened.folder)

    def checkpoint_settings(self, files: hub.ModelFolder, name: str) -> inherited.Checkpoint:
        """See `Family.checkpoint_settings`."""
        return inherited.checkpoint_from_config(dual_files.read_config(files), name)

    def with_settings(self, handle: Dual, recipe: Recipe) -> Dual:
        """See `Family.with_settings`; captions have no template, images one square tile."""
        return handle

    def settings(self, handle: Dual) -> dict[str, Any]:
        """See `Family.settings`; there is nothing but the side of the image."""
        return {"force_image_size": handle.model.config.image_size}

    def stored(self, handle: Dual, settings: dict[str, Any], file: Path) -> Dual:
        """See `Family.stored`."""
        return handle

    def resized(self, handle: Dual, side: int) -> Dual:
        """See `Family.resized`."""
        resize_tower(handle.model, side)
        handle.model.config.force_image_size = side
        return handle

    def encoder(self, opened: OpenedModel, recipe: Recipe) -> CaptionEncoder:
        """See `Family.encoder`."""
        return CaptionEncoder(_tokenizer(opened))


# Stateless, so one instance of each serves all models.
FAMILIES: dict[str, Family] = {"chat": ChatFamily(), "dual": DualFamily()}
_MODEL_TYPES = {InternVLConfig.model_type: "chat", DualConfig.model_type: "dual"}


def name_of(config: PreTrainedConfig) -> str:
    """Returns the family name of a configuration: "chat" or "dual"."""
    return _MODEL_TYPES[config.model_type]


def describe(
    opened: OpenedModel, image_token_id: int | None = None, image_size: int | None = None
) -> Description:
    """Reads configuration, tokenizer, template and tiling of a chat model, but no weight.

    Raises:
        ModelFolderError: not a chat model, or tokenizer files of another model.
    """
    folder, tokenizer = opened.folder, opened.tokenizer
    # The loaded tokenizer knows the id; without it, read_config searches the files.
    if tokenizer is not None and image_token_id is None:
        image_token_id = placeholder_id(tokenizer, folder)
    config = chat_model.read_config(opened.files, image_token_id, image_size)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.text_config.vocab_size, folder)
    settings = configs.chat_settings(config)
    return Description(
        config=config,
        tokenizer=tokenizer,
        template=_named_template(settings["template"], opened.folder / "config.json"),
        tiles=tiling(settings, config.vision_config.image_size[0]),
        system_message=settings["system_message"],
    )


def parts_checkpoint_settings(model: ModelConfig, files: hub.ModelFolder) -> inherited.Checkpoint:
    """Reads the settings that a recipe inherits from a model from parts, with their sources.

    Args:
        files: files of the assembled model, see `assemble`.
    """
    start = inherited.read_chat_checkpoint(files, "default of a model from parts")
    # There is no config.json that could be named as the source.
    sources = dict.fromkeys(start.sources, "default of a model from parts")
    sources["data.tiles.size"] = f"the tower of {model.vision}"
    sources["data.template"] = "model.template"
    # By this prefix `inherited.complete` knows that another template brings another message.
    sources["data.system_message"] = f"template {model.template}"
    return replace(start, sources=sources)


def _named_template(name: str | None, file: Path) -> Template:
    # No default: under another template answers are bad without any error.
    if name not in TEMPLATES:
        raise ModelFolderError(
            f"{file}: its conversation template {name!r} is not known "
            f"here; known are {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def placeholder_id(tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Returns the id of `<IMG_CONTEXT>`. Raises ModelFolderError if the tokenizer has none."""
    # `convert_tokens_to_ids` would return the id of the unknown token instead of failing.
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
