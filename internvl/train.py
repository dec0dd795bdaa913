"""The run and its loop: `train.run(recipe)`.

build      recipe -> TrainState: model, objective, optimizer, sample order
train_step micro-batches -> one update, normalized by global counts
updates    the remaining steps, one after the other, and the metrics of each
run        the loop: step, log, evaluate, save
"""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from internvl import dist, evals, log
from internvl.compute import backends, compilation, feeding, kernels, memory, placement, rng
from internvl.config import EvalConfig, Recipe
from internvl.data import loader, row_steps
from internvl.data.records import Batch
from internvl.data.sampler import Order, Position, SampleOrder
from internvl.data.sources import Source, open_source, source_configs
from internvl.errors import Interrupted, RunError
from internvl.inference import inherited
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.models.adapters import lora
from internvl.models.chat import model as chat_model
from internvl.models.dual.model import DualModel
from internvl.models.vision import count_parameters
from internvl.objectives import OBJECTIVES, Objective
from internvl.objectives.sft import Sft
from internvl.parallel import gradients
from internvl.training import (
    checkpoint,
    early_stopping,
    memory_ladder,
    optim,
    run_folder,
    signals,
    spikes,
    tracking,
)
from internvl.training.spikes import Guard


@dataclass
class TrainState:
    """A run in progress. Only `model`, `optimizer`, `step`, `position`, `num_bad` and `guard`
    change."""

    recipe: Recipe
    device: torch.device
    chat: Chat | Dual
    """The model with its tokenizer and preprocessing, as `internvl.load` returns it."""
    objective: Objective
    optimizer: torch.optim.Optimizer
    order: Order
    reader: Dataset[loader.Read]
    num_steps: int
    guard: Guard
    evaluators: dict[str, evals.Evaluator]
    """The recipe's evaluations with their data read; rank 0 has them."""
    row_lengths: tuple[int, ...] = ()
    """Lengths in tokens that rows are padded to; empty if rows keep their own."""
    step: int = 0
    position: Position | None = None
    """Position in the data after `step` if a step is counted in rows, else None."""
    num_bad: int = 0
    warmup_s: float = 0.0
    """Seconds of compiling before the first step."""

    @property
    def model(self) -> chat_model.ChatModel | DualModel:
        return self.chat.model

    @property
    def folder(self) -> Path:
        return self.recipe.run

    @property
    def total_samples(self) -> int:
        """Number of samples of the whole run."""
        return self.recipe.num_samples(self.order.epoch_size(self.recipe.epochs))


def build(
    recipe: Recipe, chat: Chat | Dual | None = None, order: Order | None = None
) -> TrainState:
    """Builds everything a run needs: data, model on its device, objective and optimizer.

    Args:
        chat: a model to train as it is, adapters included, instead of loading `recipe.model`.
        order: of the samples, instead of that of a run that begins.
    """
    device = dist.init_from_env(recipe.device)
    if not inherited.is_complete(recipe):
        recipe = _completed(recipe, chat)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    # Before the model is loaded: new adapters and heads draw their weights from this seed.
    torch.manual_seed(recipe.seed)
    # Before the model: what is wrong with an evaluation must not cost the training before it.
    evaluators = evals.build(recipe.evals) if dist.is_main() else {}
    chat = loading.for_training(recipe) if chat is None else chat
    if order is None:
        order = SampleOrder(_files(recipe), share_prefix=recipe.shares_prefix, seed=recipe.seed)
    packs = recipe.objective.rows_are_packed
    objective = OBJECTIVES[recipe.objective.name](recipe.objective, recipe.data, chat.encoder)
    placement.to_device(chat.model, device, recipe.dtype)
    kernels.apply_compute(chat.model, device, recipe.compute)
    # Last: apply_compute may replace modules, and the optimizer must hold what trains.
    optimizer = optim.build(chat.model, recipe.optim)
    return TrainState(
        recipe=recipe,
        device=device,
        chat=chat,
        objective=objective,
        optimizer=optimizer,
        order=order,
        reader=objective.reader(order.files, recipe.seed),
        num_steps=recipe.num_steps(order.epoch_size(recipe.epochs)),
        guard=Guard(recipe.guard),
        evaluators=evaluators,
        row_lengths=backends.row_lengths(recipe.compute, device, recipe.data) if packs else (),
    )


