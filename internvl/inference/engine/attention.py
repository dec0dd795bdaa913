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

from internvl.models.attention import decoding, packed, per_document

ENGINE = "internvl_engine"
"""Its name among `transformers`' attention implementations."""


def register() -> None:
    """Registers `ENGINE` and the row kernels that it calls; idempotent."""
    packed.register()
    per_document.register()
    AttentionInterface.register(ENGINE, engine_forward)
    AttentionMaskInterface.register(ENGINE, sdpa_mask)


def row_kernel(device: torch.device) -> str:
    """Returns the implementation that packed rows attend with on this device."""
    if device.type != "cuda":
        return per_document.DOCUMENTS
    return packed.FLASH if packed.has_flash(device) else packed.FLEX


def row_mask(document: Tensor, dtype: torch.dtype, starts: Tensor) -> Any:
    """Returns the mask of a packed row for `engine_forward`.

    Args:
        document: int64 (T,), the request of every token.
        starts: int32 (requests + 1,), the first token of every request, and the row's length.
    """
    branch = torch.zeros_like(document)
    return packed.packed_mask(row_kernel(document.device), document, branch, dtype, starts)


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
            it sees, int64 (B,), or bool (B, 1, 1, keys).
    """
    if query.shape[2] > 1:
        # Rotary embedding returns float32 if its tables are.
        query, key = query.to(value.dtype), key.to(value.dtype)
        kernel = _KERNELS[row_kernel(query.device)]
        return kernel(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, _, width = query.shape
    if attention_mask.dim() == 1:
        scale = width**-0.5 if scaling is None else scaling
        token = query[:, :, 0].to(value.dtype)
        return decoding.attend(token, key, value, attention_mask, scale)[:, None], None
    shared = query.reshape(batch, key.shape[1], -1, width).to(value.dtype)
    mixed = F.scaled_dot_product_attention(
        shared, key, value, attn_mask=attention_mask, scale=scaling
    )
    return mixed.reshape(batch, 1, heads, width), None


def _rows_on_cpu(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return per_document.documents_forward(module, query, key, value, mask, **kwargs)


_KERNELS: dict[str, Any] = {
    per_document.DOCUMENTS: _rows_on_cpu,
    packed.FLEX: packed.flex_forward,
    packed.FLASH: packed.flex_forward,
}
