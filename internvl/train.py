"""The training loop: `train.run(recipe)`.

build      recipe -> TrainState: model, objective, optimizer, sample order
train_step micro-batches -> one update, normalized by global counts
updates    the remaining steps, one at a time, with the metrics of each
run        the loop: step, log, evaluate, save
"""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Dataset

from internvl import dist, evals, log, plan
from internvl.compute import backends, compilation, feeding, kernels, memory, placement, rng
from internvl.config import EvalConfig, Recipe
from internvl.data import loader, row_steps
from internvl.data.records import Batch
from internvl.data.sampler import (
    Ending,
    GrownOrder,
    Order,
    Position,
    SampleOrder,
    UnitRef,
    step_bounds,
)
from internvl.data.sources import open_sources
from internvl.errors import CheckpointError, Interrupted, RunError, UserError, counted
from internvl.files import remove_partials
from internvl.inference import inherited, opened
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.families import FAMILIES
from internvl.inference.inherited import Completed
from internvl.inference.opened import OpenedModel
from internvl.models import bases
from internvl.models.chat import model as chat_model
from internvl.models.dual.model import DualModel
from internvl.models.vision import count_parameters
from internvl.objectives import OBJECTIVES, Objective
from internvl.objectives.packed import PackedObjective
from internvl.objectives.run_start import RunStart
from internvl.parallel import gradients, mesh, shard
from internvl.parallel.sharing import Sharing
from internvl.plan import costs as plan_costs
from internvl.training import (
    checkpoint,
    early_stopping,
    length,
    memory_ladder,
    optim,
    run_folder,
    signals,
    spikes,
    tracking,
    watchdog,
)
from internvl.training.spikes import Guard

CPU = torch.device("cpu")


@dataclass
class TrainState:
    """A run in progress. Only `model`, `optimizer`, `step`, `position`, `num_bad`, `guard` and
    `warmup_s` change."""

    recipe: Recipe
    device: torch.device
    chat: Chat | Dual
    """The model with its tokenizer and preprocessing, as `internvl.load` returns it."""
    objective: Objective
    optimizer: torch.optim.Optimizer
    order: Order
    reader: Dataset[loader.Read]
    num_steps: int
    total_samples: int
    """Samples that the whole run shows; 0 if a step is counted in rows."""
    guard: Guard
    saver: checkpoint.Saver
    evaluators: dict[str, evals.Evaluator]
    """The recipe's evaluations with their data read."""
    endings: tuple[Ending, ...] = ()
    """Earlier ends of a run that was made longer."""
    row_lengths: tuple[int, ...] = ()
    """Lengths in tokens that rows are padded to; empty if rows are not padded."""
    step: int = 0
    position: Position | None = None
    """Position in the data after `step` if a step is counted in rows, else None."""
    num_bad: int = 0
    """Bad samples left out so far, over all ranks."""
    warmup_s: float = 0.0
    """Seconds of compilation before the first step."""

    @property
    def model(self) -> chat_model.ChatModel | DualModel:
        return self.chat.model

    @property
    def folder(self) -> Path:
        return self.recipe.run


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
    cut = partial(prepare, recipe=recipe, device=device, grid=grid)
    shards_on = CPU if recipe.parallel.offload == "cpu" else device
    return loading.for_training(recipe, start, cut, device, shards_on)


def _load_initial(recipe: Recipe, device: torch.device) -> Any:
    """Loads the weights that the run started from, frozen, as a second model."""
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
    with compilation.several_shapes():
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


def _run_start(state: TrainState) -> RunStart:
    """Makes what the objective is told before the next step."""
    recipe, order = state.recipe, state.order

    def refs() -> Sequence[UnitRef]:
        # A step counted in rows shows no one knows how many; later epochs show the same samples.
        total = state.total_samples or len(order)
        return order.between(0, total if isinstance(order, GrownOrder) else min(total, len(order)))

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
    state.objective.begin_run(_run_start(state))
    watchdog.beat("compiles")
    warm_up(state)
    is_described, is_first = False, True
    watchdog.beat("reads", state.step + 1)
    for step, wait_s in feeding.prefetch(_steps(state)):
        started = time.perf_counter()
        watchdog.beat("trains", step.index + 1, first_names(step.batches))
        handle_bad_samples(state, step)
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
        yield step_metrics | _throughput(state, step, wait_s, step_s)
        watchdog.beat("reads", state.step + 1)


