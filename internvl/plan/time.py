"""How long a step takes: `seconds` by what a GPU does.

    time = loop x ( products / matmul rate + attention / its rates + bytes / memory rate ) + gaps

A product takes longer the shorter its sums are, and attention the narrower its heads. Gaps are what
the GPU loses between kernels, which counts in models as small as 1B. If the host takes longer to
start a step's kernels than the GPU to run them, as with 1B in 4 bits, the rest is a wait.

Products include padding, what checkpointing recomputes and, if a step of pairs is cut into
micro-batches, the first pass of gradient caching (not of a frozen tower, whose output is kept).
Bytes are the passes over activations, weights and optimizer states, and over what enters adapters
with dropout. The rates in `gpus.CALIBRATION` are fitted to chat models. On an H200 InternVL-14B's
head recipe took 1.94 s a step (1.92 predicted), LoRA 5.5 and 5.7 s in four micro-batches (5.2), and
7.1 s in one with checkpointing (6.1), beside other work on the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from internvl.config import Recipe
from internvl.models import configs
from internvl.models.vision import count_parameters
from internvl.plan import flops, memory
from internvl.plan.flops import Part
from internvl.plan.load import RECOMPUTED, Load, attention_of, is_compiled, runs_flash
from internvl.plan.shards import Shards
from internvl.plan.work import Sequences, Work
from internvl.zoo import gpus
from internvl.zoo.gpus import CALIBRATION, Gpu


@dataclass(frozen=True)
class Message:
    """A collective of a step."""

    name: str
    sent: float
    """Bytes that a GPU sends."""
    seconds: float


def messages(
    model: Any, load: Load, gpu: Gpu, num_gpus: int, cut: Shards | None
) -> Iterator[Message]:
    """Yields the collectives of a step, at the rates that `gpus.LINKS` states."""
    if cut is not None:
        for name, sent, group in cut.traffic(load.per_gpu(num_gpus)):
            yield Message(name, sent, sent / (gpu.link_gb_per_s(group) * 1e9))
    elif num_gpus > 1:
        trained, _ = count_parameters(model)
        sent = 2 * (num_gpus - 1) / num_gpus * 4.0 * trained
        yield Message("all-reduce", sent, sent / (gpu.link_gb_per_s(num_gpus) * 1e9))


def seconds(
    recipe: Recipe,
    model: Any,
    load: Load,
    gpu: Gpu,
    num_gpus: int,
    cut: Shards | None = None,
) -> Iterator[tuple[str, float]]:
    """Yields (what a step does, seconds), the loop's own share included.

    Args:
        cut: how weights are sharded; None: every GPU holds all of them.
    """
    computed = dict(_computation(recipe, model, load, gpu, num_gpus, cut))
    yield from computed.items()
    started = _Step(recipe, model, load, num_gpus).host_s() / num_gpus
    # The host runs ahead of the GPU as long as kernels take longer than their start.
    if started > sum(computed.values()):
        yield "waiting for the host", started - sum(computed.values())
    sending = sum(message.seconds for message in messages(model, load, gpu, num_gpus, cut))
    if not sending:
        return
    # Whole gradients are summed after the last row; units are sent while others are computed.
    hidden = 0.0 if cut is None else gpus.LINKS.hidden * sum(computed.values())
    # The first unit's gathering and the last one's sum hide behind nothing.
    units = 1 if cut is None else len(cut.units) + 1
    yield "waiting for messages", max(sending - hidden, sending / units)


def _computation(
    recipe: Recipe, model: Any, load: Load, gpu: Gpu, num_gpus: int, cut: Shards | None
) -> Iterator[tuple[str, float]]:
    step = _Step(recipe, model, load, num_gpus)
    rate = gpu.tflops * gpu.products * 1e12 * num_gpus
    copy = gpu.tb_per_s * gpu.copies * 1e12 * num_gpus
    # float32 products run at half the rate at best.
    slowdown = CALIBRATION.loop * step.activations.dtype_bytes / 2
    yield "matrix products", slowdown * step.products() * step.stretch() / rate
    yield "attention", slowdown * step.attention_of_heads() / rate
    if step.cached:
        yield "first pass of gradient caching", slowdown * step.first_pass() / rate
    forwards = recipe.objective.forwards(recipe, load.per_gpu(num_gpus))
    if forwards:
        again = step.forward(is_cut=cut is not None)
        yield "passes without gradients", slowdown * forwards * again / rate
    yield "pointwise", CALIBRATION.loop * step.moved_bytes() / copy
    yield "between kernels", step.launch_s() / num_gpus
    if step.dropped_bytes():
        yield "dropout of adapters", CALIBRATION.loop * step.dropped_bytes() / copy
    bus = CALIBRATION.bus_tb_per_s * 1e12 * num_gpus
    if recipe.compute.offload:  # there, and back for the backward pass
        yield "copies to the CPU and back", 2 * step.activations.waiting(load) / bus
    trained, _ = count_parameters(model)
    yield from gpus.update_times(
        trained,
        load.micro_batches,
        gpu,
        num_gpus,
        step.quantized_bytes(),
        updated=None if cut is None else trained - cut.trained * (1 - 1 / cut.num_shards),
        offloaded=recipe.optim.offload or recipe.parallel.offload == "cpu",
    )


def computed_flops(recipe: Recipe, model: Any, work: Work) -> float:
    """Returns the FLOPs of products that take as long as `work`: attention counts more, repeated
    passes count again."""
    step = _Step(recipe, model, Load(work, work, work, 1.0, None, ""), 1)
    return step.products() + step.attention()


class _Step:
    """FLOPs and bytes of a step over all GPUs, repeated ones included."""

    def __init__(self, recipe: Recipe, model: Any, load: Load, num_gpus: int) -> None:
        self.recipe, self.model, self.load = recipe, model, load
        self.activations = memory.activations_of(model, recipe, load.largest)
        self.computed = flops.count(model, load.computed)
        self.recomputed = RECOMPUTED[recipe.compute.checkpointing]
        """Share of the blocks that run forward twice."""
        per_gpu = load.per_gpu(num_gpus)
        twice = 0
        if load.largest.texts.count:  # the first ones go on from where the first pass left them
            twice = max(0, per_gpu - recipe.pairs.kept_micro_batches)
        self.cached = twice / max(1, per_gpu)
        """Share of a step that gradient caching encodes twice."""
        self.cached_tower = self.cached * (1 - self.activations.cached_visual_share(twice))
        """The same of the tower, whose output is kept if it is frozen."""

    def products(self) -> float:
        """FLOPs of matrix products, those in float8 as many as take their time in bfloat16."""
        whole, cut = (
            flops.last_mlp_flops(self.model, tokens)
            for tokens in (self.load.computed.rows.tokens, self.load.work.supervised)
        )
        # The last MLP runs on supervised positions alone.
        decoder = self._run("decoder") - self._in_bfloat16(whole, "decoder")
        decoder += self._in_bfloat16(cut, "decoder")
        return decoder + self._run("tower") + self.computed.logits.needed

    def stretch(self) -> float:
        """Time of the products over that of products of long sums."""
        parts = (self.computed.tower, self.computed.decoder, self.computed.logits)
        short, needed = (sum(getattr(p, name) for p in parts) for name in ("short", "needed"))
        return 1 + CALIBRATION.short * short / max(1.0, needed)

    def attention(self) -> float:
        """FLOPs of attention, as many as products would compute in its time."""
        flex = attention_of(self.recipe) == "flex"
        decoder = CALIBRATION.flex if flex else CALIBRATION.attention
        tower = self._run("tower_attention") / CALIBRATION.attention
        return self._run("decoder_attention") / decoder + tower

    def attention_of_heads(self) -> float:
        """The same by the width of the heads and the kernel that is there."""
        # Not in `attention`, by which ranks share out samples: that one is the same everywhere.
        if attention_of(self.recipe) != "flex":
            return self.attention()
        rate = CALIBRATION.flash if runs_flash(self.recipe.compute) else CALIBRATION.flex
        rate *= min(1.0, configs.head_width(self.model.config.text_config) / 128)
        tower = self._run("tower_attention") / CALIBRATION.attention
        return self._run("decoder_attention") / rate + tower

    def forward(self, *, is_cut: bool) -> float:
        """FLOPs of one more forward pass over all rows, as many as products would compute in its
        time.

        Args:
            is_cut: whether weights are sharded.
        """
        rows = self.computed
        products = rows.decoder.forward + rows.logits.forward
        attention = rows.decoder_attention.forward
        # A frozen tower runs once for all passes, but in each of them under shards, which this
        # model, on the meta device, does not know of.
        if is_cut or not self.model.repeats_vision_tokens:
            products += rows.tower.forward
            attention += rows.tower_attention.forward
        return products + attention / CALIBRATION.attention

    def first_pass(self) -> float:
        """FLOPs of what gradient caching encodes without gradient; matches and written captions
        have no features."""
        none = Sequences()
        work = replace(self.load.computed, matches=none, written=none, supervised=0.0)
        encoded = flops.count(self.model, work)
        tower, others = self.cached_tower, self.cached
        products = others * (encoded.decoder.forward + encoded.logits.forward)
        products += tower * encoded.tower.forward
        attention = others * encoded.decoder_attention.forward
        attention += tower * encoded.tower_attention.forward
        return products + attention / CALIBRATION.attention

    def moved_bytes(self) -> float:
        """Reads and writes of pointwise kernels."""
        compiled = is_compiled(self.recipe.compute)
        passes = CALIBRATION.passes * (1.0 if compiled else CALIBRATION.uncompiled)
        # Forward is a third of a step's passes, and what runs forward twice has one third more.
        passes *= 1 + (self.recomputed + self.cached) / 3
        states = self.activations.frozen_states(self.load, 1 + self.cached_tower, 1 + self.cached)
        return passes * self.activations.stored(self.load) + CALIBRATION.tower_passes * states

    def dropped_bytes(self) -> float:
        """Reads and writes of dropout before adapters."""
        lora = self.recipe.model.lora
        if lora is None or not lora.dropout:
            return 0.0
        values = self.computed.tower.adapted + self.computed.decoder.adapted
        values *= 1 + (self.recomputed + self.cached) / 3
        return CALIBRATION.dropped_passes * self.activations.dtype_bytes * values

    def launch_s(self) -> float:
        """Seconds that GPUs lose between a step's kernels."""
        seconds = CALIBRATION.launch_us * 1e-6 * self._num_products("launches")
        seconds *= 1.0 if is_compiled(self.recipe.compute) else CALIBRATION.uncompiled
        if self.recipe.model.quantize is not None:
            seconds += CALIBRATION.unpacking_us * 1e-6 * self._num_products("frozen_launches")
        return seconds

    def host_s(self) -> float:
        """Seconds in which the hosts start products with quantized weights."""
        if self.recipe.model.quantize is None:
            return 0.0
        return CALIBRATION.unpacking_host_us * 1e-6 * self._num_products("frozen_launches")

    def _num_products(self, count: str) -> float:
        """Products that a step runs, by a count of `flops.Part`."""
        components = (self.computed.tower, self.computed.decoder, self.computed.logits)
        again = 1 + (self.recomputed + self.cached) / 3
        return again * self.load.micro_batches * sum(getattr(c, count) for c in components)

    def quantized_bytes(self) -> float:
        """Bytes that quantized weights move for a row: read packed, written and read unpacked."""
        bits = self.recipe.model.quantize
        if bits is None:
            return 0.0
        packed = memory.states(self.model, self.recipe)["quantized weights"]
        weights = packed / (0.5625 if bits == "4bit" else 1.0)  # with the scale of a block
        return (2 + self.recomputed) * (packed + 4 * weights)

    def _run(self, component: str) -> float:
        return self._in_bfloat16(getattr(self.computed, component), component)

    def _in_bfloat16(self, part: Part, component: str) -> float:
        """FLOPs of a part with what is recomputed of it."""
        vision, language = self.model.model.vision_tower, self.model.model.language_model
        module = vision if component.startswith("tower") else language
        again = self.recomputed * flops.trains(module)  # frozen blocks keep nothing to recompute
        faster = part.float8 / max(1.0, part.needed) * (1 - 1 / CALIBRATION.float8)
        return (part.needed + again * part.forward) * (1 - faster)
