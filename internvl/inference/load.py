"""What a user holds: `load` turns a folder or hub id into a model, tokenizer and template."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from internvl.compute import backends, kernels, placement
from internvl.config import ModelConfig, Recipe, TilesConfig
from internvl.config.recipes import load_recipe
from internvl.errors import ModelFolderError, UserError
from internvl.inference import families, inherited
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.families import FAMILIES, Description, LoadOptions
from internvl.inference.inherited import Completed, tiling
from internvl.inference.opened import OpenedModel, is_run, open_model, open_parts, open_start
from internvl.models import hub
from internvl.models.adapters import lora
from internvl.training import checkpoint

__all__ = ["Chat", "Dual", "complete", "describe", "for_training", "is_run", "load", "tiling"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    name_or_folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    image_token_id: int | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    drop_path: float = 0.0,
    attention: str = "sdpa",
    image_size: int | None = None,
) -> Chat | Dual:
    """The model of a folder or hub id, in either layout, of an adapter folder with its base, of a
    run folder at its newest checkpoint, or of InternVL-C's own `.pth` file (or its folder).

    Args:
        device: by default the GPU, if there is one.
        dtype: by default bfloat16 on a GPU, float32 on a CPU.
        image_token_id: id of the placeholder token, for a folder without tokenizer files.
        device_map: "auto" spreads the model over all GPUs.
        quantize: "8bit" or "4bit" through bitsandbytes, which is made for a GPU.
        drop_path: stochastic depth of the vision tower, in training.
        attention: `transformers`' attention implementation.
        image_size: another tile side in px; the position embeddings are resized to it.

    Returns:
        A `Chat`, or for InternVL-14B a `Dual`; which one, only the folder says.

    Raises:
        ModelFolderError: one sentence on what is wrong with the folder, and the remedy.
    """
    target = device_of(device)
    options = LoadOptions(
        device=target,
        dtype=_dtype(dtype, target),
        image_token_id=image_token_id,
        device_map=device_map,
        quantize=quantize,
        drop_path=drop_path,
        attention=attention,
        image_size=image_size,
    )
    return load_opened(open_model(name_or_folder), options)


def load_opened(opened: OpenedModel, options: LoadOptions) -> Chat | Dual:
    """The model of an opened folder; adapters and a run's newest checkpoint are in place."""
    if opened.recipe is not None:
        return _load_run(opened, options.device, options.dtype)
    if opened.base is None:
        handle = FAMILIES[opened.files.family].load(opened, options)
    else:
        handle = load_opened(opened.base, options)
    return handle if opened.adapter is None else _adapted(handle, opened.adapter)


def _adapted(base: Chat | Dual, folder: Path) -> Chat | Dual:
    """The model with the adapters of a folder; those it has already are merged first."""
    if lora.has_adapters(base.model):
        lora.merge(base.model)
    lora.load_adapter(base.model, folder)
    return base


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that is named; by default the GPU, if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _load_run(opened: OpenedModel, device: torch.device, dtype: torch.dtype) -> Chat | Dual:
    """The model a run started from, with the weights of its newest checkpoint in place.

    Raises:
        ModelFolderError: the run has no checkpoint yet.
    """
    handle = _restored(opened)
    return replace(handle, model=handle.model.to(device, dtype).eval())


def _restored(opened: OpenedModel) -> Chat | Dual:
    """As `for_training` makes it, with the weights of the run's newest checkpoint."""
    recipe, folder = opened.recipe, opened.run
    assert recipe is not None
    assert folder is not None
    # Adapters trained on a quantized base are used and merged on the base as it was released.
    recipe = replace(recipe, model=replace(recipe.model, quantize=None))
    saved = checkpoint.steps(folder / "checkpoints")
    if not saved:
        raise ModelFolderError(f"{folder}: the run has no checkpoint yet; train it first")
    handle = for_training(recipe, opened.base)
    checkpoint.load_weights(folder / "checkpoints", saved[-1], handle.model)
    return handle


def load_as_trained(folder: Path, device: torch.device, dtype: str) -> Chat | Dual:
    """The model of a run as its own evaluations have it: trained weights in float32, frozen ones in
    `dtype`, the recipe's attention; for use within `compilation.evaluating`.

    The weights under adapters are as released: neither quantized nor in float8.

    Raises:
        ModelFolderError: the run has no checkpoint yet.
    """
    opened = open_model(folder)
    assert opened.recipe is not None
    handle = _restored(opened)
    placement.to_device(handle.model, device, dtype)
    compute = replace(opened.recipe.compute, float8=False)
    kernels.apply_compute(handle.model, device, backends.available_compute(compute, device))
    return replace(handle, model=handle.model.eval())


