"""The run and its loop: `train.run(recipe)`.

build      recipe -> model, objective, optimizer, sample order
train_step micro-batches -> one update, normalized by global counts
updates    the steps that are left, one after the other, and what each measured
run        the loop: step, log, evaluate, save
"""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from internvl import dist, evals, log
from internvl.compute import backends, compilation, feeding, kernels, memory, placement, rng
from internvl.config import EvalConfig, Recipe
from internvl.data import loader
from internvl.data.records import Batch
from internvl.data.sampler import Order, SampleOrder
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
class Run:
    """A run in progress. What moves is in `model`, `optimizer` and `step`."""

    recipe: Recipe
    device: torch.device
    chat: Chat | Dual
    """The handle a user would hold."""
    objective: Objective
    optimizer: torch.optim.Optimizer
    order: Order
    reader: Dataset[loader.Read]
    num_steps: int
    guard: Guard
    evaluators: dict[str, evals.Evaluator]
    """The recipe's evaluations with their data read; rank 0 has them."""
    row_lengths: tuple[int, ...] = ()
    """Lengths that rows are padded to; none where any length does."""
    step: int = 0
    num_bad: int = 0
    warmup_s: float = 0.0
    """What compiling before the first step took."""

    @property
    def model(self) -> chat_model.ChatModel | DualModel:
        return self.chat.model

    @property
    def folder(self) -> Path:
        return self.recipe.run

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.recipe.num_samples(self.order.epoch_size(self.recipe.epochs))