def first_names(batches: Sequence[Batch]) -> list[str]:
    """Returns the name of the first sample of each row; rows that only fill up have none."""
    return [name for batch in batches for name in batch.names[:1]]


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
        _log_file(recipe.run),
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
            metrics = _resume(state)
            logger.info("%s\n%s", summary(state), completed.render())
            if endings and state.step == endings[-1].step:
                logger.info("%s", length.continuation(recipe.optim, endings, state.num_steps))
            stop_reason = _validate_or_stop(state, metrics)
            readout = tracking.Readout()
            with log.Progress("steps", total=state.num_steps, done=state.step) as progress:
                for step_metrics in updates(state) if stop_reason is None else ():
                    stopped = stop.agreed()
                    _tolerate(state, state.saver.poll)
                    is_logged = state.step % recipe.log_every == 0 or state.step == state.num_steps
                    # A step that was passed over has no loss; its line is in skipped_steps.jsonl.
                    if is_logged and "loss" in step_metrics:
                        metrics.write(state.step, step_metrics)
                    progress.update(note=readout.line(step_metrics))
                    if stopped or state.step == state.num_steps:
                        _tolerate(state, state.saver.wait)
                        save(state)
                    elif _is_due(state, recipe.checkpoint.every):
                        _tolerate(state, state.saver.wait)
                        _tolerate(state, lambda: save(state))
                    if stopped:
                        state.saver.wait()
                        raise _interrupted(state)
                    # At other steps nothing is decided, and to decide all ranks meet.
                    if any(_is_eval_due(state, config) for config in recipe.evals.values()):
                        stop_reason = _validate_or_stop(state, metrics)
                    if stop_reason is not None:
                        save(state)
                        break
        reason = stop_reason or "all steps are done"
        logger.info("the run ends at step %d: %s", state.step, reason)
        metrics.close()
        # An adapter folder names its base by id or path; a model from parts has neither.
        if recipe.model.lora is not None and recipe.model.id is not None:
            # Here: PEFT takes half a second to import, and full fine-tuning needs none.
            from internvl.models.adapters import lora

            folder, base = state.folder / "adapter", start.local or recipe.model.id
            settings = FAMILIES[state.chat.family].settings(state.chat)
            lora.save_adapter(state.model, folder, base, start.step, settings)
        if dist.is_main():
            length.finish(recipe, state.step, state.total_samples, reason)
        dist.barrier()
    return recipe.run


def _interrupted(state: TrainState) -> Interrupted:
    if not state.step:
        return Interrupted("stopped before the first step; the same command begins again")
    return Interrupted(
        f"stopped at step {state.step} of {state.num_steps}; checkpoint written. "
        "The same command goes on from there"
    )


def _validate_or_stop(state: TrainState, metrics: tracking.Metrics) -> str | None:
    """As `validate`, but if a signal ends an evaluation, saves this step and raises Interrupted."""
    try:
        return validate(state, metrics)
    except UserError as error:
        # By its text: of the ranks that raise, only those that were asked raise Interrupted.
        if str(error) != signals.IN_EVALUATION:
            raise
    if state.step:
        _tolerate(state, state.saver.wait)
        save(state)
        state.saver.wait()
    raise _interrupted(state)


def _log_file(folder: Path) -> AbstractContextManager[None]:
    """Writes the log lines of rank 0 to the run's file too, inside this context."""
    return log.also_to(folder / tracking.LOG_FILE) if dist.is_main() else nullcontext()


def save(state: TrainState) -> None:
    """Begins to write a checkpoint of this step, on all ranks; see `checkpoint.Saver`."""
    watchdog.beat("saves")
    _checkpoint(state, state.folder / "checkpoints", state.recipe.checkpoint.keep)


def _tolerate(state: TrainState, work: Callable[[], None]) -> None:
    """Runs a step of saving after which others come: if it fails, on all ranks alike, the run goes
    on, for it loses nothing that it has in memory."""
    try:
        work()
    except CheckpointError as error:
        message = "step %d: %s. This run goes on, and saves again at the next checkpoint"
        log.get_logger().warning(message, state.step, error)


def _checkpoint(state: TrainState, folder: Path, keep: int, copy_of: Path | None = None) -> None:
    counters: dict[str, Any] = {"num_bad": state.num_bad, "guard": state.guard.state()}
    # With `global_batch` the order is a function of seed and step, so no position is saved.
    if state.position is not None:
        counters["position"] = asdict(state.position)
    if state.objective.state():
        counters["objective"] = state.objective.state()
    model, optimizer = state.model, state.optimizer
    state.saver.save(folder, state.step, model, optimizer, counters, keep, copy_of=copy_of)


