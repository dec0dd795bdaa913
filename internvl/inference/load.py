"""Loads the model of a folder, hub id or recipe, with its tokenizer, template and tiling.

PEFT, distributed checkpoints and what only training computes with take a second to import, so each
is imported where a model needs it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from internvl.config import ModelConfig, Recipe, TilesConfig
from internvl.config.recipes import load_recipe
from internvl.errors import ConfigError, ModelFolderError, UserError
from internvl.inference import families, inherited
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.families import FAMILIES, Description, LoadOptions
from internvl.inference.inherited import Completed, tiling
from internvl.inference.opened import OpenedModel, is_run, open_model, open_parts, open_start
from internvl.models import hub, kernels, keys, weights
from internvl.models.adapters.folder import SETTINGS_FILE
from internvl.models.bases import Replacements
from internvl.models.tensors import LazyTensor, in_memory
from internvl.models.trainable import has_adapters, select_trainable
from internvl.models.vision import set_drop_path
from internvl.training import saved_steps

__all__ = ["Chat", "Dual", "complete", "describe", "for_training", "is_run", "load", "tiling"]

FLOAT8 = "float8"
"""The value of `quantize` for products of rounded factors."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    name_or_folder: str | Path | OpenedModel,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    image_token_id: int | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    drop_path: float = 0.0,
    attention: str = "sdpa",
    image_size: int | None = None,
    step: int | None = None,
    base: Replacements = None,
) -> Chat | Dual:
    """Loads a model for inference.

    Args:
        name_or_folder: a model folder in the official or hf layout, a hub id, an adapter folder
            (loaded on its base), a run folder, one of its checkpoints (RUN/checkpoints/000400,
            RUN/best), or InternVL-C's `.pth` file or folder; or one that `open_model` has opened.
        device: by default the GPU, if there is one.
        dtype: by default bfloat16 on a GPU, float32 on a CPU.
        image_token_id: id of the placeholder token, for a folder without tokenizer files.
        device_map: "auto" spreads the model over all GPUs.
        quantize: "8bit" or "4bit" by bitsandbytes, on a GPU, to save memory; "float8" to save time
            over many requests, on a GPU that has such products.
        drop_path: stochastic depth rate of the vision tower, in training.
        attention: attention implementation of `transformers`.
        image_size: another tile side, px; the position embeddings are resized to it.
        step: step of a run's checkpoint; by default the newest.
        base: the model in place of a base that a moved run or adapter folder misses; several for a
            chain that misses several, nearest first.

    Returns:
        A `Chat`, or a `Dual` if the folder holds InternVL-14B.

    Raises:
        ModelFolderError: one sentence on the problem with the folder, and the remedy.
        UserError: an option that what is loaded cannot take.
    """
    target = resolve_device(device)
    options = LoadOptions(
        device=target,
        dtype=resolve_dtype(dtype, target),
        image_token_id=image_token_id,
        device_map=device_map,
        quantize=None if quantize == FLOAT8 else quantize,
        drop_path=drop_path,
        attention=attention,
        image_size=image_size,
    )
    if not isinstance(name_or_folder, OpenedModel):
        name_or_folder = open_model(name_or_folder, step=step, base=base)
    handle = load_opened(name_or_folder, options)
    return _in_float8(handle) if quantize == FLOAT8 else handle


def _in_float8(handle: Chat | Dual) -> Chat:
    """Makes the linear layers of a loaded model's blocks compute in float8; nothing of it trains.

    Raises:
        UserError: InternVL-14B, weights in another dtype, or a GPU without float8 products.
    """
    if not isinstance(handle, Chat):
        raise UserError(f"quantize={FLOAT8!r}: InternVL-14B is used in bfloat16 or float32")
    if handle.model.dtype != torch.bfloat16:
        raise UserError(
            f"quantize={FLOAT8!r} computes in bfloat16 around the products, and the model is in "
            f"{str(handle.model.dtype).removeprefix('torch.')}: load it with dtype='bfloat16'"
        )
    handle.model.requires_grad_(False)
    device = handle.model.device
    kernels.convert_frozen_linears(handle.model, device, key=f"quantize={FLOAT8!r}")
    kernels.fuse_frozen_mlps(handle.model)
    return handle


