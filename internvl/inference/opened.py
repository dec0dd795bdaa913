"""Opens a model folder once: files, adapters, run and tokenizer, before any weight is read.

`open_model` follows adapter and run folders down to the base model. Its result is passed on, so
that no caller opens the same folder again.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from internvl import zoo
from internvl.config import ModelConfig, Recipe, TilesConfig
from internvl.config.recipes import load_recipe
from internvl.data.templates import template
from internvl.data.tokenizers import add_special_tokens, load_tokenizer
from internvl.errors import ModelFolderError
from internvl.models import hub
from internvl.models.adapters import folder as adapter_folder
from internvl.models.chat import assemble
from internvl.models.dual import files as dual_files


@dataclass(frozen=True)
class OpenedModel:
    """An opened model, adapter or run folder with its base models."""

    name: str
    """The folder or hub id that was asked for."""
    files: hub.ModelFolder
    """Files of the base model at the bottom."""
    adapter: Path | None = None
    """Folder of adapters on top, next to the model's own weights or alone."""
    base: "OpenedModel | None" = None
    """The model a run started from or an adapter folder belongs to; None for a model folder."""
    run: Path | None = None
    """The run folder, if it is one."""
    recipe: Recipe | None = None
    """Recipe of the run, as its folder holds it."""
    parts: ModelConfig | None = None
    """Parts of a model that is assembled from a vision tower and a language model."""
    parts_tokenizer: PreTrainedTokenizerFast | None = None
    """Tokenizer of such a model: the language model's with the tokens of a chat model."""

    @property
    def folder(self) -> Path:
        """Folder of the base model's weights."""
        return self.files.folder

    # Cached: the configuration, the vocabulary check and the encoder all ask for it.
    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The model's tokenizer; None if the folder has no tokenizer files."""
        # No folder holds it: the language model's own files lack the tokens of a chat model.
        if self.parts_tokenizer is not None:
            return self.parts_tokenizer
        return load_tokenizer(self.folder) if self.base is None else self.base.tokenizer


def open_model(name_or_folder: str | Path, *, above: tuple[Path, ...] = ()) -> OpenedModel:
    """Opens a model, adapter or run folder, a hub id, or InternVL-C's `.pth` (or its folder).

    Adapters next to a model's weights belong to that model, as in transformers, whatever base they
    name. The base of an adapter folder may have adapters of its own, or be a run.

    Args:
        above: the adapter and run folders that led here.

    Raises:
        ModelFolderError: no such folder, file or id.
    """
    name, pth = str(name_or_folder), Path(name_or_folder)
    if pth.suffix != ".pth":
        folder = hub.find_folder(name_or_folder)
        # InternVL-C was released as one .pth file without a config.json.
        weights = [] if (folder / "config.json").is_file() else list(folder.glob("*.pth"))
        pth = weights[0] if len(weights) == 1 else folder
    if pth.suffix == ".pth":
        released = zoo.official_config(zoo.find("InternVL-14B-224px"))
        return OpenedModel(name, dual_files.open_pth(pth, released))
    # A cycle of base folders would recurse without end.
    if folder.resolve() in above:
        raise ModelFolderError(
            f"{above[-1] / adapter_folder.CONFIG_FILE}: base_model_name_or_path leads back to "
            f"{folder}; set it to the model the adapters were trained on"
        )
    visited = (*above, folder.resolve())
    if is_run(folder):
        recipe = load_recipe(folder / "recipe.yaml")
        start = open_start(recipe, above=visited)
        return OpenedModel(name, start.files, base=start, run=folder, recipe=recipe)
    if adapter_folder.is_adapter(folder):
        base = open_model(adapter_folder.base_of(folder), above=visited)
        return OpenedModel(name, base.files, adapter=folder, base=base)
    if not (folder / "config.json").is_file():
        adapter_folder.check_complete(folder)
    adapter = folder if adapter_folder.is_beside_model(folder) else None
    return OpenedModel(name, hub.open_folder(folder), adapter)


def open_start(recipe: Recipe, *, above: tuple[Path, ...] = ()) -> OpenedModel:
    """Opens the model that a recipe starts from, by its id or from parts.

    Raises:
        ModelFolderError: as `open_model`; names the part that is missing.
        UserError: unknown conversation template.
    """
    if recipe.model.id is not None:
        return open_model(recipe.model.id, above=above)
    return open_parts(recipe.model, recipe.seed)


def open_parts(model: ModelConfig, seed: int, tiles: TilesConfig | None = None) -> OpenedModel:
    """Opens the parts of a chat model as one model; no weight is read.

    Args:
        seed: seed of a fresh projector and of new token embeddings.
        tiles: tiling and tile size; by default one tile of the tower's own size.

    Raises:
        ModelFolderError: a part is missing; it is named.
        UserError: unknown conversation template.
    """
    # First: an unknown template costs no download of a part.
    settings = parts_settings(model, tiles)
    folders = assemble.Parts(
        _part_folder("vision", model.vision),
        _part_folder("language", model.language),
        model.projector,
    )
    tokenizer = load_tokenizer(folders.language)
    if tokenizer is None:
        raise ModelFolderError(
            f"{folders.language}: has no tokenizer files; copy those of the release there"
        )
    # Before the files: the tokenizer decides how many rows the embeddings get.
    num_new = add_special_tokens(tokenizer)
    files = assemble.assemble(folders, settings, rows=len(tokenizer), num_new=num_new, seed=seed)
    return OpenedModel(model.name, files, parts=model, parts_tokenizer=tokenizer)


def parts_settings(model: ModelConfig, tiles: TilesConfig | None = None) -> dict[str, Any]:
    """Returns the official keys of a model from parts besides its sections.

    Raises:
        UserError: unknown conversation template.
    """
    return {
        "template": template(str(model.template)).name,
        "ps_version": model.ps_version or "v2",
        "select_layer": -1 if model.select_layer is None else model.select_layer,
        "dynamic_image_size": tiles is not None and tiles.max > 1,
        "use_thumbnail": tiles is not None and tiles.thumbnail,
        "min_dynamic_patch": 1 if tiles is None else tiles.min,
        "max_dynamic_patch": 1 if tiles is None else tiles.max,
        "force_image_size": None if tiles is None else tiles.size,
    }


def _part_folder(key: str, name: str | None) -> Path:
    try:
        return hub.find_folder(str(name))
    except ModelFolderError as error:
        # The caller gave two folders: the message must say which of them it is about.
        raise ModelFolderError(f"model.{key}: {error}") from None


def is_run(folder: Path) -> bool:
    """True if `train` wrote the folder."""
    return (folder / "recipe.yaml").is_file()