def validate(state: TrainState, metrics: tracking.Metrics) -> str | None:
    """Runs the due evaluations and keeps the best step; returns why the run should end, or None.

    Raises:
        RunError: an evaluation got worse than its guard allows; a checkpoint was written.
    """
    measured = evaluate(state)
    if dist.is_main():
        metrics.show(state.step, measured)
    # By rank 0, which wrote the files: all must stop at the same step, or the next step would hang.
    verdict = dist.on_main(lambda: _verdict(state))
    if verdict.best:
        _tolerate(state, lambda: _keep_best(state))
    for sentence in verdict.warnings:
        log.get_logger().warning("%s", sentence)
    if verdict.forgotten:
        save(state)
        state.saver.wait()
        raise RunError(
            f"{'; '.join(verdict.forgotten)}. The checkpoint of this step is kept; train on such "
            "data too, lower optim.lr, or raise max_worsening and start the same command again"
        )
    return verdict.stop


def _verdict(state: TrainState) -> early_stopping.Verdict:
    history = early_stopping.history(state.folder / "evals", state.step)
    return early_stopping.judge(state.recipe, history, state.step)


def _keep_best(state: TrainState) -> None:
    """Keeps a copy of this step in the run's folder `best`, on all ranks."""
    best = state.folder / "best"
    message = "step %d is the best so far by %s, kept in %s"
    log.get_logger().info(message, state.step, state.recipe.checkpoint.best, best)
    _checkpoint(state, best / "checkpoints", 1, copy_of=state.folder / "checkpoints")
    if dist.is_main():
        shutil.copyfile(state.folder / "recipe.yaml", best / "recipe.yaml")
        bases.write(best, bases.read(state.folder))


def evaluate(state: TrainState) -> dict[str, float]:
    """Runs the evaluations that are due at this step; returns "evaluation/metric" -> value.

    All ranks compute; rank 0 writes evals/STEP.json and the answers.
    """
    due = {
        name: state.evaluators[name]
        for name, config in state.recipe.evals.items()
        if _is_eval_due(state, config)
    }
    # A resumed run reaches this step again; evaluations in its file are not repeated.
    for name in evals.measured(state.folder / "evals", state.step):
        due.pop(name, None)
    if not due:
        return {}
    state.model.eval()
    watchdog.beat("evaluates")
    computing = compilation.evaluating(state.device, state.recipe.dtype)
    with computing, shard.evaluating(state.model, state.recipe.parallel):
        return evals.run_all(due, state.chat, state.folder / "evals", state.step)


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


def summary(state: TrainState) -> str:
    """Describes the samples, steps, parameters and devices of a run in one line."""
    recipe = state.recipe
    batch = f"{recipe.global_batch_rows} rows" if recipe.global_batch_rows else recipe.global_batch
    num_trained, num_parameters = count_parameters(state.model)
    return (
        f"{recipe.run}: {counted(len(state.order), 'sample')} per epoch in "
        f"{counted(state.order.num_groups, 'group')}, "
        f"{batch} per step, {counted(state.num_steps, 'step')}, from step {state.step}; "
        f"{num_trained:,} of {num_parameters:,} parameters train, {recipe.dtype} on "
        f"{dist.world_size()} x {state.device.type}"
    )


def _steps(state: TrainState) -> Iterator[loader.Step]:
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


def _resume(state: TrainState) -> tracking.Metrics:
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


def _throughput(
    state: TrainState, step: loader.Step, wait_s: float, step_s: float
) -> dict[str, float]:
    """Returns the metrics of a step's size, speed and peak memory."""
    rank_counts = {
        "rows": len(step.batches),
        "samples": sum(batch.num_samples for batch in step.batches),
        "tokens": sum(batch.num_tokens for batch in step.batches),
    }
    counts = dist.sum_counts(rank_counts)
    rows, samples, tokens = (int(counts[name]) for name in rank_counts)
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


def _is_eval_due(state: TrainState, config: EvalConfig) -> bool:
    # A guard needs the value before the first step, which later ones are compared with.
    if state.step == 0:
        return config.before or config.guard is not None
    return state.step == state.num_steps or _is_due(state, config.every)


def _is_due(state: TrainState, every: int) -> bool:
    return every > 0 and state.step % every == 0
