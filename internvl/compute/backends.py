"""The attention backend and the row lengths that `compute:` stands for on a device."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl.config import ComputeConfig, DataConfig
from internvl.data.packing import ROW_SHARES
from internvl.errors import UserError
from internvl.models import configs
from internvl.models.attention import flash4, packed

KERNELS = {
    "flex": {"text_config": packed.FLEX},
    "flash": {"text_config": packed.FLASH, "vision_config": packed.TOWER},
}


def attention_kernels(kind: str, text: Any) -> dict[str, str]:
    """What the parts of a chat model attend with, by the names of their configurations."""
    names = KERNELS[kind]
    if kind == "flash" and configs.head_width(text) not in flash4.WIDTHS:
        names = names | {"text_config": packed.FLEX}
    return names


def available_compute(compute: ComputeConfig, device: torch.device) -> ComputeConfig:
    """The same settings, attention chosen anew where this device has no FlashAttention 4."""
    if compute.attention == "flash" and not packed.has_flash(device):
        return replace(compute, attention="auto")
    return compute


def attention_backend(compute: ComputeConfig, device: torch.device) -> str:
    """What `auto` stands for on this device, and what was asked for is there.

    Raises:
        UserError: FlashAttention 4 is asked for and not there.
    """
    if compute.attention == "flash" and not packed.has_flash(device):
        raise UserError(
            "compute.attention: flash needs FlashAttention 4 and a GPU of compute capability 9 or "
            "10 (Hopper, Blackwell): pip install 'internvl[flash]', or compute.attention=flex"
        )
    if compute.attention != "auto":
        return compute.attention
    if device.type != "cuda":
        return "dense"
    return "flash" if packed.has_flash(device) else "flex"


def is_compiled(compute: ComputeConfig, device: torch.device) -> bool:
    return device.type == "cuda" if compute.compile is None else compute.compile


def row_lengths(compute: ComputeConfig, device: torch.device, data: DataConfig) -> tuple[int, ...]:
    """Lengths that rows are padded to, ascending; none where any length does."""
    auto = compute.attention == "auto" and device.type == "cuda"
    if not (auto or compute.attention in KERNELS or is_compiled(compute, device)):
        return ()
    longest = data.row_tokens or data.max_tokens
    blocks = {math.ceil(longest * share / packed.BLOCK) for share in ROW_SHARES}
    return tuple(sorted(number * packed.BLOCK for number in blocks))


def math_attention(compute: ComputeConfig) -> AbstractContextManager[Any]:
    """torch's own attention inside writes its scores out, where the recipe says so.

    A chat model is told by `arrange`; InternVL-14B calls torch's attention in many places.
    """
    eager = compute.attention == "eager"
    return sdpa_kernel(SDPBackend.MATH) if eager else nullcontext()
