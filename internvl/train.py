"""The training loop: `train.run(recipe)`.

build      recipe -> TrainState: model, objective, optimizer, sample order
train_step micro-batches -> one update, normalized by global counts
updates    the remaining steps, one at a time, with the metrics of each
run        the loop: step, log, evaluate, save
"""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from internvl import dist, log
from internvl.compute import backends, compilation, feeding, memory, placement, rng
from internvl.config import Recipe
from internvl.data.records import Batch
from internvl.data.sampler import step_bounds
from internvl.data.sources import open_sources
from internvl.errors import RunError
from internvl.inference import load as loading
from internvl.inference import opened
from internvl.models import bases
from internvl.parallel import gradients, shard
from internvl.training import (
    checkpoint,
    length,
    memory_ladder,
    optim,
    run_folder,
    signals,
    spikes,
    tracking,
    watchdog,
)
from internvl.training.run import building, evaluating, reading, reporting, saving
from internvl.training.run.building import build as build
from internvl.training.run.state import TrainState as TrainState


def train_step(state: TrainState, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """Takes one optimizer step; returns its loss, terms, learning rate and gradient norm.

    A step without a good sample on any rank counts, but updates nothing and has no loss.

    The gradient does not depend on how the step's samples are split into rows and over ranks.

    Raises:
        RunError: nothing to train on, out of GPU memory, or the guard stops the run.
    """
    recipe, objective = state.recipe, state.objective
    num_tiles = sum(batch.num_tiles for batch in micro_batches)
    # After counting: an empty batch has a tile, but no image.
    micro_batches = _filled(state, micro_batches)
    counts_by_row = [objective.counts(batch) for batch in micro_batches]
    # Counted over all ranks before the first backward pass: each row's sum is divided by the count
    # of the whole step, so the gradient is the mean over the step, not a mean of rows' means.
    counts = {name: sum(row[name] for row in counts_by_row) for name in objective.weights}
    counts = dist.sum_counts({**counts, _ROWS: len(micro_batches), _TILES: num_tiles})
    tiles_of_all = counts.pop(_TILES)
    if not counts.pop(_ROWS):
        return _pass_over(state)
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise RunError(f"step {state.step + 1} has nothing to train on for {', '.join(empty)}")
    state.model.train()
    # Per step, not per run: dropout after a resume draws the numbers of an uninterrupted run.
    rng.seed_step(recipe.seed, state.step)
    with compilation.tracing():
        autocast = placement.autocast(state.device, recipe.dtype)
        saved = memory.offloaded(state.model, state.device, recipe.compute)
        with autocast, backends.math_attention(recipe.compute), saved:
            rows = feeding.prefetch_to_device(micro_batches, state.device)
            try:
                objective.begin_step(state.model, rows, counts)
            except torch.OutOfMemoryError as error:
                raise _out_of_memory(state, "while all pairs are encoded") from error
        # A new iterator: an objective that encodes all pairs first has exhausted the other.
        rows = feeding.prefetch_to_device(micro_batches, state.device)
        sums = []
        for index, row in enumerate(rows, start=1):
            shard.begin_row(state.model, recipe.parallel, index, len(micro_batches))
            sums.append(_backward(state, row, counts))
    shard.end_step(state.model, tiles_of_all)
    # Summed before clipping: the norm is that of the whole step on every rank.
    trainable = [p for p in state.model.parameters() if p.requires_grad]
    gradients.sum_gradients(trainable)
    grad_norm = gradients.clip_gradients(trainable, recipe.optim.max_grad_norm)
    # The only transfer to the host in a step: one synchronization instead of one per value.
    *flat, norm = torch.cat([*sums, grad_norm[None]]).tolist()
    sums_by_row = [
        dict(zip(counts, flat[start : start + len(counts)], strict=True))
        for start in range(0, len(flat), len(counts))
    ]
    totals = dist.sum_counts({name: sum(row[name] for row in sums_by_row) for name in counts})
    means = {name: total / counts[name] for name, total in totals.items()}
    step_metrics = {"loss": _weighted_loss(state, totals, counts), **means}
    losses = [
        _weighted_loss(state, row_sums, row_counts)
        for row_sums, row_counts in zip(sums_by_row, counts_by_row, strict=True)
    ]
    lr = optim.set_lr(state.optimizer, state.step, state.num_steps, recipe.optim)
    # On the loss and norm over all ranks, so that every rank decides alike.
    skipped = _is_refused(state, micro_batches, losses, step_metrics["loss"], norm)
    if not skipped:
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    step_metrics |= objective.end_step(means, applied=not skipped)
    return step_metrics | {"lr": lr, "grad_norm": norm} | ({"skipped": 1.0} if skipped else {})


def _filled(state: TrainState, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
    """Returns as many batches as the rank with most has, the added ones empty, under shards."""
    if not shard.is_sharded(state.model):
        return micro_batches
    # Ranks wait for one another in every module: one with fewer batches would never come.
    missing = max(dist.gather_objects(len(micro_batches))) - len(micro_batches)
    return [*micro_batches, *[state.objective.empty_batch(state.row_lengths)] * missing]


_ROWS, _TILES = "rows", "tiles"
"""Names of the counts of batches and tiles, next to those of the objective's terms."""


def _pass_over(state: TrainState) -> dict[str, float]:
    """Counts a step of bad samples alone, which has nothing to update with."""
    # Counted, not taken again: the position in the data stays a function of the step, for a resume
    # and for every rank.
    lr = optim.lr_at(state.step, state.num_steps, state.recipe.optim)
    state.step += 1
    reason = "all of its samples are bad, so nothing is updated"
    log.get_logger().warning("step %d: %s", state.step, reason)
    if dist.is_main():
        log.StepLog(state.folder, spikes.SKIPPED).append({"step": state.step, "reason": reason})
    return {"lr": lr, "skipped": 1.0}


def _weighted_loss(state: TrainState, sums: dict[str, float], counts: dict[str, float]) -> float:
    """Returns the weighted sum of the terms' means; a term with count 0 adds nothing."""
    return sum(w * sums[n] / counts[n] for n, w in state.objective.weights.items() if counts[n])


def _is_refused(
    state: TrainState, rows: Sequence[Batch], losses: Sequence[float], loss: float, norm: float
) -> bool:
    """Returns True if the guard skips this step, after listing it. Raises RunError if it stops."""
    step = state.step + 1
    reason = state.guard.objection(step, loss, norm)
    if reason is None:
        state.guard.remember(loss, norm)
        return False
    _, names = max(dist.gather_objects(spikes.worst(rows, losses)), key=lambda worst: worst[0])
    spikes.refuse(state.guard, step, reason, names, log.StepLog(state.folder, spikes.SKIPPED))
    return True


def _backward(state: TrainState, batch: Batch, counts: dict[str, float]) -> torch.Tensor:
    """Runs forward and backward of a row; returns its sums, float32 (terms,), ordered as `counts`.

    Raises:
        RunError: the GPU's memory does not hold this row.
    """
    recipe = state.recipe
    autocast = placement.autocast(state.device, recipe.dtype)
    saved = memory.offloaded(state.model, state.device, recipe.compute)
    try:
        # Around the backward pass too: recomputed blocks must take the same attention kernel.
        with backends.math_attention(recipe.compute):
            with autocast, saved:
                sums = state.objective(state.model, batch)
            weights = state.objective.weights
            loss = torch.stack([weights[name] * sums[name] / counts[name] for name in counts]).sum()
            # No graph if only the projector trains and the row has no image.
            if loss.requires_grad:
                loss.backward()
    except torch.OutOfMemoryError as error:
        row = (
            f"in a row of {batch.num_samples} samples, {batch.num_tokens:,} tokens and "
            f"{batch.num_tiles} tiles (the first: {next(iter(batch.names), 'none')})"
        )
        raise _out_of_memory(state, row) from error
    return torch.stack([sums[name].detach().float() for name in counts])


def _out_of_memory(state: TrainState, phase: str) -> RunError:
    where = f"out of GPU memory in step {state.step + 1}, {phase}"
    return RunError(f"{where}. {memory_ladder.advice(state.recipe)}")


def warm_up(state: TrainState) -> None:
    """Compiles forward and backward for every padded row length; discards the gradients."""
    started = time.perf_counter()
    batches = state.objective.warmup_batches(state.row_lengths)
    state.model.train()
    with compilation.compiling(state.recipe.compute, state.device):
        for batch in feeding.prefetch_to_device(batches, state.device):
            # Dropout draws random numbers here, which change no result: every step has its seed.
            _backward(state, batch, state.objective.counts(batch))
            state.optimizer.zero_grad(set_to_none=True)
    placement.synchronize(state.device)
    state.warmup_s = time.perf_counter() - started
    if batches:
        lengths = ", ".join(f"{length:,}" for length in state.row_lengths)
        message = "compiled for rows of %s tokens in %.1f s"
        log.get_logger().info(message, lengths, state.warmup_s)


def updates(state: TrainState) -> Iterator[dict[str, float]]:
    """Takes the remaining steps; yields the metrics of each.

    Compiles before the first step. The next step's rows are read while one trains.
    """
    state.objective.begin_run(building.run_start(state))
    watchdog.beat("compiles")
    warm_up(state)
    is_described, is_first = False, True
    watchdog.beat("reads", state.step + 1)
    for step, wait_s in feeding.prefetch(reading.steps(state)):
        started = time.perf_counter()
        watchdog.beat("trains", step.index + 1, reporting.first_names(step.batches))
        reading.handle_bad_samples(state, step)
        # The first one that this rank has samples of; all of a step may be bad.
        if step.batches and not is_described:
            description = state.objective.describe(step.batches)
            log.get_logger().info("step %d: %s", step.index + 1, description)
            is_described = True
        step_metrics = train_step(state, step.batches)
        # The position of this step: the loader itself is one step ahead.
        state.position = step.position
        step_s = time.perf_counter() - started + wait_s
        if is_first and state.recipe.watchdog_s:
            is_first = False
            # From now on no rank does alone what takes minutes.
            dist.barrier()
            dist.set_timeout(2 * state.recipe.watchdog_s)
        yield step_metrics | reporting.throughput(state, step, wait_s, step_s)
        watchdog.beat("reads", state.step + 1)


def run(recipe: Recipe) -> Path:
    """Trains to the recipe's last step; resumes from the run folder's newest checkpoint.

    Returns:
        The run folder.

    Raises:
        RunError: the run folder holds another recipe or other data, or another process is training
            in it.
        Interrupted: SIGINT or SIGTERM; a checkpoint was written.
        BadSample: with `on_bad_sample: raise`.
    """
    logger = log.get_logger()
    dist.init_from_env(recipe.device, recipe.run / watchdog.FOLDER / watchdog.TRACES)
    if not dist.is_main():
        logger.setLevel(logging.WARNING)
    completed = loading.complete(recipe)
    recipe = completed.recipe
    # Every rank has read the run folder's recipe before rank 0 overwrites it.
    dist.barrier()
    with (
        run_folder.owned(recipe),
        reporting.log_file(recipe.run),
        watchdog.watching(recipe.run, recipe.watchdog_s),
        signals.stop_signal() as stop,
    ):
        if length.finished(recipe.run):
            logger.info("the run %s is finished; %s", recipe.run, length.how_to_go_on(recipe))
            return recipe.run
        num_done = max(checkpoint.steps(recipe.run / "checkpoints"), default=0)
        endings = length.endings(recipe.run)
        # Samples; if a step is counted in rows, data may not grow and only 0 or not matters.
        num_done, _ = step_bounds(num_done, recipe.global_batch or 1, sys.maxsize, endings)
        order = run_folder.order_of(recipe, open_sources(recipe.data), num_done)
        start = completed.start or opened.open_start(recipe)
        if dist.is_main():
            bases.write(recipe.run, opened.places(recipe, start))
        state = build(recipe, order=order, start=start, endings=endings)
        with state.saver:
            metrics = saving.resume(state)
            logger.info("%s\n%s", reporting.summary(state), completed.render())
            if endings and state.step == endings[-1].step:
                logger.info("%s", length.continuation(recipe.optim, endings, state.num_steps))
            stop_reason = evaluating.validate_or_stop(state, metrics)
            readout = tracking.Readout()
            with log.Progress("steps", total=state.num_steps, done=state.step) as progress:
                for step_metrics in updates(state) if stop_reason is None else ():
                    stopped = stop.agreed()
                    saving.tolerate(state, state.saver.poll)
                    is_logged = state.step % recipe.log_every == 0 or state.step == state.num_steps
                    # A step that was passed over has no loss; its line is in skipped_steps.jsonl.
                    if is_logged and "loss" in step_metrics:
                        metrics.write(state.step, step_metrics)
                    progress.update(note=readout.line(step_metrics))
                    if stopped or state.step == state.num_steps:
                        saving.tolerate(state, state.saver.wait)
                        saving.save(state)
                    elif state.is_due(recipe.checkpoint.every):
                        saving.tolerate(state, state.saver.wait)
                        saving.tolerate(state, lambda: saving.save(state))
                    if stopped:
                        state.saver.wait()
                        raise saving.interrupted(state)
                    # At other steps nothing is decided, and to decide all ranks meet.
                    if evaluating.is_due(state):
                        stop_reason = evaluating.validate_or_stop(state, metrics)
                    if stop_reason is not None:
                        saving.save(state)
                        break
        reason = stop_reason or "all steps are done"
        logger.info("the run ends at step %d: %s", state.step, reason)
        metrics.close()
        saving.save_adapter(state, start)
        if dist.is_main():
            length.finish(recipe, state.step, state.total_samples, reason)
        dist.barrier()
    return recipe.run