def load_opened(opened: OpenedModel, options: LoadOptions) -> Chat | Dual:
    """Loads an opened folder, with its adapters or its run's checkpoint."""
    if opened.recipe is not None:
        return _load_run(opened, options)
    settings = _adapter_settings(opened)
    if options.image_size is None:
        # Down to the base: a table that is resized twice has lost detail.
        options = replace(options, image_size=settings.get("force_image_size"))
    if opened.base is None:
        handle = FAMILIES[opened.files.family].load(opened, options)
    else:
        handle = load_opened(opened.base, options)
    if opened.adapter is None:
        return handle
    from internvl.models.adapters import lora

    # Adapters of a base were merged into the weights that the new ones were trained on.
    if has_adapters(handle.model):
        lora.merge(handle.model)
    lora.load_adapter(handle.model, opened.adapter)
    file = opened.adapter / SETTINGS_FILE
    return FAMILIES[handle.family].stored(handle, settings, file) if settings else handle


def _adapter_settings(opened: OpenedModel) -> dict[str, Any]:
    """Reads the settings that an opened folder's adapters were trained with, else empty.

    Raises:
        ModelFolderError: a value of the wrong type, or tiles that the model cannot take.
    """
    if opened.adapter is None:
        return {}
    from internvl.models.adapters.settings import settings_of

    settings, files = settings_of(opened.adapter), opened.files
    side = settings.get("force_image_size")
    # Here: past this file, a side that does not fit would be reported as a recipe's.
    if side is not None:
        multiple = FAMILIES[files.family].checkpoint_settings(files, "config.json").multiple
        if side % multiple:
            raise ModelFolderError(
                f"{opened.adapter / SETTINGS_FILE}: force_image_size = {side} does "
                f"not fit this model: a tile's side must be a multiple of {multiple} pixels; copy "
                "the adapter folder again"
            )
    return settings


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Returns the device; None is the GPU if there is one, else the CPU.

    Raises:
        ConfigError: torch knows no such device, or this machine has no such GPU.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"device {device!r} is none that torch knows; write cuda, cuda:1 or cpu"
        ) from None
    if target.type == "cuda" and (target.index or 0) >= (present := torch.cuda.device_count()):
        raise ConfigError(f"device {target}: this machine has {present} GPUs that torch can use")
    if target.type not in ("cuda", "cpu"):
        try:
            torch.zeros(1, device=target).item()
        # What back ends raise that are not built in; "meta" has no values.
        except (RuntimeError, AssertionError, ImportError):
            raise ConfigError(
                f"device {target}: torch cannot compute there on this machine; write cuda or cpu"
            ) from None
    return target


def _load_run(opened: OpenedModel, options: LoadOptions) -> Chat | Dual:
    """Loads the model of a run with the weights of its checkpoint, in the dtype of the options.

    Raises:
        ModelFolderError: the run has no checkpoint yet.
        UserError: an option that only a model folder takes.
    """
    refused = {"quantize": options.quantize, "device_map": options.device_map}
    for key, value in refused.items():
        # A checkpoint holds only what was trained, in full and for one device.
        if value is not None:
            raise UserError(
                f"{key} = {value!r} is for model folders, and {opened.name} is a run; "
                f"`internvl export {opened.name} --to FOLDER`, and use FOLDER"
            )
    handle = _load_checkpoint(opened)
    model, side = handle.model, options.image_size
    # Only now: the checkpoint holds the embeddings of the run's own tiles.
    if side not in (None, model.config.vision_config.image_size[0]):
        handle = FAMILIES[handle.family].resized(handle, side)
    # The run's own rate is of its training, and must not go on in that of the next run.
    if opened.recipe is not None and options.drop_path != opened.recipe.model.drop_path:
        set_drop_path(model, options.drop_path)
    return replace(handle, model=model.to(options.device, options.dtype).eval())


