"""Completes a recipe from its checkpoint: tile size and counts, thumbnail, padding, normalization,
EXIF orientation, template, system message. Key by key; a value in the recipe takes precedence.

    checkpoint_from_config   settings of a model folder, from its config.json alone
    complete                 a recipe without open values, and the source of each value
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import InternVLConfig

from internvl.config import DataConfig, Recipe, TilesConfig
from internvl.data.templates import TEMPLATES
from internvl.errors import UserError
from internvl.inference.opened import OpenedModel
from internvl.models import configs
from internvl.models.chat import model as chat_model
from internvl.models.chat import processor
from internvl.models.dual.configs import DualConfig
from internvl.models.hub import ModelFolder

_SETTINGS = ("normalize", "exif", "template", "system_message")
"""Fields of `DataConfig` that are inherited from a checkpoint, besides tiles."""
_OFFICIAL_KEYS = {
    "min": "min_dynamic_patch",
    "max": "max_dynamic_patch",
    "thumbnail": "use_thumbnail",
    "pad_square": "pad2square",
}
"""Field of `TilesConfig` -> official key of config.json."""
# No config.json of InternVL-14B states these: they are fixed in the original's code.
_DUAL_VALUES: dict[str, Any] = {
    "data.tiles.min": 1,
    "data.tiles.max": 1,
    "data.tiles.pad_square": False,
    "data.normalize": "imagenet",
    "data.exif": "ignore",
    "data.template": None,
    "data.system_message": None,
}
"""The only values that InternVL-14B supports."""
_VALUE_WIDTH = 32
"""Maximum characters of a value in a table."""


@dataclass(frozen=True)
class Checkpoint:
    """Image and conversation settings of a checkpoint."""

    dual: bool
    """True for InternVL-14B, which takes an image as one square tile and no conversations."""
    values: dict[str, Any]
    """Dotted recipe key -> value."""
    sources: dict[str, str]
    """Dotted recipe key -> source of its value, for the reader."""
    multiple: int
    """The side of a tile must be a multiple of it, px."""
    size: int
    """Side of the tiles that the position embeddings fit, px."""


@dataclass(frozen=True)
class Setting:
    """One value of a completed recipe."""

    key: str
    value: Any
    source: str
    """Source of the value, for the reader."""


@dataclass(frozen=True)
class Completed:
    """A recipe without open values."""

    recipe: Recipe
    settings: tuple[Setting, ...]
    """Settings that a checkpoint can state."""
    resized_from: int | None
    """Side that the position embeddings are resized from, px; None if they fit."""
    start: OpenedModel | None = None
    """`recipe.model` if completing the recipe had to open it."""

    def render(self) -> str:
        """Renders a table with a line per setting: key, value, source."""
        rows = [
            (setting.key, _shortened(setting.value), setting.source) for setting in self.settings
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"  {key:{widths[0]}}  {value:{widths[1]}}  {source}" for key, value, source in rows
        ]
        if self.resized_from is not None:
            lines.append(
                f"  position embeddings are resized from {self.resized_from} to "
                f"{self.recipe.data.tiling.size} px"
            )
        return "\n".join(["images and conversations", *lines])


def _shortened(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value).lower()
    return text if len(text) <= _VALUE_WIDTH else f"{text[: _VALUE_WIDTH - 2]} …"


def read_chat_checkpoint(source: ModelFolder, name: str) -> Checkpoint:
    """Reads the settings of a chat model from its config.json; no weight or tokenizer is read.

    Args:
        name: name of the file in messages, such as "config.json of owner/model".

    Raises:
        ModelFolderError: config.json of another model than InternVL.
    """
    # Any id does: the settings do not depend on it, and the real one is in the tokenizer files.
    config = chat_model.read_config(source, image_token_id=0)
    if source.layout == "official":
        return checkpoint_from_config(config, name, source.config)
    # Our own exports in the hf layout carry the official keys in a section.
    if source.config.get("internvl") is not None:
        return checkpoint_from_config(config, name, source.config["internvl"])
    images = processor.read_images(source.reader)
    return _with_processor_sources(checkpoint_from_config(config, name, {}), images, name)


def _with_processor_sources(
    checkpoint: Checkpoint, images: processor.ImageSettings, name: str
) -> Checkpoint:
    """Names the processor file as the source of the image settings that it states."""
    keys = {f"data.tiles.{key}": official for key, official in _OFFICIAL_KEYS.items()}
    keys |= {"data.normalize": "normalize", "data.tiles.size": "force_image_size"}
    # The last "config.json" of the name: a folder may have the same words in its path.
    file = images.file.join(name.rsplit("config.json", 1))
    stated = {key: file for key, official in keys.items() if official in images.values}
    return replace(checkpoint, sources=checkpoint.sources | stated)


def checkpoint_from_config(
    config: Any, name: str, official: dict[str, Any] | None = None
) -> Checkpoint:
    """Returns the image and conversation settings of a model configuration.

    Args:
        config: InternVLConfig or DualConfig.
        official: official keys in the file; a key it omits is reported as a default. None: all
            keys are taken as stated.
    """
    return _FROM_CONFIG[config.model_type](config, name, official)


def _from_dual_config(config: Any, name: str, official: dict[str, Any] | None) -> Checkpoint:
    size, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    values = _DUAL_VALUES | {"data.tiles.size": size, "data.tiles.thumbnail": False}
    sources = dict.fromkeys(values, "InternVL-14B") | {"data.tiles.size": name}
    return Checkpoint(True, values, sources, patch, size)


def _from_chat_config(config: Any, name: str, official: dict[str, Any] | None) -> Checkpoint:
    size, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    settings = configs.chat_settings(config)
    tiles = vars(tiling(settings, size))
    values = {f"data.tiles.{key}": value for key, value in tiles.items()}
    values |= {f"data.{key}": settings[key] for key in _SETTINGS}
    sources = dict.fromkeys(values, name)
    for key, official_key in _OFFICIAL_KEYS.items():
        # With dynamic_image_size off, the file's counts have no effect: that key decides.
        if key in ("min", "max", "thumbnail") and not settings["dynamic_image_size"]:
            official_key = "dynamic_image_size"
        sources[f"data.tiles.{key}"] = _source(name, official_key, official)
    for key in _SETTINGS:
        sources[f"data.{key}"] = _source(name, key, official)
    # Most checkpoints leave the system message to their template.
    if values["data.system_message"] is None and settings["template"] in TEMPLATES:
        values["data.system_message"] = TEMPLATES[settings["template"]].system_message
        sources["data.system_message"] = f"template {settings['template']}"
    # Pixel shuffle merges 1 / downsample_ratio patches per side into one visual token.
    return Checkpoint(False, values, sources, round(patch / config.downsample_ratio), size)


_FROM_CONFIG = {
    InternVLConfig.model_type: _from_chat_config,
    DualConfig.model_type: _from_dual_config,
}
"""model_type -> `checkpoint_from_config` of that family."""


def _source(name: str, key: str, official: dict[str, Any] | None) -> str:
    """Returns `name`, marked as a default if the file omits the key."""
    is_stated = official is None or official.get(key) is not None
    return name if is_stated else f"{name}, by default ({key})"


def tiling(settings: dict[str, Any], size: int) -> TilesConfig:
    """Returns the tiling of a checkpoint for tiles of `size` px."""
    # Without dynamic tiling the original ignores the counts and may pad; with it, it never pads.
    if not settings["dynamic_image_size"]:
        pad = settings["pad2square"]
        return TilesConfig(size=size, min=1, max=1, thumbnail=False, pad_square=pad)
    return TilesConfig(
        size=size,
        min=settings["min_dynamic_patch"],
        max=settings["max_dynamic_patch"],
        thumbnail=settings["use_thumbnail"],
    )


def checkpoint_from_run(saved: Recipe, file: Path) -> Checkpoint:
    """Returns the settings in the complete recipe of a run folder, for a run that is resumed."""
    # Not from the base checkpoint: if that changed meanwhile, the run must not change with it.
    values = {
        f"data.tiles.{f.name}": getattr(saved.data.tiles, f.name) for f in fields(TilesConfig)
    }
    values |= {f"data.{key}": getattr(saved.data, key) for key in _SETTINGS}
    dual, sources = saved.objective.family == "dual", dict.fromkeys(values, str(file))
    # Multiple 1: the saved size was checked when the run began.
    return Checkpoint(dual, values, sources, 1, saved.data.tiling.size)


def complete(recipe: Recipe, checkpoint: Checkpoint) -> Completed:
    """Fills in every open value of a recipe.

    Raises:
        UserError: tiles of the recipe that do not fit the checkpoint; all problems in one sentence.
    """
    stated = {key for key in checkpoint.values if _value(recipe.data, key) is not None}
    values, sources = dict(checkpoint.values), dict(checkpoint.sources)
    for key in stated:
        values[key], sources[key] = _value(recipe.data, key), "recipe"
    # A template of the recipe brings its own system message, unless the checkpoint has one.
    template_name = values["data.template"]
    from_template = checkpoint.sources["data.system_message"].startswith("template ")
    if "data.system_message" not in stated and from_template and template_name in TEMPLATES:
        values["data.system_message"] = TEMPLATES[template_name].system_message
        sources["data.system_message"] = f"template {template_name}"
    problems = list(_problems(values, stated, checkpoint))
    if problems:
        raise UserError(f"{recipe.model.name}: {'; '.join(problems)}")
    tiles = {key.rpartition(".")[2]: value for key, value in values.items() if ".tiles." in key}
    other = {key: values[f"data.{key}"] for key in _SETTINGS}
    data = replace(recipe.data, tiles=TilesConfig(**tiles), **other)
    # All others of InternVL-14B are constants, and would only fill the table.
    reported = ["data.tiles.size"] if checkpoint.dual else list(values)
    size = values["data.tiles.size"]
    return Completed(
        replace(recipe, data=data),
        tuple(Setting(key, values[key], sources[key]) for key in reported),
        None if size == checkpoint.size else checkpoint.size,
    )


def is_complete(recipe: Recipe) -> bool:
    """True if the recipe has no open value."""
    data = recipe.data
    # InternVL-14B has no conversations, so its template and system message stay None.
    texts = recipe.objective.family == "dual" or None not in (data.template, data.system_message)
    images = isinstance(data.tiles, TilesConfig) and None not in (data.normalize, data.exif)
    return images and texts


def _value(data: DataConfig, key: str) -> Any:
    """Returns the value of a dotted key below `data`."""
    value: Any = data
    for name in key.split(".")[1:]:
        value = getattr(value, name)
    return value


def _problems(
    values: dict[str, Any], stated: Sequence[str] | set[str], checkpoint: Checkpoint
) -> Iterator[str]:
    """Yields the contradictions between values of the recipe and the checkpoint."""
    size = values["data.tiles.size"]
    if size % checkpoint.multiple:
        yield (
            f"data.tiles.size = {size} does not fit this model: a tile's side must be a multiple "
            f"of {checkpoint.multiple} pixels"
        )
    if checkpoint.dual:
        yield from _unsupported(values, stated)
        return

    def quoted(key: str) -> str:
        owner = "" if f"data.tiles.{key}" in stated else " of the checkpoint"
        return f"data.tiles.{key} = {str(values[f'data.tiles.{key}']).lower()}{owner}"

    # Here, not in the recipe's own check: one side of each may be the checkpoint's.
    if values["data.tiles.min"] > values["data.tiles.max"]:
        yield f"{quoted('min')} is larger than {quoted('max')}; set both"
    if values["data.tiles.pad_square"] and values["data.tiles.max"] > 1:
        yield f"{quoted('pad_square')} goes only with data.tiles.max: 1, not {quoted('max')}"


def _unsupported(values: dict[str, Any], stated: Sequence[str] | set[str]) -> Iterator[str]:
    """Yields the stated values that InternVL-14B does not support."""
    # An image is one stretched square tile with ImageNet's mean and deviation; no conversations.
    for key, supported in _DUAL_VALUES.items():
        if key in stated and values[key] != supported:
            remedy = (
                "leave it out"
                if supported is None
                else f"leave it out or set {str(supported).lower()}"
            )
            yield f"{key} = {str(values[key]).lower()} is not for InternVL-14B: {remedy}"


def config_label(name: str, folder: Path) -> str:
    """Returns how messages name the config.json of `name`, a folder or hub id."""
    # A hub id is what the user knows; the path in the hub's cache says nothing.
    is_local = Path(name).expanduser().exists()
    return str(folder / "config.json") if is_local else f"config.json of {name}"
