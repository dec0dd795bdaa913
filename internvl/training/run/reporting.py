"""A run in lines: what it is, how fast a step was."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from internvl import dist, log
from internvl.compute import memory
from internvl.data import loader
from internvl.data.records import Batch
from internvl.errors import counted
from internvl.models.vision import count_parameters
from internvl.training import tracking
from internvl.training.run.state import TrainState


def summary(state: TrainState) -> str:
    """Describes the samples, steps, parameters and devices of a run in one line."""
    recipe = state.recipe
    batch = f"{recipe.global_batch_rows} rows" if recipe.global_batch_rows else recipe.global_batch
    # After adapters, freezing and quantization: what the optimizer really moves.
    num_trained, num_parameters = count_parameters(state.model)
    return (
        f"{recipe.run}: {counted(len(state.order), 'sample')} per epoch in "
        f"{counted(state.order.num_groups, 'group')}, "
        f"{batch} per step, {counted(state.num_steps, 'step')}, from step {state.step}; "
        f"{num_trained:,} of {num_parameters:,} parameters train, {recipe.dtype} on "
        f"{dist.world_size()} x {state.device.type}"
    )


def throughput(
    state: TrainState, step: loader.Step, wait_s: float, step_s: float
) -> dict[str, float]:
    """Returns the metrics of a step's size, speed and peak memory."""
    # Over all ranks: they meet within a step, so each one's seconds are those of the whole step.
    rank_counts = {
        "rows": len(step.batches),
        "samples": sum(batch.num_samples for batch in step.batches),
        "tokens": sum(batch.num_tokens for batch in step.batches),
    }
    counts = dist.sum_counts(rank_counts)
    rows, samples, tokens = (int(counts[name]) for name in rank_counts)
    # The share of full rows, whatever a rank pads its own to.
    limit = state.recipe.data.row_tokens or state.recipe.data.max_tokens
    packs = state.recipe.objective.rows_are_packed
    return {
        "rows": rows,
        "samples": samples,
        "tokens": tokens,
        **({"fill": tokens / (max(1, rows) * limit)} if packs else {}),
        "samples_per_s": samples / step_s,
        "tokens_per_s": tokens / step_s,
        "data_wait_s": wait_s,
        "step_s": step_s,
        "memory_gib": memory.peak_memory_gib(state.device),
    }


def first_names(batches: Sequence[Batch]) -> list[str]:
    """Returns the name of the first sample of each row; rows that only fill up have none."""
    return [name for batch in batches for name in batch.names[:1]]


def log_file(folder: Path) -> AbstractContextManager[None]:
    """Writes the log lines of rank 0 to the run's file too, inside this context."""
    return log.also_to(folder / tracking.LOG_FILE) if dist.is_main() else nullcontext()