def _files(recipe: Recipe) -> list[Source]:
    return [open_source(source) for source in source_configs(recipe.data)]


def _completed(recipe: Recipe, chat: Chat | Dual | None) -> Recipe:
    """Returns the recipe with its open values taken from `chat`, else from the checkpoint."""
    if chat is None:
        return loading.complete(recipe).recipe
    start = inherited.checkpoint_from_config(chat.model.config, "the model that is given")
    return inherited.complete(recipe, start).recipe


def train_step(state: TrainState, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """Takes one optimizer step; returns its loss, terms, learning rate and gradient norm.

    The gradient does not depend on how the step was cut into rows or over ranks.

    Raises:
        RunError: nothing to train on, out of GPU memory, or the guard stops the run.
    """
    recipe, objective = state.recipe, state.objective
    counted = [objective.counts(batch) for batch in micro_batches]
    # Counted over all ranks before the first backward pass: each row's sum is divided by the count
    # of the whole step, so the gradient is the mean over the step, not a mean of rows' means.
    counts = dist.sum_counts({n: sum(row[n] for row in counted) for n in objective.weights})
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise RunError(f"step {state.step + 1} has nothing to train on for {', '.join(empty)}")
    state.model.train()
    # By step, not once a run: dropout after a resume draws what it would have drawn without.
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
        # Again: the iterator above is used up if the objective encoded all pairs at first.
        rows = feeding.prefetch_to_device(micro_batches, state.device)
        sums = [_backward(state, row, counts) for row in rows]
    # Summed before clipping: the norm is that of the whole step on every rank.
    trainable = [p for p in state.model.parameters() if p.requires_grad]
    gradients.sum_gradients(trainable)
    grad_norm = gradients.clip_gradients(trainable, recipe.optim.max_grad_norm)
    # The only transfer to the host in a step: one wait for all values instead of one for each.
    *flat, norm = torch.cat([*sums, grad_norm[None]]).tolist()
    by_row = [
        dict(zip(counts, flat[start : start + len(counts)], strict=True))
        for start in range(0, len(flat), len(counts))
    ]
    totals = dist.sum_counts({name: sum(row[name] for row in by_row) for name in counts})
    means = {name: total / counts[name] for name, total in totals.items()}
    numbers = {"loss": _weighted(state, totals, counts), **means}
    losses = [_weighted(state, *of_row) for of_row in zip(by_row, counted, strict=True)]
    lr = optim.set_lr(state.optimizer, state.step, state.num_steps, recipe.optim)
    # Judged after the gradients are summed, so that every rank decides alike.
    skipped = _refused(state, micro_batches, losses, numbers["loss"], norm)
    if not skipped:
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return numbers | {"lr": lr, "grad_norm": norm} | ({"skipped": 1.0} if skipped else {})


def _weighted(state: TrainState, sums: dict[str, float], counts: dict[str, float]) -> float:
    """Returns the weighted loss of terms given as sums and counts; terms without a count add 0."""
    return sum(w * sums[n] / counts[n] for n, w in state.objective.weights.items() if counts[n])


def _refused(
    state: TrainState, rows: Sequence[Batch], losses: Sequence[float], loss: float, norm: float
) -> bool:
    """Returns True if the guard rejects this step, which is then listed; or stops the run."""
    step = state.step + 1
    reason = state.guard.objection(step, loss, norm)
    if reason is None:
        state.guard.remember(loss, norm)
        return False
    _, names = max(dist.gather_objects(spikes.worst(rows, losses)), key=lambda worst: worst[0])
    spikes.refuse(state.guard, step, reason, names, log.StepLog(state.folder, spikes.SKIPPED))
    return True


def _backward(state: TrainState, batch: Batch, counts: dict[str, float]) -> torch.Tensor:
    """Runs forward and backward of a row; returns float32 (terms,) sums, ordered as `counts`.

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
            # False if only the projector trains and the row has no image.
            if loss.requires_grad:
                loss.backward()
    except torch.OutOfMemoryError as error:
        row = (
            f"in a row of {batch.num_samples} samples, {batch.num_tokens:,} tokens and "
            f"{batch.num_tiles} tiles (the first: {batch.names[0]})"
        )
        raise _out_of_memory(state, row) from error
    return torch.stack([sums[name].detach().float() for name in counts])


def _out_of_memory(state: TrainState, phase: str) -> RunError:
    where = f"out of GPU memory in step {state.step + 1}, {phase}"
    return RunError(f"{where}. {memory_ladder.advice(state.recipe)}")


def warm_up(state: TrainState) -> None:
    """Compiles forward and backward for every padded row length, and drops the gradients.

    Random numbers drawn here change nothing: every step seeds its own.
    """
    started = time.perf_counter()
    batches = state.objective.warmup_batches(state.row_lengths)
    state.model.train()
    with compilation.compiling(state.recipe.compute, state.device):
        for batch in feeding.prefetch_to_device(batches, state.device):
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

    Compiles before the first step. Rows of the next step are read while one trains.
    """
    warm_up(state)
    first = state.step
    for step, wait_s in feeding.prefetch(_steps(state)):
        started = time.perf_counter()
        take_bad(state, step)
        if step.index == first:
            described = state.objective.describe(step.batches)
            log.get_logger().info("step %d: %s", first + 1, described)
        numbers = train_step(state, step.batches)
        # After the step, of which it is: the loader itself is one ahead.
        state.position = step.position
        yield numbers | _speed(state, step, wait_s, time.perf_counter() - started + wait_s)


def run(recipe: Recipe) -> Path:
    """Trains until the recipe's end, going on from the run folder's newest checkpoint.

    Raises:
        RunError: the run folder holds another recipe or other data, or another process is training
            in it.
        Interrupted: SIGINT or SIGTERM; a checkpoint was written.
        BadSample: with `on_bad_sample: raise`.
    """
    logger = log.get_logger()
    dist.init_from_env(recipe.device)
    if not dist.is_main():
        logger.setLevel(logging.WARNING)
    completed = loading.complete(recipe)
    recipe = completed.recipe
    dist.barrier()  # every rank has read the run folder's recipe before rank 0 writes it anew
    with run_folder.owned(recipe), signals.stop_signal() as stop:
        if run_folder.finished(recipe.run):
            logger.info("the run %s is finished; choose another `run` to train again", recipe.run)
            return recipe.run
        done = max(checkpoint.steps(recipe.run / "checkpoints"), default=0)
        # With rows it only says whether the run has begun: their data may not grow.
        done *= recipe.global_batch or 1
        order = run_folder.order_of(recipe, _files(recipe), done)
        state = build(recipe, order=order)
        metrics = _resume(state)
        logger.info("%s\n%s", summary(state), completed.render())
        enough = validate(state, metrics)
        with log.Progress("steps", total=state.num_steps - state.step) as progress:
            for numbers in updates(state) if enough is None else ():
                stopped = stop.agreed()
                if state.step % recipe.log_every == 0 or state.step == state.num_steps:
                    metrics.write(state.step, numbers)
                progress.update()
                if _due(state, recipe.checkpoint.every) or stopped or state.step == state.num_steps:
                    save(state)
                if stopped:
                    raise Interrupted(
                        f"stopped at step {state.step} of {state.num_steps}; checkpoint written. "
                        "The same command goes on from there"
                    )
                enough = validate(state, metrics)
                if enough is not None:
                    save(state)
                    break
        why = enough or "all steps are done"
        logger.info("the run ends at step %d: %s", state.step, why)
        metrics.close()
        if dist.is_main():
            # An adapter folder names its base, and none holds a model from parts.
            if recipe.model.lora is not None and recipe.model.id is not None:
                lora.save_adapter(state.model, state.folder / "adapter", recipe.model.id)
            run_folder.finish(recipe.run, state.step, why)
        dist.barrier()
    return recipe.run


def save(state: TrainState) -> None:
    """Writes a checkpoint of this step, on rank 0; the others wait."""
    if dist.is_main():
        _checkpoint(state, state.folder / "checkpoints", state.recipe.checkpoint.keep)
    dist.barrier()


def _checkpoint(state: TrainState, folder: Path, keep: int) -> None:
    counters: dict[str, Any] = {"num_bad": state.num_bad, "guard": state.guard.state()}
    # In steps of samples the order is a function of seed and step, so no cursor is saved.
    if state.position is not None:
        counters["position"] = asdict(state.position)
    checkpoint.save(folder, state.step, state.model, state.optimizer, counters, keep)


def validate(state: TrainState, metrics: tracking.Metrics) -> str | None:
    """Evaluates what is due and keeps the best step; returns why the run should end, or None.

    Raises:
        RunError: an evaluation got worse than its guard allows; a checkpoint was written.
    """
    verdict = early_stopping.Verdict()
    if dist.is_main():
        metrics.show(state.step, evaluate(state))
        history = early_stopping.history(state.folder / "evals", state.step)
        verdict = early_stopping.judge(state.recipe, history, state.step)
        if verdict.best:
            best = state.folder / "best"
            _checkpoint(state, best / "checkpoints", keep=1)
            shutil.copyfile(state.folder / "recipe.yaml", best / "recipe.yaml")
    # Rank 0 alone evaluates; all must stop at the same step, or the next all-reduce would hang.
    verdict = dist.from_main(verdict)
    for sentence in verdict.warnings:
        log.get_logger().warning("%s", sentence)
    if verdict.forgotten:
        save(state)
        raise RunError(
            f"{'; '.join(verdict.forgotten)}. The checkpoint of this step is kept; train on what "
            "is forgotten too, lower optim.lr, or allow more and start the same command again"
        )
    return verdict.stop


def evaluate(state: TrainState) -> dict[str, float]:
    """Runs the evaluations due at this step and not done yet; returns their metrics by name.

    Writes evals/STEP.json and the answers.
    """
    due = {
        n: state.evaluators[n] for n, spec in state.recipe.evals.items() if _eval_due(state, spec)
    }
    # A resumed run comes by this step again; what is written already is not measured twice.
    for name in evals.measured(state.folder / "evals", state.step):
        due.pop(name, None)
    if not due:
        return {}
    state.model.eval()
    with compilation.evaluating(state.device, state.recipe.dtype):
        return evals.run_all(due, state.chat, state.folder / "evals", state.step)


def take_bad(state: TrainState, step: loader.Step) -> None:
    """Raises for the step's first bad sample, or lists them all and counts, as the recipe says."""
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
    # A share of very few samples says nothing: the cap counts from the first hundred on.
    if state.num_bad > state.recipe.data.max_bad_fraction * max(step.num_seen, 100):
        raise RunError(
            f"{state.num_bad} of the first {step.num_seen} samples are bad, more than "
            f"data.max_bad_fraction = {state.recipe.data.max_bad_fraction} allows; the last: "
            f"{bad_samples[-1]}. All are listed in {bad_log.path}"
        )


def summary(state: TrainState) -> str:
    """Returns one sentence on the samples, steps, parameters and devices of a run."""
    recipe = state.recipe
    batch = f"{recipe.global_batch_rows} rows" if recipe.global_batch_rows else recipe.global_batch
    num_trained, num_parameters = count_parameters(state.model)
    return (
        f"{recipe.run}: {len(state.order):,} samples an epoch in "
        f"{state.order.num_groups:,} groups, "
        f"{batch} a step, {state.num_steps:,} steps, from step {state.step}; "
        f"{num_trained:,} of {num_parameters:,} parameters train, {recipe.dtype} on "
        f"{dist.world_size()} x {state.device.type}"
    )


def _steps(state: TrainState) -> Iterator[loader.Step]:
    recipe = state.recipe

    def ready(batches: Sequence[Any]) -> Sequence[Batch]:
        if state.row_lengths:
            # A compiled model has one graph per length; any other length would recompile.
            batches = [feeding.pad(row, state.row_lengths) for row in batches]
        # After padding, which copies; only pinned memory goes to the GPU without waiting.
        return [feeding.pin(row) for row in batches] if state.device.type == "cuda" else batches

    if recipe.global_batch_rows is not None:
        objective, order = state.objective, state.order
        # The recipe was refused otherwise: pairs have no rows, and data that may grow no position.
        assert isinstance(objective, Sft)
        assert isinstance(order, SampleOrder)
        return row_steps.row_steps(
            order,
            state.reader,
            lambda groups: ready(objective.rows(groups)),
            recipe.data,
            num_rows=recipe.global_batch_rows,
            position=state.position or Position(),
            first=state.step,
            last=state.num_steps,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )
    return loader.steps(
        state.order,
        state.reader,
        lambda units: ready(state.objective.batches(units)),
        first=state.step,
        last=state.num_steps,
        global_batch=recipe.batch_samples,
        total=state.total_samples,
        workers=recipe.data.workers,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )


def _resume(state: TrainState) -> tracking.Metrics:
    """Loads the newest checkpoint and truncates the logs after its step."""
    saved = checkpoint.steps(state.folder / "checkpoints")
    if saved:
        folder = state.folder / "checkpoints"
        counters = checkpoint.load(folder, saved[-1], state.model, state.optimizer)
        state.step, state.num_bad = saved[-1], checkpoint.whole_number(counters, "num_bad")
        if state.recipe.global_batch_rows is not None:
            state.position = checkpoint.position(counters)
        state.guard.restore(counters.get("guard"))
    dist.barrier()
    if not dist.is_main():
        return tracking.Metrics([])
    # Steps after the checkpoint are taken again and would be logged twice.
    for name in ("bad_samples.jsonl", spikes.SKIPPED):
        log.StepLog(state.folder, name).truncate_after(state.step)
    return tracking.open_metrics(state.folder, state.step, state.recipe.wandb)


def _speed(state: TrainState, step: loader.Step, wait_s: float, seconds: float) -> dict[str, float]:
    of_rank = {
        "rows": len(step.batches),
        "samples": sum(batch.num_samples for batch in step.batches),
        "tokens": sum(batch.num_tokens for batch in step.batches),
    }
    summed = dist.sum_counts(of_rank)
    rows, samples, tokens = (int(summed[name]) for name in of_rank)
    limit = state.recipe.data.row_tokens or state.recipe.data.max_tokens
    packs = state.recipe.objective.rows_are_packed
    return {
        "rows": rows,
        "samples": samples,
        "tokens": tokens,
        **({"fill": tokens / (max(1, rows) * limit)} if packs else {}),
        "samples_per_s": samples / seconds,
        "tokens_per_s": tokens / seconds,
        "data_wait_s": wait_s,
        "step_s": seconds,
        "memory_gib": memory.peak_memory_gib(state.device),
    }


def _eval_due(state: TrainState, spec: EvalConfig) -> bool:
    if state.step == 0:
        return spec.before or spec.guard is not None
    return state.step == state.num_steps or _due(state, spec.every)


def _due(state: TrainState, every: int) -> bool:
    return every > 0 and state.step % every == 0
