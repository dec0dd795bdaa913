"""A model that is opened once: its files, adapters, run and tokenizer, before any weight is read.

`open_model` follows adapter and run folders down to the model below them. What it returns is passed
on, so that no room opens the same folder again.
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
    """A model, adapter or run folder with everything below it."""

    name: str
    """As it was asked for: a folder or a hub id."""
    files: hub.ModelFolder
    """Of the model at the bottom."""
    adapter: Path | None = None
    """Folder of adapters on top, beside the model's own weights or alone."""
    base: "OpenedModel | None" = None
    """What a run started from, or what an adapter folder sits on; None of a model folder."""
    run: Path | None = None
    """The run folder, where it is one."""
    recipe: Recipe | None = None
    """Of the run, as it lies there."""
    parts: ModelConfig | None = None
    """What a model from parts is made of."""
    parts_tokenizer: PreTrainedTokenizerFast | None = None
    """Of a model from parts: the language model's with the tokens of a chat model."""

    @property
    def folder(self) -> Path:
        """Where the weights at the bottom lie."""
        return self.files.folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The model's tokenizer; None where the folder has no tokenizer files."""
        # No folder holds it: the language model's own files lack the tokens of a chat model.
        if self.parts_tokenizer is not None:
            return self.parts_tokenizer
        return load_tokenizer(self.folder) if self.base is None else self.base.tokenizer


def open_model(name_or_folder: str | Path, *, above: tuple[Path, ...] = ()) -> OpenedModel:
    """Opens a model, adapter or run folder, a hub id, or InternVL-C's `.pth` (or its folder).

    Adapters beside a model's weights are that model's, as in transformers, whatever base they name.
    The base of an adapter folder may have adapters of its own, or be a run.

    Args:
        above: the adapter and run folders that led here.

    Raises:
        ModelFolderError: no such folder, file or id.
    """
    name, pth = str(name_or_folder), Path(name_or_folder)
    if pth.suffix != ".pth":
        folder = hub.find_folder(name_or_folder)
        alone = [] if (folder / "config.json").is_file() else list(folder.glob("*.pth"))
        pth = alone[0] if len(alone) == 1 else folder
    if pth.suffix == ".pth":
        released = zoo.official_config(zoo.find("InternVL-14B-224px"))
        return OpenedModel(name, dual_files.open_pth(pth, released))
    # A chain that bites its own tail would recurse without end.
    if folder.resolve() in above:
        raise ModelFolderError(
            f"{above[-1] / adapter_folder.CONFIG_FILE}: base_model_name_or_path leads back to "
            f"{folder}; set it to the model the adapters were trained on"
        )
    beneath = (*above, folder.resolve())
    if is_run(folder):
        recipe = load_recipe(folder / "recipe.yaml")
        start = open_start(recipe, above=beneath)
        return OpenedModel(name, start.files, base=start, run=folder, recipe=recipe)
    if adapter_folder.is_adapter(folder):
        base = open_model(adapter_folder.base_of(folder), above=beneath)
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
    """Opens the parts of a chat model as one; no weight is read.

    Args:
        seed: of a fresh projector and of new token embeddings.
        tiles: tiling and tile size; by default one tile of the tower's own size.

    Raises:
        ModelFolderError: a part is missing, names it.
        UserError: unknown conversation template.
    """
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
    # Before the files: how many rows the embeddings get is the tokenizer's to say.
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
        # Two folders go in: the sentence must say which of them it is about.
        raise ModelFolderError(f"model.{key}: {error}") from None


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `train` wrote."""
    return (folder / "recipe.yaml").is_file()
