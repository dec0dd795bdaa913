"""Will it fit, and how long will it take: `plan.make(recipe, gpu, step)`. Needs no GPU, no weights.

The model is built on the meta device from `config.json` (or the table of released models), frozen
and adapted as training does it, and counted:

    work      what a step holds, in numbers            load      the same for a recipe and its data
    flops     what it computes                         memory    bytes at its peak
    time      seconds                                  render    all of it as text

Each of them knows both families: rows of a chat model, pairs of InternVL-14B.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig

from internvl import zoo
from internvl.compute import placement
from internvl.config import ModelConfig, Recipe, recipes, released
from internvl.errors import UnknownModel, UserError
from internvl.inference import families, inherited
from internvl.inference import load as loading
from internvl.inference.families import FAMILIES
from internvl.inference.inherited import Completed
from internvl.inference.opened import OpenedModel, open_model, open_start, parts_settings
from internvl.models import hub, kernels
from internvl.models.chat import assemble
from internvl.models.dual.configs import DualConfig
from internvl.models.trainable import select_trainable
from internvl.models.vision import count_parameters
from internvl.plan import flops, memory, shards, time
from internvl.plan.load import load_of
from internvl.plan.render import MEMORY_ERROR, TIME_ERROR, Plan
from internvl.plan.work import FirstStep
from internvl.training import memory_ladder
from internvl.zoo.gpus import Gpu

__all__ = ["MEMORY_ERROR", "TIME_ERROR", "Plan", "complete", "is_here", "make", "model_of"]


_STAGES = ("none", "zero1", "zero2", "zero3")


def make(
    recipe: Recipe,
    gpu: Gpu,
    step: FirstStep | None = None,
    num_gpus: int = 1,
    shape: InternVLConfig | DualConfig | None = None,
) -> Plan:
    """Predicts memory and time of a run.

    Args:
        step: what `check` counted in the first step; None goes by stated assumptions.
        num_gpus: each with its share of every step's samples, and of the model as `parallel` says.
        shape: the model's configuration; by default that of `recipe.model`.

    Raises:
        UserError: the model is neither a folder nor a released one, or not for this objective or
            these tiles; float8 on a GPU that has none.
    """
    if recipe.compute.float8 and not gpu.float8:
        raise UserError(
            f"compute.float8: {gpu.name} has no float8 products; set compute.float8=false"
        )
    # Tile size and template decide how many tokens a sample has: they come first.
    completed = complete(recipe, shape)
    model = model_of(completed.recipe, shape, completed.start)
    plan = _predict(completed.recipe, model, gpu, step, num_gpus)
    plan = replace(plan, inherited=completed.render())
    return plan if plan.fits else replace(plan, remedy=_remedy(plan, model, step))


def complete(recipe: Recipe, shape: InternVLConfig | DualConfig | None = None) -> Completed:
    """Completes a recipe from its checkpoint, or from the table of released models without one.

    Raises:
        UserError: as `make`.
    """
    if shape is None and is_here(recipe):
        return loading.complete(recipe)
    if shape is not None:
        start = inherited.checkpoint_from_config(shape, "the model's configuration")
    else:
        name = "table of released models (config.json is not here)"
        files = _files(recipe)
        start = (
            FAMILIES[files.family].checkpoint_settings(files, name)
            if recipe.model.id is not None
            else families.parts_checkpoint_settings(recipe.model, files)
        )
    # As training does, so that a plan is refused in the same words.
    FAMILIES["dual" if start.dual else "chat"].check_objective(recipe)
    return inherited.complete(recipe, start)


def model_of(
    recipe: Recipe,
    shape: InternVLConfig | DualConfig | None = None,
    start: OpenedModel | None = None,
) -> Any:
    """Builds the recipe's model on the meta device: frozen, adapted and placed as for training."""
    config = _config(recipe, start) if shape is None else shape
    family = FAMILIES[families.name_of(config)]
    family.check_objective(recipe)
    family.check_config(config, recipe)
    model = family.empty_model(config)
    # The order of a training start: the selection freezes every parameter it does not name.
    select_trainable(model, recipe.model.parts, recipe.model.train_last_vision_blocks)
    if recipe.model.lora is not None:
        # Here: PEFT takes half a second, and only these plans need it.
        from internvl.models.adapters import lora

        with torch.device("meta"):
            lora.attach(model, recipe.model.lora)
    placement.to_device(model, torch.device("meta"), recipe.dtype)
    if recipe.compute.float8:
        kernels.convert_frozen_linears(model, torch.device("meta"))
    return model


def _config(recipe: Recipe, start: OpenedModel | None) -> InternVLConfig | DualConfig:
    """Reads the configuration of the model's folder, else of the released model of that name."""
    files = _files(recipe) if start is None else start.files
    # Which id is the placeholder's does not matter here, so that no tokenizer is needed.
    return FAMILIES[files.family].read_config(files, 0, recipe.data.tiles.size)


def _files(recipe: Recipe) -> hub.ModelFolder:
    """Opens the model's folder, else the table's entry of the released model of that name."""
    if recipe.model.id is None:
        return open_start(recipe).files if is_here(recipe) else _released_parts(recipe.model)
    folder = Path(recipe.model.id).expanduser()
    # A folder of a released model's name may hold a changed model.
    if folder.is_dir():
        return open_model(folder).files
    # A later stage is planned before the earlier one has run.
    earlier = released.of_run(folder)
    if earlier is not None:
        return _files(recipes.load_recipe(earlier))
    try:
        model = zoo.find(recipe.model.id)
    except UnknownModel as error:
        raise UserError(
            f"model.id: {recipe.model.id} is no folder, and {error}; a plan needs config.json"
        ) from None
    return hub.ModelFolder(folder, zoo.official_config(model))


