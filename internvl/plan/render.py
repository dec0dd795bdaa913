"""The result of a plan, and its text."""

from collections.abc import Iterator
from dataclasses import dataclass

from internvl.config import Recipe
from internvl.errors import counted
from internvl.plan.flops import Flops
from internvl.plan.load import Load
from internvl.plan.memory import GIB, Footprint
from internvl.plan.time import Message
from internvl.zoo.gpus import LINKS, Gpu

MEMORY_ERROR = 0.10
"""Stated error of the peak. What is allocated was within 5.1 % in eleven measured steps of chat
models, within 10 % in InternVL-14B's (benchmarks/results/memory_h200.json, dual_h200.json)."""
TIME_ERROR = 0.2
"""Stated error of the time on the GPU that was measured. Steps of a size of model that the rates
were not fitted to are met within 7 %; InternVL-14B's within 14 %, 2B full in float8 within 17 %."""
OTHER_TIME_ERROR = 0.4
"""The same on other GPUs, whose rates are scaled from their makers' figures."""


@dataclass(frozen=True)
class Plan:
    """Predicted memory and time of a run."""

    recipe: Recipe
    """Complete: every setting has a value."""
    gpu: Gpu
    num_gpus: int
    load: Load
    memory: Footprint
    flops: Flops
    """Of a step, over all GPUs."""
    component_s: dict[str, float]
    """Seconds of a step by component."""
    messages: tuple[Message, ...]
    """Collectives of a step between GPUs."""
    trained: int
    parameters: int
    remedy: str = ""
    """Settings that make it fit, if it does not."""
    inherited: str = ""
    """Settings of images and conversations and where each is from, one a line."""

    @property
    def fits(self) -> bool:
        return self.memory.total_gib <= self.gpu.memory_gib

    @property
    def step_s(self) -> float:
        return sum(self.component_s.values())

    @property
    def samples_per_s(self) -> float:
        return self.load.work.samples / self.step_s

    @property
    def share(self) -> float:
        """Needed FLOPs over those that the GPUs' matrix products reach in the same time."""
        rate = self.gpu.tflops * self.gpu.products * 1e12 * self.num_gpus
        return self.flops.needed / self.step_s / rate

    def render(self) -> str:
        """The prediction as text."""
        return "\n".join(_lines(self))


def _lines(plan: Plan) -> Iterator[str]:
    recipe, gpu, memory = plan.recipe, plan.gpu, plan.memory
    adapters = recipe.model.lora
    # Adapters train whatever `model.train` names besides: they say more about memory.
    method = f"training {', '.join(recipe.model.parts)}"
    if adapters is not None:
        method = f"LoRA of rank {adapters.rank}"
    if recipe.model.quantize:
        method += f" on {recipe.model.quantize} weights"
    if recipe.compute.float8:
        method += " with float8 products (their rate is an estimate)"
    yield (
        f"plan for {plan.num_gpus} x {gpu.name} ({gpu.memory_gib:g} GiB): {recipe.model.name}, "
        f"{method}, {plan.trained:,} of {plan.parameters:,} parameters train"
    )
    yield from plan.inherited.splitlines()
    yield f"  samples: {plan.load.source}"
    yield f"  largest {plan.load.largest_text}, checkpointing {recipe.compute.checkpointing}"
    yield f"  peak memory, GiB (error up to {MEMORY_ERROR:.0%})"
    yield from _table(memory.components, GIB)
    yield f"    {'allocated at the peak':<34}{memory.allocated_gib:8.2f}"
    yield from _table(memory.overhead, GIB)
    yield f"    {'in all':<34}{memory.total_gib:8.2f}"
    left = gpu.memory_gib - memory.total_gib
    # Closer to the limit than the prediction is true: neither answer is certain.
    near = abs(left) < MEMORY_ERROR * gpu.memory_gib
    doubt = "; within the error, so try one step first" if near else ""
    if plan.fits:
        yield f"  fits: {left:.1f} GiB are left{doubt}"
    else:
        yield f"  DOES NOT FIT: {-left:.1f} GiB too much{doubt}"
        yield f"    {plan.remedy}"
    # A GPU's own profile is worth more than its maker's figures.
    error = f"error up to {TIME_ERROR if gpu.measured else OTHER_TIME_ERROR:.0%}"
    yield f"  a step of {plan.load.work.samples:,.0f} samples, seconds ({error})"
    yield from _table(plan.component_s, 1.0)
    yield f"    {'in all':<34}{plan.step_s:8.2f}"
    yield (
        f"  {plan.samples_per_s:.3g} samples/s, "
        f"{plan.flops.needed / plan.load.work.samples / 1e12:.3g} TFLOP a sample, {plan.share:.0%} "
        f"of what matrix products reach ({gpu.tflops * gpu.products:.0f} TFLOP/s a GPU)"
    )
    if plan.load.samples is not None:  # unknown unless the data were read
        samples = plan.load.samples
        whole = recipe.num_samples(samples) / plan.samples_per_s
        yield (
            f"  an epoch of {samples:,} samples: {_duration(samples / plan.samples_per_s)}; "
            f"the run's {recipe.num_steps(samples):,} steps: {_duration(whole)}"
        )
    if recipe.optim.offload:
        yield f"  the CPU's memory holds {8 * plan.trained / GIB:.1f} GiB of moments for each GPU"
    # A user who trusts these times should know which were never measured.
    if not gpu.measured:
        yield f"  the rates of {gpu.name} are its maker's, times the shares an H200 reached"
    yield from _links(plan)


def _links(plan: Plan) -> Iterator[str]:
    """Yields where weights lie and what GPUs send each other."""
    parallel = plan.recipe.parallel
    if plan.num_gpus == 1:
        return
    if parallel.shard == "none":
        yield "  a copy of the model on every GPU (parallel.shard=none)"
    else:
        size = plan.num_gpus // parallel.replicas
        copies = counted(parallel.replicas, "copy", "copies")
        yield f"  {parallel.shard}: {copies} of the model, each over {size} GPUs"
    sent = ", ".join(f"{m.name} {m.sent / 1e9:.3g} GB" for m in plan.messages)
    total = sum(message.seconds for message in plan.messages)
    nodes = f"{LINKS.network_gb * 8:.0f} Gb/s a GPU between machines of {LINKS.gpus_per_node}"
    yield f"  each GPU sends a step: {sent}; {total:.2f} s by assumed rates:"
    yield (
        f"    {plan.gpu.link_gb:g} GB/s each way inside a machine, {nodes}, "
        f"{LINKS.share:.0%} of both reached"
    )
    if parallel.shard != "none":
        share = f"{LINKS.hidden:.0%}"
        yield f"    messages hide behind {share} of the computation, the rest is waited for"


def _table(components: dict[str, float], unit: float) -> Iterator[str]:
    # Largest first: what to change stands on top.
    for name, value in sorted(components.items(), key=lambda item: -item[1]):
        yield f"    {name:<34}{value / unit:8.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
