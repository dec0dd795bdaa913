"""Runs a few steps of one rank of many on the device that is here: `rehearse.run(recipe, 64)`.

Weights are drawn, shards are those of training, rows are the data's first step as that rank would
get them, kernels and memory are real. The other ranks are torch's fake process group: it takes what
is sent and returns nothing, so there is no loss, and weights that would be gathered are whatever
memory held. Time between GPUs is not measured; the plan's rates stand for it.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from internvl import dist, log, plan, train
from internvl.check.rank_rows import RankRows
from internvl.compute import compilation, feeding, placement
from internvl.compute.storage_meter import StorageMeter
from internvl.config import Recipe
from internvl.data.records import Batch, PackedBatch
from internvl.data.sampler import SampleOrder
from internvl.data.sources import open_sources
from internvl.errors import UserError, counted
from internvl.inference import families
from internvl.inference import load as loading
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.inference.families import FAMILIES
from internvl.inference.opened import OpenedModel, open_start
from internvl.models.vision import set_drop_path
from internvl.objectives import OBJECTIVES
from internvl.objectives.stateless import Stateless
from internvl.parallel import fill, mesh
from internvl.plan import Plan, flops
from internvl.plan.costs import Costs, costs_of
from internvl.plan.memory import GIB
from internvl.plan.work import Work, work_of
from internvl.training import checkpoint
from internvl.training.run import building
from internvl.training.run.state import TrainState
from internvl.training.spikes import Guard
from internvl.zoo.gpus import Gpu

STEPS = 4
"""Steps of a rehearsal, two at least; the first one, which compiles and allocates, is not timed."""


@dataclass(frozen=True)
class Rehearsal:
    """What a rank took."""

    recipe: Recipe
    num_gpus: int
    device: str
    batches: tuple[Batch, ...]
    """Of the rank, in a step."""
    peak_bytes: float
    """Allocated by torch at most."""
    reserved_bytes: float
    """Held by torch's allocator, free memory of its blocks included; 0 on a CPU."""
    first_step_s: float
    """The step that compiles; not part of `step_s`."""
    step_s: float
    needed_flops: float
    """Of the rank, in a step; nothing that is computed again."""
    plan: Plan | None
    """Of the same step; None if no GPU of the table is meant."""

    @property
    def tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)

    @property
    def needed_gib(self) -> float:
        """What a GPU must have, GiB."""
        overhead = 0.0 if self.plan is None else sum(self.plan.memory.overhead.values())
        return (max(self.peak_bytes, self.reserved_bytes) + overhead) / GIB

    @property
    def fits(self) -> bool:
        """False if the GPU that is planned for is too small."""
        return self.plan is None or self.needed_gib <= self.plan.gpu.memory_gib

    def render(self) -> str:
        """Formats what was measured beside the plan."""
        return "\n".join(_lines(self))


def run(recipe: Recipe, num_gpus: int, gpu: Gpu | None = None, *, steps: int = STEPS) -> Rehearsal:
    """Takes `steps` steps as one of `num_gpus` ranks.

    Args:
        gpu: what to plan for beside it.

    Raises:
        UserError: this process is one of several already, or a model that is not rehearsed.
        RunError: out of memory; names row and remedy.
    """
    with standing_in(recipe, num_gpus) as rank:
        return rank.rehearse(gpu=gpu, steps=steps)


@dataclass(frozen=True)
class Rank:
    """One rank of many, with its model and optimizer on the device."""

    recipe: Recipe
    num_gpus: int
    start: OpenedModel
    costs: Costs
    order: SampleOrder
    state: TrainState

    def rehearse(
        self, recipe: Recipe | None = None, gpu: Gpu | None = None, *, steps: int = STEPS
    ) -> Rehearsal:
        """Takes `steps` steps of the rank that gets most of the first step.

        Args:
            recipe: with other data or another batch than the rank's own recipe.
            gpu: what to plan for beside it.

        Raises:
            RunError: out of memory; names row and remedy.
        """
        order, state = self.order, self.state
        # The rank's own data are open already.
        if recipe is None:
            recipe = self.recipe
        else:
            recipe = replace(loading.complete(recipe, self.start).recipe, evals={})
            order = _order(recipe)
        # Costs of the first recipe: they follow from model and checkpointing, not from data.
        with _timing("rows of the step read"):
            step = RankRows(recipe, self.start, order, self.costs, self.num_gpus)
            planned = None if gpu is None else plan.make(recipe, gpu, step.counted(), self.num_gpus)
            batches = _prepared(step.batches(), state)
        if not batches:
            raise UserError(
                "the first step has no good sample; `internvl check` lists the bad ones"
            )
        # It compiles what these rows need alone, and allocates the optimizer's states.
        with compilation.compiling(recipe.compute, state.device):
            first_step_s = _timed(state, batches, "first step taken")
        on_gpu = state.device.type == "cuda"
        with peak_bytes(state) as peak:
            seconds = [_timed(state, batches)]
        # On a CPU the meter slows the step.
        seconds = seconds if on_gpu else []
        missing = max(steps - 2, 1 - len(seconds))
        seconds += [_timed(state, batches) for _ in range(missing)]
        return Rehearsal(
            recipe,
            self.num_gpus,
            torch.cuda.get_device_name(state.device) if on_gpu else "this CPU",
            tuple(batches),
            peak[0],
            torch.cuda.max_memory_reserved(state.device) if on_gpu else 0.0,
            first_step_s,
            statistics.median(seconds),
            flops.count(state.model, _work(batches, state)).needed,
            planned,
        )


