"""A recipe becomes a run that is ready to compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from internvl import dist, evals
from internvl.compute import backends, compilation, feeding, kernels, placement
from internvl.config import Recipe
from internvl.data.sampler import Ending, GrownOrder, Order, SampleOrder, UnitRef
from internvl.data.sources import open_sources
from internvl.inference import inherited
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.inherited import Completed
from internvl.inference.opened import OpenedModel
from internvl.objectives import OBJECTIVES
from internvl.objectives.run_start import RunStart
from internvl.parallel import mesh, shard
from internvl.training import checkpoint, length, optim
from internvl.training.run.state import TrainState
from internvl.training.spikes import Guard

CPU = torch.device("cpu")


def build(
    recipe: Recipe,
    chat: Chat | Dual | None = None,
    order: Order | None = None,
    start: OpenedModel | None = None,
    endings: Sequence[Ending] = (),
) -> TrainState:
    """Builds everything a run needs: data, model on its device, objective and optimizer.

    Args:
        chat: a model to train as it is, adapters included, instead of loading `recipe.model`.
        order: order of the samples, instead of that of a new run.
        start: `recipe.model` if it is already open.
        endings: earlier ends of the run.
    """
    device = dist.init_from_env(recipe.device)
    if not inherited.is_complete(recipe):
        completed = _complete_recipe(recipe, chat, start)
        recipe, start = completed.recipe, completed.start
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    # Before the model is loaded: new adapters and heads draw their weights from this seed.
    torch.manual_seed(recipe.seed)
    # Now, not at the first evaluation: an error in its data must not cost the training until then.
    evaluators = evals.build(recipe.run_evals)
    grid = mesh.build(recipe.parallel, device)
    if chat is not None:
        # It goes to the GPU unit by unit if it is sharded.
        placement.to_device(chat.model, device if grid is None else CPU, recipe.dtype)
        prepare(chat.model, recipe, device, grid)
    else:
        chat = _load(recipe, start, device, grid)
    if order is None:
        order = SampleOrder(
            open_sources(recipe.data), share_prefix=recipe.shares_prefix, seed=recipe.seed
        )
    return assemble(
        recipe,
        chat,
        device,
        order,
        checkpoint.Saver(device),
        evaluators=evaluators,
        endings=endings,
    )


def assemble(
    recipe: Recipe,
    chat: Chat | Dual,
    device: torch.device,
    order: Order,
    saver: checkpoint.Saver,
    *,
    evaluators: dict[str, evals.Evaluator] | None = None,
    endings: Sequence[Ending] = (),
) -> TrainState:
    """Returns the state of a run whose model is on its device, ready to compute."""
    # Pairs have no rows, so none that compiled code would have to be padded for.
    packs = recipe.objective.rows_are_packed
    objective = OBJECTIVES[recipe.objective.name](recipe.objective, recipe.data, chat.encoder)
    # Last: modules may have been replaced, and the optimizer must hold what trains.
    optimizer = optim.build(chat.model, recipe.optim)
    num_steps, total = length.of_run(recipe, order, endings)
    return TrainState(
        recipe=recipe,
        device=device,
        chat=chat,
        objective=objective,
        optimizer=optimizer,
        order=order,
        reader=objective.reader(order.files, recipe.seed),
        num_steps=num_steps,
        total_samples=total,
        guard=Guard(recipe.guard),
        saver=saver,
        evaluators=evaluators or {},
        endings=tuple(endings),
        row_lengths=backends.row_lengths(recipe.compute, device, recipe.data) if packs else (),
    )


def _load(
    recipe: Recipe, start: OpenedModel | None, device: torch.device, grid: DeviceMesh | None
) -> Chat | Dual:
    """Loads the recipe's model as it trains: on its device, with its kernels, cut into shards."""
    if grid is None:
        chat = loading.for_training(recipe, start)
        placement.to_device(chat.model, device, recipe.dtype)
        prepare(chat.model, recipe, device, None)
        return chat
    # Cut before it is filled: no rank holds the whole model at any time.
    cut = partial(prepare, recipe=recipe, device=device, grid=grid)
    shards_on = CPU if recipe.parallel.offload == "cpu" else device
    return loading.for_training(recipe, start, cut, device, shards_on)


def _load_initial(recipe: Recipe, device: torch.device) -> Any:
    """Loads the weights that the run started from, frozen, as a second model."""
    # Nothing of it trains, so it needs no gradients, no adapters and no dropped paths.
    frozen = replace(recipe.model, train=(), lora=None, train_last_vision_blocks=0, drop_path=0.0)
    grid = mesh.build(recipe.parallel, device)
    return _load(replace(recipe, model=frozen), None, device, grid).model.eval()


def prepare(model: Any, recipe: Recipe, device: torch.device, grid: DeviceMesh | None) -> None:
    """Sets how a model computes and cuts it into shards; it may be on the meta device."""
    kernels.apply_compute(model, device, recipe.compute, sharded=grid is not None)
    if grid is not None:
        shard.shard(model, recipe.parallel, grid, placement.DTYPES[recipe.dtype])


def _complete_recipe(
    recipe: Recipe, chat: Chat | Dual | None, start: OpenedModel | None
) -> Completed:
    """Completes the recipe with unset values taken from `chat`, else from the checkpoint."""
    if chat is None:
        return loading.complete(recipe, start)
    checkpoint_settings = inherited.checkpoint_from_config(
        chat.model.config, "the model that is given"
    )
    return inherited.complete(recipe, checkpoint_settings)


def run_start(state: TrainState) -> RunStart:
    """Makes what the objective is told before the next step."""
    recipe, order = state.recipe, state.order

    def refs() -> Sequence[UnitRef]:
        # A step counted in rows shows no one knows how many; later epochs show the same samples.
        total = state.total_samples or len(order)
        return order.between(0, total if isinstance(order, GrownOrder) else min(total, len(order)))

    # As in a step, or a reference would round otherwise than what it is compared with.
    @contextmanager
    def computing() -> Iterator[None]:
        with (
            compilation.compiling(recipe.compute, state.device),
            placement.autocast(state.device, recipe.dtype),
            backends.math_attention(recipe.compute),
        ):
            yield

    return RunStart(
        folder=state.folder,
        step=state.step,
        reference=recipe.objective.reference_of(recipe),
        model=state.model,
        device=state.device,
        data=recipe.data,
        files=order.files,
        refs=refs,
        reader=state.reader,
        pad=lambda row: feeding.pad(row, state.row_lengths),
        computing=computing,
        initial_model=partial(_load_initial, recipe, state.device),
        in_step=shard.is_sharded(state.model),
    )
