"""Attention of a packed row document by document, for a CPU: the scores of N documents of at most T
tokens are N T² numbers instead of the L² of `packed.dense_mask`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DOCUMENTS = "internvl_documents"
"""Its name among `transformers`' attention implementations."""


def register() -> None:
    """Registers `DOCUMENTS` with `transformers`; idempotent."""
    AttentionInterface.register(DOCUMENTS, documents_forward)
    AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)


def saves(document: Tensor) -> bool:
    """True if N T² is less than L²: not for one long document among many short ones."""
    sizes = torch.unique_consecutive(document, return_counts=True)[1]
    return len(sizes) * int(sizes.max()) ** 2 < len(document) ** 2


def documents_mask(document: Tensor, branch: Tensor) -> Tensor:
    """`packed.dense_mask` by document: float32 (N, 1, T, T), added to scores, zero if a query
    may attend to a key. Documents shorter than T are padded with tokens that see nothing.
    """
    sizes = torch.unique_consecutive(document, return_counts=True)[1]
    positions = torch.arange(int(sizes.max()), device=document.device)
    is_token = positions < sizes[:, None]  # (N, T), false at padding
    branches = branch.new_full(is_token.shape, -1).masked_scatter_(is_token, branch)
    visible = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    visible &= (positions[:, None] >= positions) & is_token[:, :, None]
    mask = torch.zeros(visible.shape, device=document.device)
    # Not minus infinity: a row of padding would be NaN after softmax.
    return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)[:, None]


def documents_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention signature: (1, heads, L, head size) -> (1, L, heads, head size).

    Args:
        attention_mask: what `documents_mask` returns for the row, or the same for all of it as one
            document, (1, 1, L, L). With a mask of truth values or none (when answers are
            generated) this is `transformers`' own "sdpa".
    """
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert dropout == 0.0, "attention of documents drops no attention weights"
    num_documents, _, longest, _ = attention_mask.shape
    # A token sees at least itself, and padding nothing.
    is_token = attention_mask.diagonal(dim1=2, dim2=3).flatten() == 0
    indices = is_token.nonzero().squeeze(1)

    def split(states: Tensor) -> Tensor:
        """(1, heads, L, head size) -> (N, heads, T, head size)."""
        _, heads, _, size = states.shape
        rows = states.new_zeros(num_documents * longest, heads, size)
        rows = rows.index_copy(0, indices, states[0].transpose(0, 1))
        return rows.view(num_documents, longest, heads, size).transpose(1, 2)

    groups = query.shape[1] // key.shape[1]
    # Rotary embedding returns float32 if weights are.
    query, key, value = (split(states.to(value.dtype)) for states in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale + attention_mask
    mixed = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, indices)[None], None
