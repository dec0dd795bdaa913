"""Attention of one token of every slot to the keys of its slot.

A decoding step reads every key and value once, and does little else: its time is memory's. On CUDA
a kernel of our own (decoding_triton.py) reads the keys that a slot has and no others, in parts that
all of the GPU's processors share; queries that share a key head are computed together, so that it
is read once for all of them.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None
WIDTHS = (32, 64, 128, 256)
"""Head sizes of the kernel."""


def supported(device: torch.device, width: int) -> bool:
    """True if the kernel runs on this device for heads of this size."""
    return device.type == "cuda" and _HAS_TRITON and width in WIDTHS


# Not `custom_op`, whose wrapper takes the processor 20 us a call.
_LIBRARY = torch.library.Library("internvl", "FRAGMENT")
_LIBRARY.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor position, float scale)"
    " -> Tensor"
)


def attend(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float) -> Tensor:
    """Returns what each slot's query mixes of its values, (B, heads, head size).

    Args:
        query: (B, heads, head size).
        key, value: (B, key heads, length, head size), rows of a head contiguous.
        position: int64 (B,): the last key that a slot sees.
    """
    return torch.ops.internvl.decode_attention(query, key, value, position, scale)


@torch.library.impl(_LIBRARY, "decode_attention", "CPU")
def _(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float) -> Tensor:
    batch, heads, width = query.shape
    seen = torch.arange(key.shape[2], device=key.device) <= position[:, None]
    shared = query.reshape(batch, key.shape[1], -1, width)
    mixed = F.scaled_dot_product_attention(
        shared, key, value, attn_mask=seen[:, None, None], scale=scale
    )
    return mixed.reshape(batch, heads, width)


@torch.library.impl(_LIBRARY, "decode_attention", "CUDA")
def _(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float) -> Tensor:
    from internvl.models.attention import decoding_triton

    # Triton launches on the current device, which layers of a spread model are not all on.
    with torch.cuda.device(query.device):
        return decoding_triton.attend(query, key, value, position, scale)


@torch.library.register_fake("internvl::decode_attention", lib=_LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