def _work(batches: Sequence[Any], state: TrainState) -> Work:
    return sum((work_of(batch, state.objective.weights) for batch in batches), start=Work())


@contextmanager
def standing_in(recipe: Recipe, num_gpus: int) -> Iterator[Rank]:
    """Makes this process one of `num_gpus` ranks of a run.

    Raises:
        UserError: this process is one of several already, or a model that is not rehearsed.
    """
    if distributed.is_initialized():
        raise UserError("a rehearsal is one process: start it without torchrun")
    if recipe.model.quantize is not None:
        raise UserError(
            "model.quantize: a rehearsal draws weights and does not quantize; use --plan, or "
            "model.quantize=null"
        )
    objective: Any = OBJECTIVES[recipe.objective.name]
    if objective.begin_run is not Stateless.begin_run:
        raise UserError(
            f"objective.name: {recipe.objective.name} measures its first model on all data before "
            "it trains, which a rehearsal with drawn weights does not; use --plan"
        )
    with _timing("configuration and tokenizer opened"):
        start = open_start(recipe)
    # A rehearsal measures steps; evaluations would need their data and a model that answers.
    recipe = replace(loading.complete(recipe, start).recipe, evals={})
    device = dist.init_from_env(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    with _timing("sources opened, costs counted"):
        order = _order(recipe)
        model = plan.model_of(recipe, _shape(recipe, start))
        costs = costs_of(recipe, model)
    saver = checkpoint.Saver(torch.device("cpu"))  # before there is a group, and never used
    with _stand_in(num_gpus):
        with _timing("model cut, weights drawn"):
            state = _state(recipe, start, model, order, device, saver)
            placement.synchronize(device)
        yield Rank(recipe, num_gpus, start, costs, order, state)


def _order(recipe: Recipe) -> SampleOrder:
    sources = open_sources(recipe.data)
    return SampleOrder(sources, share_prefix=recipe.shares_prefix, seed=recipe.seed)


def _shape(recipe: Recipe, start: OpenedModel) -> Any:
    """Reads the model's configuration, with the placeholder's id of its own tokenizer."""
    family, size = FAMILIES[start.files.family], recipe.data.tiling.size
    if family.name == "chat":
        return families.describe(start, image_size=size).config
    return family.read_config(start.files, size=size)


@contextmanager
def _timing(done: str) -> Iterator[None]:
    """Logs that a phase is done, and its seconds."""
    started = time.perf_counter()
    yield
    _log_phase(done, time.perf_counter() - started)


def _log_phase(done: str, seconds: float) -> None:
    # A rehearsal that is cut off was in the phase after the last line.
    log.get_logger().info("rehearsal: %s (%.1f s)", done, seconds)


def _timed(state: TrainState, batches: Sequence[Batch], done: str = "step taken") -> float:
    # What the stand-in leaves in gradients may be no numbers, and soon all weights would be none:
    # products of those take less power than weights do, and so less time.
    _draw(state.model, ())
    placement.synchronize(state.device)
    started = time.perf_counter()
    train.train_step(state, batches)
    placement.synchronize(state.device)
    seconds = time.perf_counter() - started
    _log_phase(done, seconds)
    return seconds


@contextmanager
def _stand_in(num_gpus: int) -> Iterator[None]:
    """Makes this process rank 0 of a group whose other ranks do not exist."""
    # One rank cuts nothing, with a group or without.
    if num_gpus == 1:
        yield
        return
    # Importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=num_gpus, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


class _Lenient(Guard):
    """A guard that lets everything pass: losses and norms mean nothing here."""

    def objection(self, step: int, loss: float, norm: float) -> str | None:
        return None

    def remember(self, loss: float, norm: float) -> None:
        """Does nothing."""


def _state(
    recipe: Recipe,
    start: OpenedModel,
    model: Any,
    order: SampleOrder,
    device: torch.device,
    saver: checkpoint.Saver,
) -> TrainState:
    """Builds the run of a rank, its model with drawn weights."""
    if recipe.model.drop_path:
        set_drop_path(model, recipe.model.drop_path)
    grid = mesh.build(recipe.parallel, device)
    # As training loads shards: cut on the meta device, so that none holds the whole model.
    building.prepare(model, recipe, device, grid)
    is_offloaded = grid is not None and recipe.parallel.offload == "cpu"
    buffers = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    fill.allocate(model, device, torch.device("cpu") if is_offloaded else device)
    _draw(model, buffers)
    handle: Chat | Dual
    if FAMILIES[start.files.family].name == "chat":
        description = families.describe(start)
        handle = Chat(
            model,
            start.tokenizer,
            description.template,
            recipe.data.tiling,
            description.system_message,
            start.folder,
        )
    else:
        handle = Dual(model, start.tokenizer, start.folder)
    state = building.assemble(recipe, handle, device, order, saver)
    # The recipe's would end the run at the first loss, which means nothing here.
    state.guard = _Lenient(recipe.guard)
    return state


@torch.no_grad()
def _draw(model: Any, buffers: Sequence[str]) -> None:
    """Draws this rank's weights; fills the named buffers, such as the frequencies of rotations."""
    # Zeros and infinities would compute faster than weights: a GPU spends less power on them.
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # Norms of 0.02 would make every block's output as good as zero.
        if local.dtype.itemsize > 1:
            local.fill_(1.0) if "norm" in name and local.ndim == 1 else local.normal_(0, 0.02)
    for name in buffers:
        model.get_buffer(name).fill_(0.01)


def _prepared(batches: Sequence[Any], state: TrainState) -> list[Any]:
    """Pads and pins batches as the training loop does."""
    # Padded first, which copies: the copy must be the one that is pinned.
    if state.row_lengths:
        batches = [feeding.pad(row, state.row_lengths) for row in batches]
    return [feeding.pin(row) for row in batches] if state.device.type == "cuda" else [*batches]


@contextmanager
def peak_bytes(state: TrainState) -> Iterator[list[float]]:
    """Measures the most memory that torch allocates on the run's device; fills in the list."""
    peak = [0.0]
    if state.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(state.device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(state.device)
        return
    # A fresh optimizer has none; one that has stepped does.
    moments = (v for held in state.optimizer.state.values() for v in held.values())
    with StorageMeter([*state.model.parameters(), *state.model.buffers(), *moments]) as meter:
        yield peak
    peak[0] = float(meter.peak)


def _lines(rehearsal: Rehearsal) -> Iterator[str]:
    recipe, planned = rehearsal.recipe, rehearsal.plan
    yield (
        f"rehearsal of one rank of {rehearsal.num_gpus} on {rehearsal.device} "
        f"(parallel.shard={recipe.parallel.shard}, replicas={recipe.parallel.replicas})"
    )
    samples = sum(batch.num_samples for batch in rehearsal.batches)
    tiles = sum(batch.num_tiles for batch in rehearsal.batches)
    unit_name = "row" if isinstance(rehearsal.batches[0], PackedBatch) else "micro-batch"
    plural = "rows" if unit_name == "row" else "micro-batches"
    yield (
        f"  the rank that has most of the first step: {counted(samples, 'sample')} in "
        f"{counted(len(rehearsal.batches), unit_name, plural)}, {rehearsal.tokens:,} tokens, "
        f"{counted(tiles, 'tile')}"
    )
    second = "" if planned is None else f"{'planned':>10}"
    yield f"    {'':<34}{'measured':>10}{second}"
    figures = [
        (
            "memory allocated at the peak, GiB",
            rehearsal.peak_bytes / GIB,
            None if planned is None else planned.memory.allocated_gib,
        ),
        (
            "step of a rank without messages, s",
            rehearsal.step_s,
            None if planned is None else planned.step_s - planned.component_s.get(_WAITING, 0.0),
        ),
    ]
    for name, measured, predicted in figures:
        second = "" if predicted is None else f"{predicted:>10.3g}"
        yield f"    {name:<34}{measured:>10.3g}{second}"
    yield f"  {rehearsal.tokens / rehearsal.step_s:,.0f} tokens/s a rank before messages"
    if planned is None:
        yield "  the time of messages between GPUs needs the rates of a GPU: name one with --gpu"
    else:
        yield from _beside(rehearsal, planned)
    yield "  no loss: the stand-in for the other GPUs returns nothing"


_WAITING = "waiting for messages"


def _beside(rehearsal: Rehearsal, planned: Plan) -> Iterator[str]:
    sending = sum(message.seconds for message in planned.messages)
    waiting = planned.component_s.get(_WAITING, 0.0)
    samples = planned.load.work.samples
    # The truth lies between: how much hides is an assumption.
    both = [samples / (rehearsal.step_s + extra) for extra in (waiting, sending)]
    share = rehearsal.needed_flops / rehearsal.step_s / 1e12
    yield (
        f"  {share:.3g} TFLOP/s of needed FLOPs, "
        f"{share / (planned.gpu.tflops * planned.gpu.products):.0%} of what products reach on "
        f"{planned.gpu.name}"
    )
    if planned.messages:
        yield (
            f"  messages: {sending:.2f} s a step by assumed rates; {samples:,.0f} samples at "
            f"{both[0]:.3g} samples/s on all GPUs if they hide behind the computation, "
            f"{both[1]:.3g} if none does"
        )
    left = planned.gpu.memory_gib - rehearsal.needed_gib
    # With what torch's allocator holds: a GPU must have that too.
    if rehearsal.fits:
        yield f"  fits {planned.gpu.name}: {left:.1f} of {planned.gpu.memory_gib:g} GiB are left"
    else:
        size = f"{planned.gpu.name} ({planned.gpu.memory_gib:g} GiB)"
        yield f"  DOES NOT FIT {size}: {-left:.1f} GiB too much"
        if planned.remedy:
            yield f"    {planned.remedy}"
