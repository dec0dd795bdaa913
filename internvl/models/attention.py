"""Which positions of a packed row see which, in the forms that attention kernels take.

    dense   bool (1, 1, L, L): the definition, for CPUs and as what the fast path is held to
    flex    FlexAttention over the 128 x 128 blocks of a row in which anything is seen

Documents and branches are contiguous, so the queries that see a key are contiguous as well: the key
itself up to the last token of its branch, or of its document where it is in the prefix. That one
number per key is the whole structure, and what a block holds follows from its smallest and largest.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLEX = "internvl_flex"
"""Name of the block-sparse attention among `transformers`' attention implementations."""

BLOCK = 128
"""Side of a block, in tokens; rows for `FLEX` are a multiple of it."""


def register() -> None:
    """Make `FLEX` known to `transformers`; doing it again changes nothing."""
    AttentionInterface.register(FLEX, flex_forward)
    AttentionMaskInterface.register(FLEX, sdpa_mask)


def packed_mask(
    implementation: str, document: Tensor, branch: Tensor, dtype: torch.dtype
) -> BlockMask | Tensor:
    """What `implementation` takes as the attention mask of a packed row.

    Args:
        document, branch: int64 (L,), as in a `PackedBatch`.
        dtype: of the attention scores, for a mask that is added to them ("eager").
    """
    if implementation == FLEX:
        return block_mask(document, branch)
    seen = dense_mask(document, branch)
    if implementation == "eager":
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return seen


def dense_mask(document: Tensor, branch: Tensor) -> Tensor:
    """bool (1, 1, L, L), true where a query (rows) may attend to a key (columns).

    document, branch: int64 (L,). A query sees itself and earlier positions of its own document
    that are in the prefix (branch 0) or in its own branch. Padding (document -1) sees padding.
    """
    length = len(document)
    query = document.new_ones(length, length, dtype=torch.bool).tril_()
    same_document = document[:, None] == document[None, :]
    visible = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    return (query & same_document & visible)[None, None]


def last_queries(document: Tensor, branch: Tensor) -> Tensor:
    """int64 (L,): the last query that sees each key. Key k is seen by k, k + 1, … last[k].

    Runs on the row's device without waiting for it.
    """
    position = torch.arange(len(document), device=document.device)

    def end_of_run(change: Tensor) -> Tensor:
        is_end = torch.cat([change, change.new_ones(1)])
        ends = torch.where(is_end, position, len(position))
        return ends.flip(0).cummin(0).values.flip(0)

    new_document = document[1:] != document[:-1]
    new_branch = new_document | (branch[1:] != branch[:-1])
    return torch.where(branch == 0, end_of_run(new_document), end_of_run(new_branch))


def block_mask(document: Tensor, branch: Tensor) -> BlockMask:
    """The same as `dense_mask`, for FlexAttention: blocks unseen, seen in part, seen in full.

    Raises:
        ValueError: the row is no multiple of `BLOCK` tokens.
    """
    length = len(document)
    if length % BLOCK:
        raise ValueError(f"a row of {length} tokens; FlexAttention takes multiples of {BLOCK}")
    last = last_queries(document, branch)
    nearest, farthest = last.view(-1, BLOCK).aminmax(dim=1)
    block = torch.arange(length // BLOCK, device=document.device)
    below = block[:, None] > block[None, :]
    first_query = block[:, None] * BLOCK
    full = below & (nearest[None, :] >= first_query + BLOCK - 1)
    some = below & (farthest[None, :] >= first_query) & ~full
    some.fill_diagonal_(True)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query <= last[key])

    return BlockMask.from_kv_blocks(
        *_listed(some),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool (Q, K) -> how many are true (1, 1, Q), and columns (1, 1, Q, K), true ones first."""
    numbers = blocks.sum(1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return numbers[None, None], columns.to(torch.int32)[None, None]


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def flex_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention signature: (1, heads, L, head size) -> (1, L, heads, head size).

    Without a `BlockMask` (when answers are generated) this is `transformers`' own "sdpa".
    """
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert dropout == 0.0, "FlexAttention drops no attention weights"
    # Rotation gives float32 where weights are; not every torch casts FlexAttention's inputs.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # Alone and uncompiled, FlexAttention would hold all L x L scores.
    alone = query.is_cuda and not torch.compiler.is_compiling()
    kernel = _compiled_flex() if alone else flex_attention
    mixed = kernel(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return mixed.transpose(1, 2), None
