"""Checkpoints of a run: written, kept as the best, resumed from."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from internvl import dist, log
from internvl.errors import CheckpointError, Interrupted
from internvl.files import remove_partials
from internvl.inference.families import FAMILIES
from internvl.inference.opened import OpenedModel
from internvl.models import bases
from internvl.training import checkpoint, spikes, tracking, watchdog
from internvl.training.run.state import TrainState


def save(state: TrainState) -> None:
    """Begins to write a checkpoint of this step, on all ranks; see `checkpoint.Saver`."""
    watchdog.beat("saves")
    _checkpoint(state, state.folder / "checkpoints", state.recipe.checkpoint.keep)


def tolerate(state: TrainState, work: Callable[[], None]) -> None:
    """Runs a step of saving after which others come: if it fails, on all ranks alike, the run goes
    on, for it loses nothing that it has in memory."""
    try:
        work()
    except CheckpointError as error:
        message = "step %d: %s. This run goes on, and saves again at the next checkpoint"
        # All say the same.
        if dist.is_main():
            log.get_logger().warning(message, state.step, error)


def _checkpoint(state: TrainState, folder: Path, keep: int, copy_of: Path | None = None) -> None:
    """Hands a checkpoint of this step to the saver."""
    counters: dict[str, Any] = {"num_bad": state.num_bad, "guard": state.guard.state()}
    # With `global_batch` the order is a function of seed and step, so no position is saved.
    if state.position is not None:
        counters["position"] = asdict(state.position)
    if state.objective.state():
        counters["objective"] = state.objective.state()
    model, optimizer = state.model, state.optimizer
    state.saver.save(folder, state.step, model, optimizer, counters, keep, copy_of=copy_of)


def keep_best(state: TrainState) -> None:
    """Keeps a copy of this step in the run's folder `best`, on all ranks."""
    best = state.folder / "best"
    message = "step %d is the best so far by %s, kept in %s"
    log.get_logger().info(message, state.step, state.recipe.checkpoint.best, best)
    _checkpoint(state, best / "checkpoints", 1, copy_of=state.folder / "checkpoints")
    if dist.is_main():
        shutil.copyfile(state.folder / "recipe.yaml", best / "recipe.yaml")
        bases.write(best, bases.read(state.folder))


def save_adapter(state: TrainState, start: OpenedModel) -> None:
    """Writes the run's adapter, if it has one, as a folder for PEFT, on all ranks.

    Args:
        start: what the run started from.
    """
    model = state.recipe.model
    # An adapter folder names its base by id or path; a model from parts has neither.
    if model.lora is None or model.id is None:
        return
    # Here: PEFT takes half a second to import, and full fine-tuning needs none.
    from internvl.models.adapters import lora

    folder, base = state.folder / "adapter", start.local or model.id
    settings = FAMILIES[state.chat.family].settings(state.chat)
    lora.save_adapter(state.model, folder, base, start.step, settings)


def resume(state: TrainState) -> tracking.Metrics:
    """Loads the newest checkpoint, truncates the logs after its step, and opens the metrics."""
    folder = state.folder / "checkpoints"
    saved = checkpoint.steps(folder)
    if dist.is_main():
        for unfinished in (folder, state.folder / "best/checkpoints"):
            remove_partials(unfinished)
    if saved:
        counters = checkpoint.load(folder, saved[-1], state.model, state.optimizer)
        state.step, state.num_bad = saved[-1], checkpoint.whole_number(counters, "num_bad")
        if state.recipe.global_batch_rows is not None:
            state.position = checkpoint.position(counters)
        state.guard.restore(counters.get("guard"))
        if state.objective.state():
            state.objective.restore(counters.get("objective"))
    dist.barrier()
    if not dist.is_main():
        return tracking.Metrics([])
    # Steps after the checkpoint are repeated and would be logged twice.
    for name in ("bad_samples.jsonl", spikes.SKIPPED):
        log.StepLog(state.folder, name).truncate_after(state.step)
    return tracking.open_metrics(state.folder, state.step, state.recipe.wandb)


def interrupted(state: TrainState) -> Interrupted:
    """Returns the error that ends a run which a signal stopped."""
    if not state.step:
        return Interrupted("stopped before the first step; the same command begins again")
    return Interrupted(
        f"stopped at step {state.step} of {state.num_steps}; checkpoint written. "
        "The same command goes on from there"
    )
