"""Attention, float8, fused adapters, recomputation and compilation, applied to a model."""

from typing import Any

import torch

from internvl.compute.backends import attention_backend, attention_kernels, is_compiled
from internvl.config import ComputeConfig
from internvl.models.adapters import fused_lora
from internvl.models.attention import packed, per_document
from internvl.models.chat import model as chat_model
from internvl.models.kernels import float8, last_mlp

_COMPILE = {"fallback_random": True}
"""Masks of dropout by torch's own generator, which makes four numbers at a time. Inside compiled
kernels every number costs as much as four, and those were bound by it."""


def apply_compute(model: Any, device: torch.device, compute: ComputeConfig) -> None:
    """Join adapters with their weights, choose attention, cut what no loss reads, choose what is
    computed again, and compile.

    Names and values of weights stay as they are, but for the frozen ones under `compute.float8`.

    Raises:
        UserError: float8 products that this GPU does not have, or nothing frozen to use them for.
    """
    torch.set_float32_matmul_precision("high" if compute.tf32 else "highest")
    model.loss_chunk = compute.loss_chunk
    packs = isinstance(model, chat_model.ChatModel)
    kind = attention_backend(compute, device)
    if packs and kind in ("flex", "flash"):
        packed.register()
        model.set_attn_implementation(attention_kernels(kind, model.config.text_config))
    elif kind == "flash":
        packed.register()
        model.model.vision_tower.set_attn_implementation(packed.TOWER)
    elif packs and kind == "eager":
        text = "eager"
        # What is so already needs more of its attention than scores (GPT-OSS's sinks).
        if device.type == "cpu" and model.config.text_config._attn_implementation != "eager":
            per_document.register()
            text = per_document.DOCUMENTS
        model.set_attn_implementation({"text_config": text, "vision_config": "eager"})
    if compute.float8:
        float8.freeze(model, device)
    fused_lora.join(model)  # with the weights that are left
    if packs:
        last_mlp.cut(model.model.language_model.layers)
    if compute.checkpointing != "none":
        _checkpoint(model, 1 if compute.checkpointing == "full" else 2)
    if is_compiled(compute, device):
        for block in model.model.language_model.layers:
            # Rows have few lengths, captions many.
            block.compile(dynamic=not packs, options=_COMPILE)
        for block in model.model.vision_tower.encoder.layer:
            block.compile(dynamic=True, options=_COMPILE)  # any number of tiles


def _checkpoint(model: Any, every: int) -> None:
    """Every `every`-th block of the parts that train is computed again in the backward pass."""
    for part in (model.model.language_model, model.model.vision_tower):
        if any(parameter.requires_grad for parameter in part.parameters()):
            part.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
            # transformers lets the embeddings ask for gradients, which only reentrant
            # checkpointing needs: everything below the first trained layer would be run back.
            part.disable_input_require_grads()
