"""Attention, fast layers, fused adapters, recomputation and compilation, applied to a model."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from internvl.compute.backends import attention_backend, attention_kernels, is_compiled
from internvl.config import ComputeConfig
from internvl.models import kernels
from internvl.models.attention import packed, per_document
from internvl.models.trainable import has_adapters

_COMPILE = {"fallback_random": True}
"""Dropout's masks come from torch's own generator, which draws four numbers at a time; compiled
kernels spend as much on one number as on four, and were bound by it."""


def apply_compute(
    model: Any, device: torch.device, compute: ComputeConfig, *, sharded: bool = False
) -> None:
    """Sets attention, fast layers, fused adapters and recomputation, and compiles the blocks.

    Names and values of weights stay as they are, but for the frozen ones under `compute.float8`.

    Args:
        sharded: the model will be cut into shards, whose adapters are not fused.

    Raises:
        UserError: float8 products that this GPU does not have, or nothing frozen to use them for.
    """
    torch.set_float32_matmul_precision("high" if compute.tf32 else "highest")
    model.loss_chunk = compute.loss_chunk
    _set_attention(model, attention_backend(compute, device), device)
    kernels.apply(model, compute, device)
    # A fused base is a view of memory that it shares with B; a shard has memory of its own.
    if has_adapters(model) and not sharded:
        # Here: PEFT takes half a second, which full fine-tuning need not wait.
        from internvl.models.adapters import fused_lora

        # After float8, whose layers have no weight to fuse B with.
        fused_lora.fuse(model)
    if compute.checkpointing != "none":
        _checkpoint(model, 1 if compute.checkpointing == "full" else 2)
    if is_compiled(compute, device):
        for block in model.model.language_model.layers:
            # Rows have few lengths, captions many; a batch any number of tiles.
            block.compile(dynamic=model.family == "dual", options=_COMPILE)
        for block in model.model.vision_tower.encoder.layer:
            block.compile(dynamic=True, options=_COMPILE)


def _set_attention(model: Any, backend: str, device: torch.device) -> None:
    """Sets the attention backend of tower and language model; QLLaMA always calls torch's SDPA."""
    if model.family == "dual":
        if backend == "flash":
            packed.register()
            model.model.vision_tower.set_attn_implementation(packed.TOWER)
        return
    if backend in ("flex", "flash"):
        packed.register()
        model.set_attn_implementation(attention_kernels(backend, model.config.text_config))
    elif backend == "eager":
        # Eager already: GPT-OSS, whose attention sinks only its own code computes.
        text = "eager"
        if device.type == "cpu" and model.config.text_config._attn_implementation != "eager":
            per_document.register()
            text = per_document.DOCUMENTS
        model.set_attn_implementation({"text_config": text, "vision_config": "eager"})


def _checkpoint(model: Any, every: int) -> None:
    """Recomputes every `every`-th block in the backward pass, in the parts that gradients pass."""
    language, tower = model.model.language_model, model.model.vision_tower
    # A frozen chat language model saves as much as a trained one if the projector below it trains.
    for blocks, passed in (
        (language.layers, model if model.family == "chat" else language),
        (tower.encoder.layer, tower),
    ):
        if any(parameter.requires_grad for parameter in passed.parameters()):
            for block in blocks[::every]:
                recompute(block)


def recompute(block: nn.Module) -> None:
    """Makes the backward pass recompute what a block saves; only its inputs wait in memory."""
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            # By operation, which reaches those inside autograd functions, such as fused LoRA's:
            # without it the compiler would save what they save.
            kwargs["context_fn"] = _recompute_all
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    # Below `__call__`, where transformers does it, and so in the graph of a compiled block. Outside
    # of it the whole forward pass would run again; the compiler leaves out what only the output
    # needs, such as the MLP's last product: a quarter of a block's.
    block.forward = recomputed


def _recompute_all() -> Any:
    # A block whose graph ends early, as where it calls another unit of shards, is not traced as a
    # whole: torch then recomputes it as it does without a compiler.
    if torch._guards.TracingContext.try_get() is None:
        return nullcontext(), nullcontext()
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)