def _released_parts(model: ModelConfig) -> hub.ModelFolder:
    """Reads the parts' config.json; for a part that is not here, the table's entry of its name."""
    tower, language = str(model.vision), str(model.language)
    config = assemble.official_config(
        _part_config("vision", tower, zoo.find_tower),
        _part_config("language", language, zoo.find_language_model),
        parts_settings(model),
    )
    return hub.ModelFolder(Path(language), config)


def _part_config(key: str, name: str, find: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    if _is_local(name):
        return hub.open_folder(name).config
    try:
        return find(name)
    except UnknownModel as error:
        raise UserError(
            f"model.{key}: {name} is no folder, and {error}; a plan needs a folder with config.json"
        ) from None


def is_here(recipe: Recipe) -> bool:
    """True if the model's files are on this machine, so that a check would download nothing."""
    model = recipe.model
    if model.id is not None:
        return _is_local(model.id)
    projector = model.projector is None or model.projector.is_file()
    return projector and _is_local(str(model.vision)) and _is_local(str(model.language))


def _is_local(name: str) -> bool:
    # In the cache of downloads: asking the hub itself would be a network call nobody asked for.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).expanduser().is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # a path that does not exist is no valid hub id
        return False


def _predict(recipe: Recipe, model: Any, gpu: Gpu, step: FirstStep | None, num_gpus: int) -> Plan:
    load = load_of(recipe, model, step, num_gpus)
    cut = shards.of(model, recipe, num_gpus)
    # On the meta device: counts without a byte of weights.
    trained, parameters = count_parameters(model)
    return Plan(
        recipe=recipe,
        gpu=gpu,
        num_gpus=num_gpus,
        load=load,
        memory=memory.predict(model, recipe, load, num_gpus, cut=cut),
        flops=flops.count(model, load.work),
        component_s=dict(time.seconds(recipe, model, load, gpu, num_gpus, cut)),
        messages=tuple(time.messages(model, load, gpu, num_gpus, cut)),
        trained=trained,
        parameters=parameters,
    )


def _remedy(plan: Plan, model: Any, step: FirstStep | None) -> str:
    """The first setting of the ladder that makes it fit, alone or with those before it."""

    # Nothing on the ladder changes the model: in 4 bits it has the same parameters. Times are
    # predicted for the answer alone, because they take as long as all the rest, and weights and
    # optimizer states are counted once for all settings that leave them alone: a walk over the
    # parameters of a model of 80 blocks is most of a prediction.
    counted: dict[Any, tuple[shards.Shards | None, dict[str, float]]] = {}

    def fits(recipe: Recipe) -> bool:
        setting = (recipe.model.quantize, recipe.optim, recipe.parallel)
        if setting not in counted:
            cut = shards.of(model, recipe, plan.num_gpus)
            counted[setting] = cut, memory.states(model, recipe, cut)
        cut, fixed = counted[setting]
        load = load_of(recipe, model, step, plan.num_gpus)
        needed = memory.predict(model, recipe, load, plan.num_gpus, dict(fixed), cut)
        return needed.total_gib <= plan.gpu.memory_gib

    def summary(recipe: Recipe) -> str:
        return _short(_predict(recipe, model, plan.gpu, step, plan.num_gpus))

    # First: it costs messages alone, where the others cost computation or change the training.
    later = _STAGES[_STAGES.index(plan.recipe.parallel.shard) + 1 :] if plan.num_gpus > 1 else ()
    for stage in later:
        recipe = _set(plan.recipe, "parallel.shard", stage)
        if not recipe.model.quantize and fits(recipe):
            return f"parallel.shard={stage} makes it fit: {summary(recipe)}"
    for rung in memory_ladder.LADDER:
        recipe = plan.recipe
        while (value := rung.value(recipe)) is not None:
            recipe = _set(recipe, rung.key, value)
            if fits(recipe):
                return f"{rung.key}={value} makes it fit: {summary(recipe)}"
    settings: dict[str, str] = {}
    recipe = plan.recipe
    while (following := memory_ladder.next_rung(recipe)) is not None:
        rung, value = following
        settings[rung.key] = value
        recipe = _set(recipe, rung.key, value)
        if fits(recipe):
            together = " ".join(f"{key}={value}" for key, value in settings.items())
            return f"{together} together make it fit: {summary(recipe)}"
    together = " ".join(f"{key}={value}" for key, value in settings.items())
    return (
        f"no setting makes it fit: with {together or 'these settings'} it takes {summary(recipe)}; "
        "choose LoRA, a smaller model or a larger GPU, or shard it over several (--gpus 8 "
        "parallel.shard=zero3)"
    )


def _set(recipe: Recipe, key: str, value: str) -> Recipe:
    return recipes.resolve(recipes.to_tree(recipe), [f"{key}={value}"])


def _short(plan: Plan) -> str:
    return f"{plan.memory.total_gib:.1f} GiB, {plan.samples_per_s:.3g} samples/s"