def _load_checkpoint(opened: OpenedModel) -> Chat | Dual:
    """Loads a run's model as `for_training`, with the weights of its checkpoint."""
    from internvl.training import checkpoint

    recipe, run = opened.recipe, opened.run
    assert recipe is not None
    assert run is not None
    # Adapters of a quantized base are used on the released base: merging needs its full weights.
    recipe = replace(recipe, model=replace(recipe.model, quantize=None))
    # First: a run without a checkpoint costs no loading of its base.
    folder, step = run.checkpoint
    handle = for_training(recipe, opened.base)
    checkpoint.load_weights(folder, step, handle.model)
    return handle


def load_as_trained(opened: OpenedModel, device: torch.device, dtype: str) -> Chat | Dual:
    """Loads the model of a run as its own evaluations use it, within `compilation.evaluating`.

    Trained weights are float32, frozen ones `dtype`; the attention backend is the recipe's. Base
    weights under adapters are neither quantized nor in float8.

    Raises:
        ModelFolderError: the run has no checkpoint yet.
    """
    from internvl.compute import backends, kernels, placement

    assert opened.recipe is not None
    handle = _load_checkpoint(opened)
    # The order of a training start: apply_compute replaces modules on the device they run on.
    placement.to_device(handle.model, device, dtype)
    compute = replace(opened.recipe.compute, float8=False)
    kernels.apply_compute(handle.model, device, backends.available_compute(compute, device))
    return replace(handle, model=handle.model.eval())


def for_training(
    recipe: Recipe,
    start: OpenedModel | None = None,
    shard: Callable[[Any], Any] | None = None,
    device: torch.device | None = None,
    shards_on: torch.device | None = None,
) -> Chat | Dual:
    """Loads the model of a recipe for training: selects what trains and attaches adapters.

    It is on the CPU in float32, or quantized on its training device. Template, system message and
    tiles of the recipe are written to its configuration, so that an export carries them.

    With `shard`, each rank reads its own rows alone; the model is on `device`, its trained weights
    float32 and its frozen ones in the recipe's dtype. Every value is that of a load without.

    Args:
        start: `recipe.model` if it is already open.
        shard: shards the model, which is on the meta device then, in place.
        device: device of a sharded model; by default the CPU.
        shards_on: device of its sharded weights, if another.

    Raises:
        UserError: a model that does not train here or with this objective, a part it does not have,
            or bitsandbytes is missing for a quantized one.
    """
    start = open_start(recipe) if start is None else start
    if not inherited.is_complete(recipe):
        recipe = complete(recipe, start).recipe
    quantize = recipe.model.quantize
    # bitsandbytes quantizes where the weights arrive, so they must go to the GPU at once.
    device = resolve_device("cpu" if quantize is None or recipe.device == "cpu" else None)
    options = LoadOptions(
        device=device,
        dtype=torch.float32 if quantize is None else resolve_dtype(recipe.dtype, device),
        quantize=quantize,
        drop_path=recipe.model.drop_path,
        image_size=recipe.data.tiling.size,
    )
    # Again: a complete recipe has not been through `complete`, which checks before any weight.
    FAMILIES[start.files.family].check_objective(recipe)
    if shard is not None:
        device = device or torch.device("cpu")
        return _load_shards(recipe, start, options, shard, device, shards_on or device)
    handle = load_opened(start, options)
    _choose_trainable(handle.model, recipe.model)
    return FAMILIES[handle.family].with_settings(handle, recipe)


