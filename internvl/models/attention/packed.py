"""Attention masks of packed rows, in the forms that attention kernels take.

    dense   bool (1, 1, L, L): the definition, for CPUs and to compare the fast paths with
    flex    FlexAttention over the 128 x 128 blocks of a row in which anything is seen
    flash   the same through FlashAttention 4's kernels, where that package is installed; a row
            whose documents have no branches by its kernel for documents of any length (flash4.py)

Documents and branches are contiguous, so the queries that see a key are contiguous as well: the key
itself up to the last token of its branch, or of its document where it is in the prefix. That one
number per key is the whole structure, and what a block holds follows from its smallest and largest.
"""

from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from internvl import log
from internvl.models.attention import flash4, per_document
from internvl.models.attention.per_document import DOCUMENTS

FLEX, FLASH = "internvl_flex", "internvl_fa4"
"""Names of the block-sparse attention among `transformers`' attention implementations, which takes
every name with "flash" in it for one of its own."""

TOWER = "internvl_fa4_tiles"
"""Name of FlashAttention 4's kernel for whole tiles."""

BLOCK = 128
"""Side of a block, in tokens; rows for `FLEX` and `FLASH` are a multiple of it."""

_FLASH_WIDTH = 128
"""Head size that FlashAttention 4 takes blocks for: on an H200 it was slower than Triton's kernel
for heads of 64 that share keys seven to one. Documents it takes at either size."""


def register() -> None:
    """Registers the names above with `transformers`; idempotent."""
    AttentionInterface.register(FLEX, flex_forward)
    AttentionInterface.register(FLASH, partial(flex_forward, backend="FLASH"))
    AttentionInterface.register(TOWER, tower_forward)
    # Masks come from `packed_mask`; what transformers makes itself (in `generate`) is sdpa's.
    for name in (FLEX, FLASH, TOWER):
        AttentionMaskInterface.register(name, sdpa_mask)


def has_flash(device: torch.device) -> bool:
    """True if FlashAttention 4 is installed and this GPU is one it is written for."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10) and _flash_works()


@cache
def _flash_works() -> bool:
    if not flash4.installed():
        return False
    try:
        import flash_attn.cute.interface  # noqa: F401
    except ImportError as error:
        # A beta, which nobody must have: an import error does not end a run.
        log.get_logger().warning("FlashAttention 4 is not used; it does not import: %s", error)
        return False
    return True


def packed_mask(
    implementation: str,
    document: Tensor,
    branch: Tensor,
    dtype: torch.dtype,
    starts: Tensor | None = None,
) -> BlockMask | Tensor:
    """Returns the attention mask of a packed row in the form that `implementation` takes.

    Args:
        document, branch: int64 (L,), as in a `PackedBatch`.
        dtype: of the attention scores, for a mask that is added to them ("eager").
        starts: int32 (D + 1,), as in a `PackedBatch`.
    """
    if (
        implementation == FLASH
        and starts is not None
        and _computes_in(dtype, starts) in flash4.HALF
    ):
        # Four dimensions, or transformers takes it for padding. Dynamic: any number of documents
        # runs the same code.
        mask = starts[None, None, None]
        torch._dynamo.maybe_mark_dynamic(mask, 3)
        return mask
    if implementation in (FLEX, FLASH):
        return block_mask(document, branch)
    if implementation == DOCUMENTS and per_document.saves(document):
        return per_document.documents_mask(document, branch)
    seen = dense_mask(document, branch)
    if implementation in ("eager", DOCUMENTS):
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return seen


def _computes_in(dtype: torch.dtype, like: Tensor) -> torch.dtype:
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def dense_mask(document: Tensor, branch: Tensor) -> Tensor:
    """bool (1, 1, L, L), true if a query (rows) may attend to a key (columns).

    document, branch: int64 (L,). A query sees itself and earlier positions of its own document
    that are in the prefix (branch 0) or in its own branch. Padding (documents below 0) likewise.
    """
    length = len(document)
    query = document.new_ones(length, length, dtype=torch.bool).tril_()
    same_document = document[:, None] == document[None, :]
    visible = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
    return (query & same_document & visible)[None, None]


def last_queries(document: Tensor, branch: Tensor) -> Tensor:
    """int64 (L,): the last query that sees each key. Key k is seen by k, k + 1, … last[k]."""
    position = torch.arange(len(document), device=document.device)

    def end_of_run(change: Tensor) -> Tensor:
        # No `nonzero`: its size would make the host wait for the GPU.
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
    # A block on the diagonal always holds keys after its queries, so it is never full.
    some.fill_diagonal_(True)

    last = last.to(torch.int32)  # FlashAttention's indices

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
    backend: Literal["TRITON", "FLASH"] = "TRITON",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention signature: (1, heads, L, head size) -> (1, L, heads, head size).

    Without one of the masks of `packed_mask` (when answers are generated) this is `transformers`'
    own "sdpa".
    """
    if isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int32:
        assert dropout == 0.0, "FlashAttention 4 drops no attention weights"
        q, k, v = (states[0].to(value.dtype).transpose(0, 1) for states in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mixed = flash4.attend(q, k, v, attention_mask[0, 0, 0], causal=True, scale=scale)
        return mixed[None], None
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert dropout == 0.0, "FlexAttention drops no attention weights"
    # Rotary embedding returns float32 if weights are; not every torch casts FlexAttention's inputs.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # Uncompiled, FlexAttention would hold all L x L scores.
    alone = query.is_cuda and not torch.compiler.is_compiling()
    kernel = _compiled_flex() if alone else flex_attention
    if query.shape[-1] != _FLASH_WIDTH or value.dtype not in flash4.HALF:
        backend = "TRITON"
    mixed = kernel(
        query,
        key,
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=True,
        kernel_options={"BACKEND": backend},
    )
    return mixed.transpose(1, 2), None


def tower_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same signature for whole tiles, (N, heads, T, head size) -> (N, T, heads, head size).

    FlashAttention 4 in 16 bits, for the heads it is used for and without dropout, else
    `transformers`' own "sdpa".
    """
    if value.dtype not in flash4.HALF or value.shape[-1] not in flash4.WIDTHS or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is None, "a tile's tokens see all of it"
    q, k, v = (states.to(value.dtype).transpose(1, 2) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return flash4.attend(q, k, v, None, causal=False, scale=scale), None
