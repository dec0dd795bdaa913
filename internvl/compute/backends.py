"""Attention backend, compilation and row lengths that `compute:` resolves to on a device."""

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


def attention_kernels(backend: str, text: Any) -> dict[str, str]:
    """Returns the attention implementation of each of a chat model's configurations."""
    names = KERNELS[backend]
    # At other head sizes FlashAttention 4 is untested, and did not compile at 16.
    if backend == "flash" and configs.head_width(text) not in flash4.WIDTHS:
        names = names | {"text_config": packed.FLEX}
    return names


def available_compute(compute: ComputeConfig, device: torch.device) -> ComputeConfig:
    """Returns the settings, with `attention: auto` if this device has no FlashAttention 4."""
    if compute.attention == "flash" and not packed.has_flash(device):
        return replace(compute, attention="auto")
    return compute


def attention_backend(compute: ComputeConfig, device: torch.device) -> str:
    """Resolves `auto` to a backend for this device and checks that it is available.

    Raises:
        UserError: FlashAttention 4 is not installed, or the GPU is not one it is written for.
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
    """True if blocks are compiled: by default on a GPU alone."""
    return device.type == "cuda" if compute.compile is None else compute.compile


def row_lengths(compute: ComputeConfig, device: torch.device, data: DataConfig) -> tuple[int, ...]:
    """Returns the lengths that rows are padded to, ascending; empty if no backend needs them."""
    auto = compute.attention == "auto" and device.type == "cuda"
    if not (auto or compute.attention in KERNELS or is_compiled(compute, device)):
        return ()
    # FlexAttention takes multiples of a block, and compiled code is built once for each length.
    longest = data.row_tokens or data.max_tokens
    blocks = {math.ceil(longest * share / packed.BLOCK) for share in ROW_SHARES}
    return tuple(sorted(count * packed.BLOCK for count in blocks))


def math_attention(compute: ComputeConfig) -> AbstractContextManager[Any]:
    """Forces SDPA's math backend if the recipe says `compute.attention: eager`."""
    # A chat model has a setting for it; InternVL-14B calls torch's attention in many places.
    eager = compute.attention == "eager"
    return sdpa_kernel(SDPBackend.MATH) if eager else nullcontext()
