"""What a recipe leaves open, taken from its checkpoint: tile size and counts, thumbnail, padding,
normalization, EXIF orientation, template, system message. Key by key; what the recipe says holds.

    of_config   what a model folder says, from its config.json alone
    complete    a recipe with nothing left open, and where each value is from
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import InternVLConfig

from internvl.config import DataConfig, Recipe, TilesConfig
from internvl.data.templates import TEMPLATES
from internvl.errors import UserError
from internvl.models import configs
from internvl.models.chat import model as chat_model
from internvl.models.chat import processor
from internvl.models.dual.configs import DualConfig
from internvl.models.hub import ModelFolder

_TEXTS = ("template", "system_message")
_SETTINGS = ("normalize", "exif", *_TEXTS)
"""Fields of `DataConfig` that a checkpoint has a say in, besides tiles."""
_NAMES = {
    "min": "min_dynamic_patch",
    "max": "max_dynamic_patch",
    "thumbnail": "use_thumbnail",
    "pad_square": "pad2square",
}
"""Fields of `TilesConfig` and the official keys of config.json."""
_OF_14B: dict[str, Any] = {
    "data.tiles.min": 1,
    "data.tiles.max": 1,
    "data.tiles.pad_square": False,
    "data.normalize": "imagenet",
    "data.exif": "ignore",
    "data.template": None,
    "data.system_message": None,
}
"""What InternVL-14B honours of these keys, and nothing else."""
_SHOWN = 32  # characters of a value in a table


@dataclass(frozen=True)
class Checkpoint:
    """How a checkpoint takes images and conversations."""

    dual: bool
    """Whether it is InternVL-14B, which takes an image as one square tile and no conversations."""
    values: dict[str, Any]
    """Dotted recipe key -> value."""
    sources: dict[str, str]
    """Dotted recipe key -> where its value is from, for the reader."""
    multiple: int
    """A tile's side is a multiple of it, in pixels."""
    size: int
    """Side of the tiles that its position embeddings are for, in pixels."""


@dataclass(frozen=True)
class Setting:
    """One value that holds in a run."""

    key: str
    value: Any
    source: str
    """Where it is from, for the reader."""


@dataclass(frozen=True)
class Completed:
    """A recipe with nothing left open."""

    recipe: Recipe
    settings: tuple[Setting, ...]
    """Those that a checkpoint has a say in."""
    resized_from: int | None
    """Side in pixels that the position embeddings are resized from, or None."""

    def render(self) -> str:
        """A line for each value and where it is from."""
        rows = [(setting.key, _shown(setting.value), setting.source) for setting in self.settings]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"  {key:{wide[0]}}  {value:{wide[1]}}  {source}" for key, value, source in rows]
        if self.resized_from is not None:
            lines.append(
                f"  position embeddings are resized from {self.resized_from} to "
                f"{self.recipe.data.tiling.size} px"
            )
        return "\n".join(["images and conversations", *lines])


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value).lower()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 2]} …"


def of_chat_files(source: ModelFolder, name: str) -> Checkpoint:
    """What config.json of a chat model says; no weight and no tokenizer is read.

    Args:
        name: what messages call the file, "config.json of owner/model".

    Raises:
        ModelFolderError: config.json is of no InternVL.
    """
    # Which id is the placeholder's does not matter here, so that no tokenizer is needed.
    config = chat_model.read_config(source, image_token_id=0)
    if source.layout == "official":
        return of_config(config, name, source.config)
    if source.config.get("internvl") is not None:
        return of_config(config, name, source.config["internvl"])
    images = processor.read_images(source.folder)
    return _of_processor(of_config(config, name, {}), images, name)


def _of_processor(start: Checkpoint, images: processor.ImageSettings, name: str) -> Checkpoint:
    """The checkpoint, whose images' settings are from its processor's file."""
    keys = {f"data.tiles.{key}": official for key, official in _NAMES.items()}
    keys |= {"data.normalize": "normalize", "data.tiles.size": "force_image_size"}
    file = images.file.join(name.rsplit("config.json", 1))
    stated = {key: file for key, official in keys.items() if official in images.values}
    return replace(start, sources=start.sources | stated)


def of_config(config: Any, name: str, said: dict[str, Any] | None = None) -> Checkpoint:
    """What a configuration says of images and conversations.

    Args:
        config: InternVLConfig or DualConfig.
        said: the official keys that the file holds; defaults are named as such. None: all.
    """
    return _OF_CONFIGS[config.model_type](config, name, said)


def _of_dual_config(config: Any, name: str, said: dict[str, Any] | None) -> Checkpoint:
    size, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    values = _OF_14B | {"data.tiles.size": size, "data.tiles.thumbnail": False}
    sources = dict.fromkeys(values, "InternVL-14B") | {"data.tiles.size": name}
    return Checkpoint(True, values, sources, patch, size)


def _of_chat_config(config: Any, name: str, said: dict[str, Any] | None) -> Checkpoint:
    size, patch = config.vision_config.image_size[0], config.vision_config.patch_size[0]
    settings = configs.chat_settings(config)
    tiles = vars(tiling(settings, size))
    values = {f"data.tiles.{key}": value for key, value in tiles.items()}
    values |= {f"data.{key}": settings[key] for key in _SETTINGS}
    sources = dict.fromkeys(values, name)
    for key, official in _NAMES.items():
        decisive = official
        if key in ("min", "max", "thumbnail") and not settings["dynamic_image_size"]:
            decisive = "dynamic_image_size"
        sources[f"data.tiles.{key}"] = _named(name, decisive, said)
    for key in _SETTINGS:
        sources[f"data.{key}"] = _named(name, key, said)
    if values["data.system_message"] is None and settings["template"] in TEMPLATES:
        values["data.system_message"] = TEMPLATES[settings["template"]].system_message
        sources["data.system_message"] = f"template {settings['template']}"
    return Checkpoint(False, values, sources, round(patch / config.downsample_ratio), size)