def _load_shards(
    recipe: Recipe,
    start: OpenedModel,
    options: LoadOptions,
    shard: Callable[[Any], Any],
    device: torch.device,
    shards_on: torch.device,
) -> Chat | Dual:
    from internvl.parallel import fill

    handle, tensors = without_values(start, options, as_drawn=recipe.model.lora is not None)
    model: Any = handle.model
    fill.without_data(model)
    state = torch.get_rng_state()
    # Adapters draw their weights here too, so that what is drawn afterwards stays the same.
    _choose_trainable(model, recipe.model)
    fill.set_dtypes(model, resolve_dtype(recipe.dtype, device))
    handle = FAMILIES[handle.family].with_settings(handle, recipe)
    shard(model)
    fill.allocate(model, device, shards_on)
    parameters = fill.names(model)
    adapters = {name for name in parameters if ".lora_" in name}
    fill.fill({n: p for n, p in parameters.items() if n not in adapters}, tensors)
    if adapters:
        from internvl.models.adapters import lora

        fill.fill_drawn(parameters, lora.drawn_again(model, state))
    return handle


def without_values(
    start: OpenedModel, options: LoadOptions, *, as_drawn: bool = False
) -> tuple[Chat | Dual, dict[str, LazyTensor]]:
    """Returns a model without weights, and its weights as tensors that are read when asked for.

    Adapters are merged, from weights in the dtype of the options. Every value is that of
    `load_opened` on a CPU, with adapters merged.

    Args:
        as_drawn: leave torch's generator as `load_opened` and merging leave it.
    """
    files = start.files
    family = FAMILIES[files.family]
    # Attaching and merging adapters draw, and so decide the weights of adapters that come next.
    draws = start.recipe is not None and start.recipe.model.lora is not None and as_drawn
    if start.recipe is not None and not draws:
        return _run_without_values(start, options, as_drawn)
    is_merged = start.base is not None or start.adapter is not None
    if not is_merged and not keys.has_adapters(files.tensors):
        handle = family.load(start, replace(options, values=False))
        return handle, family.fit_tensors(handle.model.config, files)
    # Whole in memory: adapters in a folder may be any that PEFT has, which merges whole layers.
    handle = load_opened(start, replace(options, values=True))
    if has_adapters(handle.model):
        from internvl.models.adapters import merging

        merging.merge(handle.model)
    state = handle.model.state_dict()
    return handle, {name: in_memory(tensor) for name, tensor in state.items()}


def _run_without_values(
    opened: OpenedModel, options: LoadOptions, as_drawn: bool
) -> tuple[Chat | Dual, dict[str, LazyTensor]]:
    from internvl.models.adapters import streamed
    from internvl.training import checkpoint

    recipe, run, start = opened.recipe, opened.run, opened.base
    assert recipe is not None
    assert run is not None
    assert start is not None
    folder, step = run.checkpoint
    if not inherited.is_complete(recipe):
        recipe = complete(recipe, start).recipe
    # In float32, as the run began; what it merges is rounded once, in the dtype asked for.
    at_start = replace(options, dtype=torch.float32, image_size=recipe.data.tiling.size)
    handle, base = without_values(start, at_start, as_drawn=as_drawn)
    family = FAMILIES[handle.family]
    handle = family.with_settings(handle, recipe)
    trained = checkpoint.read_weights(folder, step)
    tensors = streamed.merged(base, trained, recipe.model.lora, options.dtype)
    side = options.image_size
    if side not in (None, handle.model.config.vision_config.image_size[0]):
        handle = family.resized(handle, side)
        tensors = weights.check_shapes(opened.folder, handle.model.state_dict(), tensors)
    return handle, tensors