def for_training(recipe: Recipe, start: OpenedModel | None = None) -> Chat | Dual:
    """The model of a recipe, with what trains chosen and adapters attached: on the CPU in float32,
    or quantized where it will train.

    What the recipe says of template, system message and tiles goes into the model's configuration,
    so that an export carries it.

    Args:
        start: `recipe.model`, where it is open already.

    Raises:
        UserError: a model that does not train here or with this objective, a part it does not have,
            or no bitsandbytes to quantize with.
    """
    start = open_start(recipe) if start is None else start
    if not inherited.is_complete(recipe):
        recipe = complete(recipe, start).recipe
    quantize = recipe.model.quantize
    device = device_of("cpu" if quantize is None or recipe.device == "cpu" else None)
    options = LoadOptions(
        device=device,
        dtype=torch.float32 if quantize is None else _dtype(recipe.dtype, device),
        quantize=quantize,
        drop_path=recipe.model.drop_path,
        image_size=recipe.data.tiling.size,
    )
    handle = load_opened(start, options)
    family = FAMILIES[handle.family]
    family.check_objective(recipe)
    _choose_trainable(handle.model, recipe.model)
    return family.with_settings(handle, recipe)


def complete(recipe: Recipe, start: OpenedModel | None = None) -> Completed:
    """The recipe with what it leaves open taken from its run folder, where a run goes on, else from
    its checkpoint; no weight is read.

    Args:
        start: `recipe.model`, where it is open already.

    Raises:
        ModelFolderError: the checkpoint cannot be used.
        UserError: the objective or the tiles do not fit it; of tiles all in one sentence.
    """
    if is_run(recipe.run):
        saved = load_recipe(recipe.run / "recipe.yaml")
        if saved.model.start == recipe.model.start:
            saved = _complete_saved(saved, start)
            return inherited.complete(recipe, inherited.of_run(saved, recipe.run / "recipe.yaml"))
    opened = open_start(recipe) if start is None else start
    FAMILIES[opened.files.family].check_objective(recipe)
    return inherited.complete(recipe, _checkpoint_of(opened))


def _checkpoint_of(opened: OpenedModel) -> inherited.Checkpoint:
    """What a model or run says of images and conversations."""
    if opened.recipe is not None and opened.run is not None:
        saved = _complete_saved(opened.recipe, opened.base)
        return inherited.of_run(saved, opened.run / "recipe.yaml")
    files = opened.files
    if opened.parts is not None:
        return families.inherited_of_parts(opened.parts, files)
    return FAMILIES[files.family].inherited(files, inherited.named(opened.name, files.folder))


def _complete_saved(saved: Recipe, start: OpenedModel | None) -> Recipe:
    """The recipe of a run folder, complete: earlier versions left the template open there."""
    if inherited.is_complete(saved):
        return saved
    opened = open_start(saved) if start is None else start
    return inherited.complete(saved, _checkpoint_of(opened)).recipe


def _choose_trainable(model: Any, config: ModelConfig) -> None:
    if lora.has_adapters(model):
        if config.quantize is not None:
            raise UserError(
                f"model.quantize: {config.name} has adapters, which quantized weights cannot take "
                f"in; `internvl merge {config.name} --to FOLDER`, and set model.id to FOLDER"
            )
        lora.merge(model)  # training goes on from what the model computes
    lora.select_trainable(model, config.parts, config.train_last_vision_blocks)
    if config.lora is not None:
        lora.attach(model, config.lora)


def describe(folder: Path, image_token_id: int | None = None) -> Description:
    """Configuration, tokenizer, template and tiling of a chat folder; no weight is read.

    Raises:
        ModelFolderError: not a chat model, or tokenizer files of another model.
    """
    return families.describe(OpenedModel(str(folder), hub.open_folder(folder)), image_token_id)


def build(
    vision: str | Path,
    language: str | Path,
    *,
    template_name: str,
    ps_version: Literal["v1", "v2"] = "v2",
    select_layer: int = -1,
    projector: Path | None = None,
    tiles: TilesConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    seed: int = 42,
) -> Chat:
    """A chat model from a standalone InternViT and a language model, by folder or hub id.

    The tokens of a chat model are added to the tokenizer and to the embeddings. A recipe says the
    same with `model.vision`, `model.language` and the keys beside them.

    Args:
        template_name: conversation template.
        ps_version: pixel shuffle, "v2" or, as Chat 1.2 has it, "v1".
        select_layer: which block's output of the tower is read, -1 or -4.
        projector: `mlp_projector/*.pth` of a release; None starts a fresh one.
        tiles: tiling and tile size; by default one tile of the tower's own size.
        seed: of a fresh projector and of new token embeddings.

    Raises:
        ModelFolderError: a part is missing or does not fit.
        UserError: unknown conversation template.
    """
    parts = ModelConfig(
        vision=str(vision),
        language=str(language),
        projector=projector,
        template=template_name,
        ps_version=ps_version,
        select_layer=select_layer,
    )
    target = torch.device(device)
    opened = open_parts(parts, seed, tiles)
    options = LoadOptions(device=target, dtype=_dtype(dtype, target))
    chat = load_opened(opened, options)
    assert isinstance(chat, Chat)
    # The official keys do not say all of it: padding is for one tile alone.
    return chat if tiles is None else replace(chat, tiles=tiles)


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
