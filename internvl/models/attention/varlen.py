"""Attention of a row's documents by torch's own FlashAttention 2, forward alone.

Any number of documents of any length is one kernel, and one graph where the caller is compiled:
FlexAttention builds another for each length of a row. On a CPU the same in plain float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from internvl.models.attention import flash4

_WIDEST = 256
"""Largest head size of the kernel."""


class Documents(NamedTuple):
    """Where the documents of a row are.

    starts: int32 (D + 1,), the first token of each, and the row's length. longest: int64 (), on the
    CPU, tokens of the longest.
    """

    starts: Tensor
    longest: Tensor


def supported(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """True if the kernel runs on this device, for this dtype and heads of this size."""
    if device.type != "cuda" or dtype not in flash4.HALF or width % 8 or width > _WIDEST:
        return False
    has_kernel = torch.backends.cuda.is_flash_attention_available()
    return has_kernel and torch.cuda.get_device_capability(device) >= (8, 0)


# Not `custom_op`, whose wrapper takes the processor 20 us a call.
_LIBRARY = torch.library.Library("internvl", "FRAGMENT")
# The longest document as a tensor: compiled code would be built anew for another int.
_LIBRARY.define(
    "documents(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor longest, float scale) -> Tensor"
)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """Returns what every token mixes of itself and earlier ones of its document, (L, heads, width).

    Args:
        q: (L, heads, width). k, v: (L, key heads, width).
    """
    return torch.ops.internvl.documents(q, k, v, *documents, scale)


@torch.library.impl(_LIBRARY, "documents", "CPU")
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: Tensor, scale: float) -> Tensor:
    return flash4.attend(q, k, v, starts, causal=True, scale=scale)


@torch.library.impl(_LIBRARY, "documents", "CUDA")
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: Tensor, scale: float) -> Tensor:
    most = int(longest)
    # Positional up to dropout, causal and debug mask: the names differ between versions.
    mixed = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, most, most, 0.0, True, False, scale=scale
    )
    return mixed[0].contiguous()  # its strides are the queries' otherwise


@torch.library.register_fake("internvl::documents", lib=_LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: Tensor, scale: float) -> Tensor:
    # Contiguous, as the operator returns it: a compiler plans memory by these strides.
    return q.new_empty(q.shape)