def complete(recipe: Recipe, start: OpenedModel | None = None) -> Completed:
    """Completes a recipe from the run folder if a run is resumed, else from its checkpoint.

    No weight is read.

    Args:
        start: `recipe.model` if it is already open.

    Raises:
        ModelFolderError: the checkpoint cannot be used.
        UserError: the objective or the tiles do not fit it; problems of tiles in one sentence.
    """
    # One that has not begun may get another recipe, which completes itself anew.
    if is_run(recipe.run) and saved_steps.has_begun(recipe.run):
        saved = load_recipe(recipe.run / "recipe.yaml")
        # Without opening the base model: a finished run needs it no more, and it may be gone.
        # A run of another model is refused later, where both recipes are compared in full.
        if saved.model.start == recipe.model.start:
            saved = _complete_saved(saved, start)
            checkpoint_settings = inherited.checkpoint_from_run(saved, recipe.run / "recipe.yaml")
            return replace(inherited.complete(recipe, checkpoint_settings), start=start)
    opened = open_start(recipe) if start is None else start
    FAMILIES[opened.files.family].check_objective(recipe)
    # Returned too, so that the model is loaded from what is open and not opened again.
    return replace(inherited.complete(recipe, _checkpoint_settings(opened)), start=opened)


def _checkpoint_settings(opened: OpenedModel) -> inherited.Checkpoint:
    """Returns the image and conversation settings of a model or run."""
    if opened.recipe is not None and opened.run is not None:
        saved = _complete_saved(opened.recipe, opened.base)
        return inherited.checkpoint_from_run(saved, opened.run.folder / "recipe.yaml")
    settings = _adapter_settings(opened)
    # Adapters on a run are used with its settings, not with those of the model at the bottom.
    if opened.base is not None and not settings:
        return _checkpoint_settings(opened.base)
    files = opened.files
    if opened.parts is not None:
        return families.parts_checkpoint_settings(opened.parts, files)
    label = inherited.config_label(opened.name, files.folder)
    if opened.adapter is not None and settings:
        label = str(opened.adapter / SETTINGS_FILE)
        if files.layout == "hf":
            settings = {"internvl": (files.config.get("internvl") or {}) | settings}
        files = replace(files, config=files.config | settings)
    return FAMILIES[files.family].checkpoint_settings(files, label)


def _complete_saved(saved: Recipe, start: OpenedModel | None) -> Recipe:
    """Completes the recipe of a run folder."""
    # Earlier versions wrote recipes with an open template.
    if inherited.is_complete(saved):
        return saved
    opened = open_start(saved) if start is None else start
    return inherited.complete(saved, _checkpoint_settings(opened)).recipe


def _choose_trainable(model: Any, config: ModelConfig) -> None:
    if has_adapters(model):
        if config.quantize is not None:
            raise UserError(
                f"model.quantize: {config.name} has adapters, which quantized weights cannot take "
                f"in; `internvl merge {config.name} --to FOLDER`, and set model.id to FOLDER"
            )
        from internvl.models.adapters import merging

        merging.merge(model)  # training continues from the model as it is used
    # Before adapters are attached: the selection freezes every parameter it does not name.
    select_trainable(model, config.parts, config.train_last_vision_blocks)
    if config.lora is not None:
        from internvl.models.adapters import lora

        lora.attach(model, config.lora)


def describe(folder: Path, image_token_id: int | None = None) -> Description:
    """Reads configuration, tokenizer, template and tiling of a chat folder, but no weight.

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
    """Builds a chat model from a standalone InternViT and a language model, by folder or hub id.

    The tokens of a chat model are added to the tokenizer and the embeddings. The keys of a recipe
    for the same are `model.vision`, `model.language` and those next to them.

    Args:
        template_name: conversation template.
        ps_version: pixel shuffle version, "v2", or "v1" as in Chat 1.2.
        select_layer: index of the vision block whose output is projected, -1 or -4.
        projector: `mlp_projector/*.pth` of a release; None initializes a new one.
        tiles: tiling and tile size; by default one tile of the tower's own size.
        seed: seed of a new projector and of new token embeddings.

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
    options = LoadOptions(device=target, dtype=resolve_dtype(dtype, target))
    chat = load_opened(opened, options)
    assert isinstance(chat, Chat)
    # The official keys lose some of it: they hold padding for a single tile only.
    return chat if tiles is None else replace(chat, tiles=tiles)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Returns the dtype; None is bfloat16 on a GPU, else float32. Raises UserError."""
    # float32 on a CPU: many have no fast bfloat16.
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
