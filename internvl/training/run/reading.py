"""The samples of each step: read, shared out over ranks, packed into rows; bad ones listed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from internvl import dist, log, plan
from internvl.compute import feeding
from internvl.data import loader, row_steps
from internvl.data.records import Batch
from internvl.data.sampler import Position, SampleOrder
from internvl.errors import RunError
from internvl.objectives.packed import PackedObjective
from internvl.parallel.sharing import Sharing
from internvl.plan import costs as plan_costs
from internvl.training.run.state import TrainState


def steps(state: TrainState) -> Iterator[loader.Step]:
    """Returns the steps that are left: this rank's batches of each, ready for its device."""
    recipe = state.recipe

    def prepare(batches: Sequence[Any]) -> Sequence[Batch]:
        if state.row_lengths:
            # A compiled model has one graph per length; any other length would recompile.
            batches = [feeding.pad(row, state.row_lengths) for row in batches]
        # After padding, which copies; only pinned memory is copied to the GPU asynchronously.
        return [feeding.pin(row) for row in batches] if state.device.type == "cuda" else batches

    sharing = _sharing(state)
    if recipe.global_batch_rows is not None:
        objective, order = state.objective, state.order
        # Other recipes were refused: pairs have no rows, and changed data no position.
        assert isinstance(objective, PackedObjective)
        assert isinstance(order, SampleOrder)
        return row_steps.row_steps(
            order,
            state.reader,
            lambda groups: prepare(objective.rows(groups)),
            recipe.data,
            num_rows=recipe.global_batch_rows,
            position=state.position or Position(),
            first=state.step,
            last=state.num_steps,
            sharing=sharing,
        )
    return loader.steps(
        state.order,
        state.reader,
        lambda units: _batches(state, units, prepare, sharing),
        first=state.step,
        last=state.num_steps,
        global_batch=recipe.batch_samples,
        total=state.total_samples,
        endings=state.endings,
        workers=recipe.data.workers,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )


def _batches(
    state: TrainState,
    units: Sequence[Any],
    prepare: Callable[[Sequence[Any]], Sequence[Batch]],
    sharing: Sharing | None,
) -> Sequence[Batch]:
    """Makes this rank's batches of a step, from the units that it has read."""
    objective, data = state.objective, state.recipe.data
    if sharing is None:
        return prepare(objective.batches(units))
    # After reading: only then are lengths and tiles true, and no image is read twice.
    if not isinstance(objective, PackedObjective) or data.packing != "best-fit":
        return sharing.align(prepare(objective.batches(sharing.even(units))))
    lengths = state.row_lengths or (data.row_tokens or data.max_tokens,)
    rows = sharing.rows(objective.pieces(units), lengths, data.max_tiles)
    # Not sorted: the n-th rows of all ranks are alike.
    return prepare(objective.rows([row for row in rows if row]))


def _sharing(state: TrainState) -> Sharing | None:
    """Makes what ranks even out each step's work by; None on one rank."""
    if dist.world_size() == 1:
        return None
    # On the meta device: the model itself may be fused, quantized or sharded by now.
    model = plan.model_of(state.recipe, state.model.config)
    costs = plan_costs.costs_of(state.recipe, model)
    return Sharing(costs.of_unit, costs.of_batch)


def handle_bad_samples(state: TrainState, step: loader.Step) -> None:
    """Raises, or lists and counts, the bad samples of a step on all ranks.

    Raises:
        BadSample: with `on_bad_sample: raise`.
        RunError: more than `max_bad_fraction` of the samples so far are bad.
    """
    bad_samples = [bad for of_rank in dist.gather_objects(step.bad) for bad in of_rank]
    if not bad_samples:
        return
    # Gathered first: every rank raises the same sample at the same step.
    if state.recipe.data.on_bad_sample == "raise":
        raise bad_samples[0]
    bad_log = log.StepLog(state.folder, "bad_samples.jsonl")
    if dist.is_main():
        for bad in bad_samples:
            bad_log.append({"step": step.index + 1, "sample": bad.name, "reason": bad.reason})
    state.num_bad += len(bad_samples)
    # A share of few samples is noise: fewer than a hundred count as a hundred.
    if state.num_bad > state.recipe.data.max_bad_fraction * max(step.num_seen, 100):
        raise RunError(
            f"{state.num_bad} of the first {step.num_seen} samples are bad, more than "
            f"data.max_bad_fraction = {state.recipe.data.max_bad_fraction} allows; the last: "
            f"{bad_samples[-1]}. All are listed in {bad_log.path}"
        )
