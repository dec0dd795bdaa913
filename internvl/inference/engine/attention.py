"""Attention of the engine's two passes, under one name among `transformers`' implementations.

A packed row attends as in training (`models/attention`). One token of every slot attends to its
slot's keys: queries that share a key stand as a query length, so that keys are read once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from internvl.models.attention import decoding, flash4, packed, per_document, varlen

ENGINE = "internvl_engine"
"""Its name among `transformers`' attention implementations."""


def register() -> None:
    """Registers `ENGINE` and the row kernels that it calls; idempotent."""
    packed.register()
    per_document.register()
    AttentionInterface.register(ENGINE, engine_forward)
    AttentionMaskInterface.register(ENGINE, sdpa_mask)


VARLEN = "varlen"
"""Name of `models/attention/varlen.py` beside those of the row kernels."""


def row_kernel(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Returns the implementation that packed rows attend with.

    Args:
        dtype: of keys and values. width: the size of a head.
    """
    if device.type != "cuda":
        return per_document.DOCUMENTS
    if packed.has_flash(device) and dtype in flash4.HALF and width in flash4.WIDTHS:
        return packed.FLASH
    return VARLEN if varlen.supported(device, dtype, width) else packed.FLEX


def takes_any_length(kernel: str) -> bool:
    """True if rows of all lengths run the same compiled code."""
    return kernel != packed.FLEX


def padded(kernel: str, total: int) -> int:
    """Returns the length that a row of `total` tokens is padded to."""
    if kernel == per_document.DOCUMENTS:
        return total
    # A row of one token would be compiled for itself.
    step = 16
    if kernel == packed.FLEX:
        # Few lengths, since kernels are built for each: powers of two in four steps.
        step = max(packed.BLOCK, 2 ** (max(1, total - 1).bit_length() - 3))
    return -(-total // step) * step


def row_mask(kernel: str, document: Tensor, dtype: torch.dtype, starts: Tensor, size: int) -> Any:
    """Returns the mask of a packed row for `engine_forward`.

    Args:
        kernel: of `row_kernel`.
        document: int64 (T,), the request of every token.
        starts: int32 (requests + 1,), the first token of every request, and the row's length.
        size: tokens of the longest request.

    Returns:
        None for one request alone on a CPU: plain causal attention.
    """
    if kernel == per_document.DOCUMENTS and len(starts) == 2:
        return None
    if kernel == VARLEN:
        return varlen.Documents(starts, torch.tensor(size))
    branch = torch.zeros_like(document)
    return packed.packed_mask(kernel, document, branch, dtype, starts)


def engine_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention signature: (B, heads, T, head size) -> (B, T, heads, head size).

    Args:
        attention_mask: of `row_mask`, B 1; or for one token of every slot the last position that
            it sees, int64 (B,), or the keys that each of T tokens sees, bool (B, 1, T, keys).
    """
    length, width = query.shape[2:]
    scale = width**-0.5 if scaling is None else scaling
    if isinstance(attention_mask, varlen.Documents):
        q, k, v = (states[0].to(value.dtype).transpose(0, 1) for states in (query, key, value))
        return varlen.attend(q, k, v, attention_mask, scale)[None], None
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool:
        return _attend_masked(query, key, value, attention_mask, scaling), None
    if length > 1 or attention_mask is None:
        # Rotary embedding returns float32 if its tables are.
        query, key = query.to(value.dtype), key.to(value.dtype)
        kernel = packed.flex_forward if query.is_cuda else per_document.documents_forward
        return kernel(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    token = query[:, :, 0].to(value.dtype)
    return decoding.attend(token, key, value, attention_mask, scale)[:, None], None


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float | None
) -> Tensor:
    """Attends with keys that are masked by `seen`: (B, T, heads, head size)."""
    batch, heads, length, width = query.shape
    shared = query.reshape(batch, key.shape[1], -1, width).to(value.dtype)
    groups = heads // key.shape[1]
    # Queries of a group follow each other, T of each; a single one broadcasts by itself.
    if groups > 1 and length > 1:
        seen = seen[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)
    mixed = F.scaled_dot_product_attention(shared, key, value, attn_mask=seen, scale=scaling)
    return mixed.reshape(batch, heads, length, width).transpose(1, 2)