def build(recipe: Recipe, chat: Chat | Dual | None = None, order: Order | None = None) -> Run:
    """Everything a run needs, in the one order: load, choose what trains, adapt, place, arrange.

    Args:
        chat: a model to train as it is, adapters included, instead of loading `recipe.model`.
        order: of the samples, instead of that of a run that begins.
    """
    device = dist.init_from_env(recipe.device)
    if not inherited.is_complete(recipe):
        recipe = _completed(recipe, chat)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    # Before the model: what is wrong with an evaluation must not cost the training before it.
    evaluators = evals.build(recipe.evals) if dist.is_main() else {}
    chat = loading.for_training(recipe) if chat is None else chat
    if order is None:
        order = SampleOrder(_files(recipe), share_prefix=recipe.shares_prefix, seed=recipe.seed)
    packs = recipe.objective.packs
    objective = OBJECTIVES[recipe.objective.name](recipe.objective, recipe.data, chat.encoder)
    placement.to_device(chat.model, device, recipe.dtype)
    kernels.apply_compute(chat.model, device, recipe.compute)
    optimizer = optim.build(chat.model, recipe.optim)
    return Run(
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
    """The recipe with what it leaves open from the model that is given, else as `handles.complete`
    has it."""
    if chat is None:
        return loading.complete(recipe).recipe
    start = inherited.of_config(chat.model.config, "the model that is given")
    return inherited.complete(recipe, start).recipe


def train_step(run: Run, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """One optimizer step. The gradient does not depend on how the step was cut into rows or ranks:
    sums of every term are divided by what was counted over all of them."""
    recipe, objective = run.recipe, run.objective
    counted = [objective.counts(batch) for batch in micro_batches]
    counts = dist.sum_counts({n: sum(row[n] for row in counted) for n in objective.weights})
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise RunError(f"step {run.step + 1} has nothing to train on for {', '.join(empty)}")
    run.model.train()
    rng.seed_step(recipe.seed, run.step)
    with compilation.several_shapes():
        autocast = placement.autocast(run.device, recipe.dtype)
        saved = memory.offloaded(run.model, run.device, recipe.compute)
        with autocast, backends.math_attention(recipe.compute), saved:
            rows = feeding.prefetch_to_device(micro_batches, run.device)
            try:
                objective.begin_step(run.model, rows, counts)
            except torch.OutOfMemoryError as error:
                raise _out_of_memory(run, "while all pairs are encoded") from error
        rows = feeding.prefetch_to_device(micro_batches, run.device)
        sums = [_backward(run, row, counts) for row in rows]
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    gradients.sum_gradients(trainable)
    grad_norm = gradients.clip_gradients(trainable, recipe.optim.max_grad_norm)
    # The one place where the host waits for the device.
    *flat, norm = torch.cat([*sums, grad_norm[None]]).tolist()
    by_row = [
        dict(zip(counts, flat[start : start + len(counts)], strict=True))
        for start in range(0, len(flat), len(counts))
    ]
    totals = dist.sum_counts({name: sum(row[name] for row in by_row) for name in counts})
    means = {name: total / counts[name] for name, total in totals.items()}
    numbers = {"loss": _weighted(run, totals, counts), **means}
    losses = [_weighted(run, *of_row) for of_row in zip(by_row, counted, strict=True)]
    lr = optim.set_lr(run.optimizer, run.step, run.num_steps, recipe.optim)
    skipped = _refused(run, micro_batches, losses, numbers["loss"], norm)
    if not skipped:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return numbers | {"lr": lr, "grad_norm": norm} | ({"skipped": 1.0} if skipped else {})


def _weighted(run: Run, sums: dict[str, float], counts: dict[str, float]) -> float:
    """The total loss of terms that are given as sums and counts."""
    return sum(w * sums[n] / counts[n] for n, w in run.objective.weights.items() if counts[n])


def _refused(
    run: Run, rows: Sequence[Batch], losses: Sequence[float], loss: float, norm: float
) -> bool:
    """Whether the guard keeps this step from being applied; it stops the run or lists the step."""
    step = run.step + 1
    reason = run.guard.objection(step, loss, norm)
    if reason is None:
        run.guard.remember(loss, norm)
        return False
    _, names = max(dist.gather_objects(spikes.worst(rows, losses)), key=lambda found: found[0])
    spikes.refuse(run.guard, step, reason, names, log.StepLog(run.folder, spikes.SKIPPED))
    return True


def _backward(run: Run, batch: Batch, counts: dict[str, float]) -> torch.Tensor:
    """Adds a row's gradients; returns the sum of each term, in the order of `counts`.

    Raises:
        RunError: the GPU's memory does not hold this row.
    """
    recipe = run.recipe
    autocast = placement.autocast(run.device, recipe.dtype)
    saved = memory.offloaded(run.model, run.device, recipe.compute)
    try:
        # Around the backward pass too, for what is computed again there.
        with backends.math_attention(recipe.compute):
            with autocast, saved:
                sums = run.objective(run.model, batch)
            weights = run.objective.weights
            loss = torch.stack([weights[name] * sums[name] / counts[name] for name in counts]).sum()
            if loss.requires_grad:  # a row without images has nothing to teach the projector
                loss.backward()
    except torch.OutOfMemoryError as error:
        what = (
            f"in a row of {batch.num_samples} samples, {batch.num_tokens:,} tokens and "
            f"{batch.num_tiles} tiles (the first: {batch.names[0]})"
        )
        raise _out_of_memory(run, what) from error
    return torch.stack([sums[name].detach().float() for name in counts])


def _out_of_memory(run: Run, what: str) -> RunError:
    where = f"out of GPU memory in step {run.step + 1}, {what}"
    return RunError(f"{where}. {memory_ladder.advice(run.recipe)}")


def warm_up(now: Run) -> None:
    """Compiles for every shape a row may have, forward and backward, and drops the gradients.

    What is random in a step depends on its number, so nothing that is drawn here is missed.
    """
    started = time.perf_counter()
    batches = now.objective.warmup_batches(now.row_lengths)
    now.model.train()
    with compilation.compiling(now.recipe.compute, now.device):
        for batch in feeding.prefetch_to_device(batches, now.device):
            _backward(now, batch, now.objective.counts(batch))
            now.optimizer.zero_grad(set_to_none=True)
    placement.synchronize(now.device)
    now.warmup_s = time.perf_counter() - started
    if batches:
        lengths = ", ".join(f"{length:,}" for length in now.row_lengths)
        said = "compiled for rows of %s tokens in %.1f s"
        log.get_logger().info(said, lengths, now.warmup_s)


def updates(now: Run) -> Iterator[dict[str, float]]:
    """Takes the steps that are left; after each, what it measured.

    What is compiled is so before the first; the rows of the next one are read meanwhile.
    """
    warm_up(now)
    first = now.step
    for step, wait_s in feeding.prefetch(_steps(now)):
        started = time.perf_counter()
        take_bad(now, step)
        if step.index == first:
            described = now.objective.describe(step.batches)
            log.get_logger().info("step %d: %s", first + 1, described)
        numbers = train_step(now, step.batches)
        yield numbers | _speed(now, step, wait_s, time.perf_counter() - started + wait_s)


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
        done = max(checkpoint.steps(recipe.run / "checkpoints"), default=0) * recipe.global_batch
        order = run_folder.order_of(recipe, _files(recipe), done)
        now = build(recipe, order=order)
        metrics = _resume(now)
        logger.info("%s\n%s", summary(now), completed.render())
        enough = validate(now, metrics)
        with log.Progress("steps", total=now.num_steps - now.step) as progress:
            for numbers in updates(now) if enough is None else ():
                stopped = stop.agreed()
                if now.step % recipe.log_every == 0 or now.step == now.num_steps:
                    metrics.write(now.step, numbers)
                progress.update()
                if _due(now, recipe.checkpoint.every) or stopped or now.step == now.num_steps:
                    save(now)
                if stopped:
                    raise Interrupted(
                        f"stopped at step {now.step} of {now.num_steps}; checkpoint written. "
                        "The same command goes on from there"
                    )
                enough = validate(now, metrics)
                if enough is not None:
                    save(now)
                    break
        why = enough or "all steps are done"
        logger.info("the run ends at step %d: %s", now.step, why)
        metrics.close()
        if dist.is_main():
            if recipe.model.lora is not None:
                lora.save_adapter(now.model, now.folder / "adapter", recipe.model.id)
            run_folder.finish(recipe.run, now.step, why)
        dist.barrier()
    return recipe.run


def save(now: Run) -> None:
    """A checkpoint of this step, written by rank 0."""
    if dist.is_main():
        _checkpoint(now, now.folder / "checkpoints", now.recipe.checkpoint.keep)
    dist.barrier()


def _checkpoint(now: Run, folder: Path, keep: int) -> None:
    state = {"num_bad": now.num_bad, "guard": now.guard.state()}
    checkpoint.save(folder, now.step, now.model, now.optimizer, state, keep)


def validate(now: Run, metrics: tracking.Metrics) -> str | None:
    """Evaluates what is due and keeps the best step; why the run should end here, or None.

    Raises:
        RunError: an evaluation got worse than its guard allows; a checkpoint was written.
    """
    verdict = early_stopping.Verdict()
    if dist.is_main():
        metrics.show(now.step, evaluate(now))
        found = early_stopping.history(now.folder / "evals", now.step)
        verdict = early_stopping.judge(now.recipe, found, now.step)
        if verdict.best:
            best = now.folder / "best"
            _checkpoint(now, best / "checkpoints", keep=1)
            shutil.copyfile(now.folder / "recipe.yaml", best / "recipe.yaml")
    verdict = dist.from_main(verdict)
    for sentence in verdict.warnings:
        log.get_logger().warning("%s", sentence)
    if verdict.forgotten:
        save(now)
        raise RunError(
            f"{'; '.join(verdict.forgotten)}. The checkpoint of this step is kept; train on what "
            "is forgotten too, lower optim.lr, or allow more and start the same command again"
        )
    return verdict.stop


def evaluate(now: Run) -> dict[str, float]:
    """Runs what is due at this step and not done yet; writes evals/STEP.json and the answers."""
    due = {n: now.evaluators[n] for n, spec in now.recipe.evals.items() if _eval_due(now, spec)}
    for name in evals.measured(now.folder / "evals", now.step):
        due.pop(name, None)
    if not due:
        return {}
    now.model.eval()
    with compilation.evaluating(now.device, now.recipe.dtype):
        return evals.run_all(due, now.chat, now.folder / "evals", now.step)


def take_bad(now: Run, step: loader.Step) -> None:
    """Raises for the step's first bad sample, or lists them all and counts, as the recipe says."""
    found = [bad for of_rank in dist.gather_objects(step.bad) for bad in of_rank]
    if not found:
        return
    if now.recipe.data.on_bad_sample == "raise":
        raise found[0]
    listed = log.StepLog(now.folder, "bad_samples.jsonl")
    if dist.is_main():
        for bad in found:
            listed.append({"step": step.index + 1, "sample": bad.name, "reason": bad.reason})
    now.num_bad += len(found)
    seen = (step.index + 1) * now.recipe.global_batch
    # A share of very few samples says nothing: the cap counts from the first hundred on.
    if now.num_bad > now.recipe.data.max_bad_fraction * max(seen, 100):
        raise RunError(
            f"{now.num_bad} of the first {seen} samples are bad, more than "
            f"data.max_bad_fraction = {now.recipe.data.max_bad_fraction} allows; the last: "
            f"{found[-1]}. All are listed in {listed.path}"
        )


def summary(now: Run) -> str:
    """What trains on what, in a few lines."""
    recipe = now.recipe
    trained, all_ = count_parameters(now.model)
    return (
        f"{recipe.run}: {len(now.order):,} samples an epoch in {now.order.num_groups:,} groups, "
        f"{recipe.global_batch} a step, {now.num_steps:,} steps, from step {now.step}; "
        f"{trained:,} of {all_:,} parameters train, {recipe.dtype} on "
        f"{dist.world_size()} x {now.device.type}"
    )


def _steps(now: Run) -> Iterator[loader.Step]:
    def rows(units: Sequence[Any]) -> Sequence[Batch]:
        made: Sequence[Any] = now.objective.batches(units)
        if now.row_lengths:
            made = [feeding.pad(row, now.row_lengths) for row in made]
        return [feeding.pin(row) for row in made] if now.device.type == "cuda" else made

    return loader.steps(
        now.order,
        now.reader,
        rows,
        first=now.step,
        last=now.num_steps,
        global_batch=now.recipe.global_batch,
        total=now.total_samples,
        workers=now.recipe.data.workers,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )


def _resume(now: Run) -> tracking.Metrics:
    """Puts the newest checkpoint in place and cuts the logs back to it."""
    saved = checkpoint.steps(now.folder / "checkpoints")
    if saved:
        state = checkpoint.load(now.folder / "checkpoints", saved[-1], now.model, now.optimizer)
        now.step, now.num_bad = saved[-1], checkpoint.whole_number(state, "num_bad")
        now.guard.restore(state.get("guard"))
    dist.barrier()
    if not dist.is_main():
        return tracking.Metrics([])
    for name in ("bad_samples.jsonl", spikes.SKIPPED):
        log.StepLog(now.folder, name).truncate_after(now.step)
    return tracking.open_metrics(now.folder, now.step, now.recipe.wandb)


def _speed(now: Run, step: loader.Step, wait_s: float, seconds: float) -> dict[str, float]:
    counted = {
        "rows": len(step.batches),
        "samples": sum(batch.num_samples for batch in step.batches),
        "tokens": sum(batch.num_tokens for batch in step.batches),
    }
    summed = dist.sum_counts(counted)
    rows, samples, tokens = (int(summed[name]) for name in counted)
    limit = now.recipe.data.row_tokens or now.recipe.data.max_tokens
    packs = now.recipe.objective.packs
    return {
        "rows": rows,
        "samples": samples,
        "tokens": tokens,
        **({"fill": tokens / (max(1, rows) * limit)} if packs else {}),
        "samples_per_s": samples / seconds,
        "tokens_per_s": tokens / seconds,
        "data_wait_s": wait_s,
        "step_s": seconds,
        "memory_gib": memory.peak_memory_gib(now.device),
    }


def _eval_due(now: Run, spec: EvalConfig) -> bool:
    if now.step == 0:
        return spec.before or spec.guard is not None
    return now.step == now.num_steps or _due(now, spec.every)


def _due(now: Run, every: int) -> bool:
    return every > 0 and now.step % every == 0
