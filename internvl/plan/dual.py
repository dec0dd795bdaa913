"""How long a step of InternVL-14B takes: what plan/ does for rows of conversations, for pairs.

What is computed is the needed FLOPs (dual_flops.py) with padding and every token of a caption with
every other, one more forward pass where a step is cut into micro-batches (gradient caching; not of
a frozen tower, whose output is kept), and what checkpointing computes again. The rates are those of
chat models. On an H200 the head recipe took 1.94 s a step (1.90 predicted), LoRA 6.1 s in four
micro-batches (5.2) and 7.1 s in one with checkpointing (6.3), beside other work on the host.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from internvl.config import Recipe
from internvl.models.vision import count_parameters
from internvl.plan import dual_flops, dual_footprint, flops
from internvl.plan.dual_flops import Captions, PairStep
from internvl.zoo import gpus
from internvl.zoo.gpus import CALIBRATION, Gpu

_CAPTION, _PADDED = 24, 40  # tokens of an assumed caption, and of the longest one beside it


@dataclass(frozen=True)
class PairLoad:
    """What a step on pairs of an image and a caption holds."""

    work: dual_flops.PairWork
    """Of a whole step, over all GPUs."""
    captions: Captions
    """Of the largest micro-batch."""
    pairs: int
    """Of a micro-batch."""
    rows: float
    """Micro-batches of a step, over all GPUs."""
    samples: int | None
    """In an epoch; None where the data are not known."""
    source: str
    """Where these numbers are from, for the reader."""

    @property
    def largest(self) -> str:
        """The micro-batch that memory is reckoned for, in words."""
        longest = max(self.captions.text, self.captions.match, self.captions.written)
        return f"micro-batch: {self.pairs:,} pairs, captions of {longest} tokens"


def load_of(recipe: Recipe, queries: int, step: PairStep | None, num_gpus: int = 1) -> PairLoad:
    """What a step on pairs holds, counted or assumed.

    Args:
        queries: of an image (Q).
    """
    each = math.ceil(recipe.batch_samples / num_gpus)
    pairs = min(each, recipe.pairs.micro_batch or each)
    rows = num_gpus * math.ceil(each / pairs)
    if step is not None:
        source = "counted in the first step, captions padded to its longest"
        return PairLoad(step.work, step.captions, pairs, rows, step.samples_an_epoch, source)
    terms = recipe.objective.term_weights
    text, match, written = (term in terms for term in ("itc", "itm", "itg"))
    matches = match * (2 if recipe.objective.name == "retrieval" else 1)

    def long(tokens: int) -> Captions:
        supervised = float(written * _CAPTION)
        return Captions(text * tokens, match * tokens, matches, written * tokens, supervised)

    work = long(_CAPTION).work(float(recipe.batch_samples), queries)
    source = f"assumed, for the data were not read: captions of {_CAPTION} tokens, {_PADDED} padded"
    return PairLoad(work, long(_PADDED), pairs, rows, None, source)


def times(
    recipe: Recipe, model: Any, load: PairLoad, gpu: Gpu, num_gpus: int, *, compiled: bool
) -> Iterator[tuple[str, float]]:
    """Seconds of a step by what it does, the loop's own share included.

    Padding counts, what gradient caching encodes first and what is computed again.
    """
    known = CALIBRATION
    rate = gpu.tflops * gpu.products * 1e12 * num_gpus
    copy = gpu.tb_per_s * gpu.copies * 1e12 * num_gpus
    number = 2 if recipe.dtype == "bfloat16" else 4
    slower = known.loop * number / 2
    queries, samples = model.num_queries, load.work.samples
    computed = dual_flops.count(model, load.captions.work(samples, queries))
    encoded = replace(load.captions, matches=0, written=0, supervised=0)
    first = dual_flops.count(model, encoded.work(samples, queries))
    micro_batches = round(load.rows / num_gpus)
    # The first go on from where the first pass left them.
    twice = max(0, micro_batches - recipe.pairs.kept_micro_batches)
    cached = twice / max(1, micro_batches) if load.captions.text else 0.0
    batch = dual_footprint.PairMemory(model, recipe, load.pairs, load.captions, compiled=compiled)
    seen_again = cached * (1 - batch.kept(twice) / batch.visual_tokens(max(1, twice)))
    share = {"none": 0.0, "selective": 0.5, "full": 1.0}[recipe.compute.checkpointing]
    vision, language = model.model.vision_tower, model.model.language_model
    again_seen, again = share * flops.trains(vision), share * flops.trains(language)

    def run(name: str, again: float) -> tuple[float, float]:
        """(FLOPs of the pass with gradient, those of the first pass)."""
        part: flops.Part = getattr(computed, name)
        before = seen_again if name.startswith("tower") else cached
        return part.needed + again * part.forward, before * getattr(first, name).forward

    products = [run("tower", again_seen), run("decoder", again), run("logits", 0.0)]
    mixing = [run("tower_attention", again_seen), run("decoder_attention", again)]
    yield "matrix products", slower * sum(full for full, _ in products) / rate
    yield "attention", slower * sum(full for full, _ in mixing) / known.attention / rate
    if cached:
        before = sum(p for _, p in products) + sum(p for _, p in mixing) / known.attention
        yield "first pass of gradient caching", slower * before / rate

    def kept(checkpointing: Literal["none", "full", "selective"]) -> float:
        compute = replace(recipe.compute, checkpointing=checkpointing, offload=False)
        made = replace(recipe, compute=compute)
        batch = dual_footprint.PairMemory(model, made, load.pairs, load.captions, compiled=compiled)
        return batch.language() + batch.blocks.tower(batch.shape)

    passes = known.passes * (1.0 if compiled else known.uncompiled) * (1 + (share + cached) / 3)
    states = (1 + seen_again) * batch.frozen_tower_states() + (1 + cached) * batch.frozen_states()
    moved = passes * kept("none") + known.tower_passes * states
    yield "pointwise", known.loop * moved * load.rows / copy
    if recipe.compute.offload:
        waits = 2 * kept(recipe.compute.checkpointing) * load.rows
        yield "copies to the CPU and back", waits / (known.bus_tb_per_s * 1e12 * num_gpus)
    trained, _ = count_parameters(model)
    offloaded = recipe.optim.offload
    yield from gpus.update_times(trained, load.rows, gpu, num_gpus, offloaded=offloaded)
