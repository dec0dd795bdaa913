"""Peak memory of a training step by component, worked out from a model on the meta device.

Weights, gradients and optimizer states are counted parameter by parameter here; what a micro-batch
keeps for the backward pass stands in activations.py, chat_activations.py and dual_activations.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from internvl.config import Recipe
from internvl.inference import families
from internvl.plan.activations import (
    BLOCK_BACK,
    BLOCK_FORWARD,
    LOGITS,
    OF_BLOCKS,
    Activations,
    adapted_layers,
    heaviest,
    is_fused,
)
from internvl.plan.chat_activations import ChatActivations
from internvl.plan.dual_activations import DualActivations, unreached
from internvl.plan.load import Load
from internvl.plan.shards import FORWARD, Shards
from internvl.plan.work import Work
from internvl.training import optim

GIB = 2**30
ABSMAX_BLOCK = 64
"""Weights that share a float32 scale in 4 bits (NF4 without double quantization)."""
MOMENT_BLOCK = 256
"""Values of an 8-bit moment that share a float32 scale (torchao)."""
CONTEXT_GIB = 0.6
"""What CUDA, cuBLAS and torch's kernels take before the first tensor. Assumed."""
SLACK = 0.04
"""Share of the activations that torch's allocator holds and does not use. Assumed."""


@dataclass(frozen=True)
class Footprint:
    """Bytes by component at the step's peak."""

    components: dict[str, float]
    overhead: dict[str, float]
    """What the GPU needs beyond what torch counts as allocated."""

    @property
    def allocated_gib(self) -> float:
        """What `torch.cuda.max_memory_allocated` would say."""
        return sum(self.components.values()) / GIB

    @property
    def total_gib(self) -> float:
        """What the GPU must have."""
        return self.allocated_gib + sum(self.overhead.values()) / GIB


def predict(
    model: Any,
    recipe: Recipe,
    load: Load,
    num_gpus: int = 1,
    fixed: dict[str, float] | None = None,
    cut: Shards | None = None,
) -> Footprint:
    """Predicts the memory that a step takes of each GPU, in bytes.

    Args:
        model: on the meta device, as `placement.to_device` leaves it.
        fixed: `states`, if they are counted already.
        cut: how weights are sharded; None: every GPU holds all of them.
    """
    fixed = states(model, recipe, cut) if fixed is None else fixed
    micro_batches = load.per_gpu(num_gpus)
    counted = activations_of(model, recipe, load.largest, micro_batches, sharded=cut is not None)
    if cut is None:
        moving = counted.components()
    else:
        fixed, moving = _sharded(fixed, counted, cut, micro_batches)
    components = {name: size for name, size in {**fixed, **moving}.items() if size}
    overhead = {
        # Weights and states are allocated once and leave no holes; only activations come and go.
        "allocator": SLACK * sum(moving.values()),
        "CUDA and kernels": CONTEXT_GIB * GIB,
    }
    return Footprint(components, overhead)