_OF_CONFIGS = {
    InternVLConfig.model_type: _of_chat_config,
    DualConfig.model_type: _of_dual_config,
}
"""model_type -> `of_config` of that family."""


def _named(name: str, key: str, said: dict[str, Any] | None) -> str:
    """`name`, and that the file leaves the key out where it does."""
    return name if said is None or said.get(key) is not None else f"{name}, by default ({key})"


def tiling(settings: dict[str, Any], size: int) -> TilesConfig:
    """The checkpoint's own way to cut an image into tiles of `size` px."""
    if not settings["dynamic_image_size"]:
        pad = settings["pad2square"]
        return TilesConfig(size=size, min=1, max=1, thumbnail=False, pad_square=pad)
    return TilesConfig(
        size=size,
        min=settings["min_dynamic_patch"],
        max=settings["max_dynamic_patch"],
        thumbnail=settings["use_thumbnail"],
    )


def of_run(saved: Recipe, file: Path) -> Checkpoint:
    """What the complete recipe in a run folder holds, for a run that goes on there: a checkpoint
    that changed meanwhile does not change the run."""
    values = {
        f"data.tiles.{f.name}": getattr(saved.data.tiles, f.name) for f in fields(TilesConfig)
    }
    values |= {f"data.{key}": getattr(saved.data, key) for key in _SETTINGS}
    dual, sources = saved.objective.family == "dual", dict.fromkeys(values, str(file))
    return Checkpoint(dual, values, sources, 1, saved.data.tiling.size)


def complete(recipe: Recipe, checkpoint: Checkpoint) -> Completed:
    """The recipe with every open value filled in.

    Raises:
        UserError: what the recipe says of tiles does not fit the checkpoint; all in one sentence.
    """
    stated = {key for key in checkpoint.values if _value(recipe.data, key) is not None}
    values, sources = dict(checkpoint.values), dict(checkpoint.sources)
    for key in stated:
        values[key], sources[key] = _value(recipe.data, key), "recipe"
    # A template of the recipe's brings its own system message, unless the checkpoint has one.
    chosen = values["data.template"]
    of_template = checkpoint.sources["data.system_message"].startswith("template ")
    if "data.system_message" not in stated and of_template and chosen in TEMPLATES:
        values["data.system_message"] = TEMPLATES[chosen].system_message
        sources["data.system_message"] = f"template {chosen}"
    problems = list(_problems(values, stated, checkpoint))
    if problems:
        raise UserError(f"{recipe.model.name}: {'; '.join(problems)}")
    inner = {key.rpartition(".")[2]: value for key, value in values.items() if ".tiles." in key}
    outer = {key: values[f"data.{key}"] for key in _SETTINGS}
    data = replace(recipe.data, tiles=TilesConfig(**inner), **outer)
    shown = ["data.tiles.size"] if checkpoint.dual else list(values)
    size = values["data.tiles.size"]
    return Completed(
        replace(recipe, data=data),
        tuple(Setting(key, values[key], sources[key]) for key in shown),
        None if size == checkpoint.size else checkpoint.size,
    )


def is_complete(recipe: Recipe) -> bool:
    """Whether nothing is left open."""
    data = recipe.data
    texts = recipe.objective.family == "dual" or None not in (data.template, data.system_message)
    images = isinstance(data.tiles, TilesConfig) and None not in (data.normalize, data.exif)
    return images and texts


def _value(data: DataConfig, key: str) -> Any:
    """The value of a dotted key below `data`."""
    value: Any = data
    for name in key.split(".")[1:]:
        value = getattr(value, name)
    return value


def _problems(
    values: dict[str, Any], stated: Sequence[str] | set[str], checkpoint: Checkpoint
) -> Iterator[str]:
    """What does not go together; values that nobody stated are never a problem of their own."""
    size = values["data.tiles.size"]
    if size % checkpoint.multiple:
        yield (
            f"data.tiles.size = {size} does not fit this model: a tile's side must be a multiple "
            f"of {checkpoint.multiple} pixels"
        )
    if checkpoint.dual:
        yield from _unused(values, stated)
        return

    def said(key: str) -> str:
        whose = "" if f"data.tiles.{key}" in stated else " of the checkpoint"
        return f"data.tiles.{key} = {str(values[f'data.tiles.{key}']).lower()}{whose}"

    if values["data.tiles.min"] > values["data.tiles.max"]:
        yield f"{said('min')} is larger than {said('max')}; set both"
    if values["data.tiles.pad_square"] and values["data.tiles.max"] > 1:
        yield f"{said('pad_square')} goes only with data.tiles.max: 1, not {said('max')}"


def _unused(values: dict[str, Any], stated: Sequence[str] | set[str]) -> Iterator[str]:
    """What InternVL-14B would not honour: an image is one square tile, stretched, of ImageNet's
    mean and deviation, and there are no conversations."""
    for key, only in _OF_14B.items():
        if key in stated and values[key] != only:
            remedy = "leave it out" if only is None else f"leave it out or set {str(only).lower()}"
            yield f"{key} = {str(values[key]).lower()} is not for InternVL-14B: {remedy}"


def named(name: str, folder: Path) -> str:
    """What messages call the config.json of `name`, a folder or a hub id."""
    here = Path(name).expanduser().exists()
    return str(folder / "config.json") if here else f"config.json of {name}"
