"""Selects the parts and blocks that train, and tells adapted layers from others.

Imports no PEFT: that takes half a second, and few models have adapters.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from internvl.errors import UserError

_HEADS = ("text_projection.", "image_pool.", "query_pool.", "itm_head.", "logit_scale")
PARTS = {
    "vision_tower": ("model.vision_tower.",),
    "multi_modal_projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "model.query_tokens.", "lm_head."),
    "queries": ("model.query_tokens.",),  # and the cross-attention, see `_owns`
    "heads": _HEADS,
    "lm_head": ("lm_head.",),
    **{name.removesuffix("."): (name,) for name in _HEADS},
}
"""Part -> the names it owns; the output matrix and InternVL-14B's queries belong to the language
model, and parts of it and of the heads have names of their own."""


def select_trainable(
    model: nn.Module, parts: Iterable[str] | str, last_vision_blocks: int | None = None
) -> None:
    """Sets the weights of `parts` to train and freezes all others.

    Args:
        parts: names of `PARTS`.
        last_vision_blocks: also train this many blocks at the end of the vision tower.

    Raises:
        UserError: a part that this model does not have, or more blocks than there are.
    """
    chosen = (parts,) if isinstance(parts, str) else tuple(parts)
    names = [name for name, _ in model.named_parameters()]
    # By weights rather than by family: InternVL-14B has parts that a chat model lacks.
    available = [part_name for part_name in PARTS if any(_owns(part_name, n) for n in names)]
    unknown = [part_name for part_name in chosen if part_name not in available]
    if unknown:
        raise UserError(f"unknown part {unknown[0]!r}; parts are {', '.join(available)}")
    trained = {name for part_name in chosen for name in names if _owns(part_name, name)}
    if last_vision_blocks:
        blocks = list(model.get_submodule("model.vision_tower.encoder.layer").children())
        if last_vision_blocks > len(blocks):
            raise UserError(
                f"the vision tower has {len(blocks)} blocks, cannot train the last "
                f"{last_vision_blocks}"
            )
        first = len(blocks) - last_vision_blocks
        last = tuple(f"model.vision_tower.encoder.layer.{i}." for i in range(first, len(blocks)))
        trained |= {name for name in names if name.startswith(last)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _owns(part_name: str, name: str) -> bool:
    # The cross-attention lies inside the language model's blocks, so no prefix names it.
    return name.startswith(PARTS[part_name]) or (part_name == "queries" and ".cross_attn." in name)


def is_adapted(module: nn.Module) -> bool:
    """Returns whether a module is one of PEFT's LoRA layers, all of which have `lora_A`."""
    return hasattr(module, "lora_A")


def has_adapters(model: nn.Module) -> bool:
    """Returns whether a model carries low-rank adapters."""
    return any(map(is_adapted, model.modules()))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Computes with the base weights alone inside; the adapters keep their values."""
    layers: list[Any] = [module for module in model.modules() if is_adapted(module)]
    # Not PEFT's `enable_adapters`, which also freezes the adapters.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