def _sharded(
    fixed: dict[str, float], counted: Activations, cut: Shards, micro_batches: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Adds what is whole for a while, at the moment of a step that takes most."""
    # The shards of a single micro-batch's gradients grow as its activations are freed.
    grown = fixed.pop("gradients") if micro_batches == 1 else 0.0
    moving = heaviest(_moments(counted, cut, micro_batches, grown))
    # Those of several micro-batches are there all the time: no moment's zero may stand for them.
    return fixed, {name: size for name, size in moving.items() if size}


def _moments(
    counted: Activations, cut: Shards, micro_batches: int, grown: float
) -> Iterator[dict[str, float]]:
    """Yields what a step with shards has beside weights and states, moment by moment."""
    begun, passing, tower = counted.until_language(), counted.passing(), counted.in_tower()
    heads = cut.head_gradients(micro_batches)
    # Before the backward pass no block is there that is run again.
    ended = _less(begun, counted.block())
    forward = {GATHERED: cut.gathered(cut.others, FORWARD)}
    if before := counted.before():
        yield before | {GATHERED: cut.gathered(cut.tower, FORWARD)}
    if BLOCK_FORWARD in passing:
        yield begun | forward | {BLOCK_FORWARD: passing[BLOCK_FORWARD]}
    # A block makes of its MLP's values going forward what it makes of their gradients going back.
    yield ended | forward | {"a block, forward": passing[BLOCK_BACK]}
    arriving = {GATHERED: cut.gathered(cut.others, 1), GRADIENTS: heads}
    yield ended | arriving | {LOGITS: passing[LOGITS]}
    # Of the language model's units the second that runs back, and the last. Without what is freed
    # until then, all gradients would meet activations that they follow upon.
    of_others = sum(unit.trained for unit in cut.others) / max(1, cut.trained)
    sent, own = cut.on_their_way(cut.others), cut.unit_gradients(cut.others)
    # Gradients that wait for those of another form are not sent yet, nor copied to be.
    unsent = (0.0, own - cut.sent(cut.others)) if counted.waits else (sent, own)
    of_second, of_last = (0.0, 0.0, *unsent), (counted.freed(), of_others, sent, own)
    for freed, share, before_it, its_own in (of_second, of_last):
        left = {GATHERED: cut.gathered(cut.others), "gradients": share * grown}
        back = {BLOCK_BACK: passing[BLOCK_BACK], GRADIENTS: heads + before_it}
        yield _less(begun, freed) | left | back
        yield _less(ended, freed) | left | {GRADIENTS: heads + its_own}
    held = {"gradients": grown, GATHERED: cut.gathered(cut.tower)}
    if tower:
        yield tower | held | {GRADIENTS: heads + cut.on_their_way(cut.tower)}
        # A tower of one unit has its gradients when its activations are gone.
        last = {} if len(cut.tower) == 1 else tower
        yield last | held | {GRADIENTS: heads + cut.unit_gradients(cut.tower)}
    yield {
        "gradients": grown,
        GATHERED: cut.gathered(()),
        "gradients of the root": cut.root_gradients(),
    }


def _less(components: dict[str, float], freed: float) -> dict[str, float]:
    """Returns components of which `freed` bytes of the language model's activations are gone."""
    return {
        name: max(0.0, size - freed) if name in OF_BLOCKS else size
        for name, size in components.items()
    }


GATHERED, GRADIENTS = "gathered weights", "gradients of a unit"


def activations_of(
    model: Any, recipe: Recipe, batch: Work, micro_batches: int = 1, *, sharded: bool = False
) -> Activations:
    """Returns what counts the activations of a micro-batch of the model's family.

    Args:
        batch: the micro-batch, padded.
        micro_batches: of a step on one GPU.
        sharded: whether units are gathered in the dtype of the computation.
    """
    if families.name_of(model.config) == "chat":
        return ChatActivations(model, recipe, batch, sharded=sharded)
    return DualActivations(model, recipe, batch, micro_batches, sharded=sharded)


def states(model: nn.Module, recipe: Recipe, cut: Shards | None = None) -> dict[str, float]:
    """Returns the bytes of weights, gradients and optimizer states, the same for every batch.

    Args:
        cut: how they are sharded; None: a GPU holds all.
    """
    sizes = dict.fromkeys(
        ("frozen weights", "quantized weights", "trained weights", "gradients", "optimizer states"),
        0.0,
    )
    quantized = _quantized(model) if recipe.model.quantize else set()
    # Muon has a momentum alone where AdamW has two moments.
    matrices = optim.hidden_matrices(model) if recipe.optim.name == "muon" else frozenset()
    idle = unreached(recipe)
    for name, parameter in model.named_parameters():
        share = 1.0 if cut is None else cut.share(parameter)
        if share < 1 and cut is not None and cut.offload:  # in the CPU's memory
            continue
        size = share * parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            sizes["trained weights"] += size
            if name.startswith(idle):  # without a gradient AdamW makes no state either
                continue
            sizes["gradients"] += size
            if not recipe.optim.offload:  # else the moments live in the CPU's memory
                moments = 1 if name in matrices else 2
                moment = share * _moment_size(parameter, recipe.optim.name)
                sizes["optimizer states"] += moments * moment
        elif id(parameter) in quantized:
            sizes["quantized weights"] += _quantized_size(parameter, str(recipe.model.quantize))
        else:
            sizes["frozen weights"] += size
    sizes["frozen weights"] += sum(b.numel() * b.element_size() for b in model.buffers())
    # Quantized weights stay packed, so nothing is fused with them.
    # Shards are not fused.
    if not recipe.model.quantize and cut is None:  # B once more, in the buffer it is fused with
        for layer in adapted_layers(model):
            weight = layer.base_layer.weight
            copy = layer.lora_B["default"].weight.numel() * weight.element_size()
            sizes["frozen weights"] += copy if is_fused(layer) else 0
    return sizes


def _moment_size(parameter: nn.Parameter, optimizer: str) -> float:
    """Bytes of one moment; torchao's 8-bit AdamW leaves small and odd tensors in float32."""
    count = parameter.numel()
    if optimizer == "adamw-8bit" and count >= 4096 and count % MOMENT_BLOCK == 0:
        return count * (1 + 4 / MOMENT_BLOCK)
    return count * parameter.element_size()


def _quantized(model: nn.Module) -> set[int]:
    """Ids of the weights that bitsandbytes packs: linear layers outside projector and output."""
    left_out = ("lm_head", "model.multi_modal_projector")
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(left_out) and "lora_" not in name
    }


def _quantized_size(weight: nn.Parameter, bits: str) -> float:
    """4 bits and a float32 for every ABSMAX_BLOCK of them; or 8 bits and a float32 a row."""
    count = weight.numel()
    return count * (0.5 + 4 / ABSMAX_BLOCK) if bits == "4bit" else count + 4 * weight.shape[0]
