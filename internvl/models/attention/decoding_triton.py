"""Triton kernels of decoding.py: partial softmaxes over parts of the keys, then their sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PART = 256
"""Keys of a part. Less would write more partial sums, more would leave processors idle."""


@triton.jit
def _attend_part(
    query,
    key,
    value,
    position,
    sums,
    maxima,
    totals,
    scale,
    slot_stride,
    head_stride,
    parts,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(position + slot).to(tl.int32) + 1
    first = part * PART
    if first >= length:
        return
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    heads = tl.num_programs(1)
    # 64 bits: a cache has more than 2^31 numbers.
    base = slot.to(tl.int64) * slot_stride + head.to(tl.int64) * head_stride
    own = (slot * heads + head) * SHARED + row
    # A product takes at least 16 rows; those past the queries of this head are zeros.
    is_query = (row < SHARED)[:, None]
    q = tl.load(query + own[:, None] * WIDTH + column[None, :], is_query, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for step in range(0, PART, BLOCK):
        at = first + step + tl.arange(0, BLOCK)
        inside = (at < length)[:, None]
        entries = base + at[:, None] * WIDTH + column[None, :]
        k = tl.load(key + entries, inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where((at < length)[None, :], scores, float("-inf"))
        # The first block has a key, so this is finite ever after.
        higher = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(largest - higher)
        v = tl.load(value + entries, inside, other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(v.dtype), v)
        total = total * fade + tl.sum(weights, 1)
        largest = higher
    place = own * parts + part
    tl.store(sums + place[:, None] * WIDTH + column[None, :], mixed, is_query)
    tl.store(maxima + place, largest, row < SHARED)
    tl.store(totals + place, total, row < SHARED)


@triton.jit
def _add_parts(
    sums,
    maxima,
    totals,
    position,
    out,
    heads,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    length = tl.load(position + row // heads).to(tl.int32) + 1
    column = tl.arange(0, WIDTH)
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    mixed = tl.zeros((WIDTH,), dtype=tl.float32)
    for part in range(PARTS):
        place = row * PARTS + part
        # Parts past the slot's keys were not written.
        written = part * PART < length
        of_part = tl.load(maxima + place, written, other=float("-inf"))
        higher = tl.maximum(largest, of_part)
        fade, weight = tl.exp(largest - higher), tl.exp(of_part - higher)
        of_column = tl.load(sums + place * WIDTH + column, (column >= 0) & written, other=0.0)
        mixed = mixed * fade + of_column * weight
        total = total * fade + tl.load(totals + place, written, other=0.0) * weight
        largest = higher
    tl.store(out + row * WIDTH + column, (mixed / total).to(out.dtype.element_ty))


def attend(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float) -> Tensor:
    """See `decoding.attend`."""
    query = query.contiguous()
    batch, heads, width = query.shape
    key_heads, length = key.shape[1:3]
    shared = heads // key_heads
    parts = triton.cdiv(length, _PART)
    out = torch.empty_like(query)
    sums = query.new_empty((batch, heads, parts, width), dtype=torch.float32)
    maxima, totals = query.new_empty((2, batch, heads, parts), dtype=torch.float32).unbind()
    _attend_part[(batch, key_heads, parts)](
        query,
        key,
        value,
        position,
        sums,
        maxima,
        totals,
        scale,
        key.stride(0),
        key.stride(1),
        parts,
        PART=_PART,
        BLOCK=64,
        SHARED=shared,
        ROWS=max(16, triton.next_power_of_2(shared)),
        WIDTH=width,
        num_warps=4,
        num_stages=3,
    )
    _add_parts[(batch * heads,)](
        sums,
        maxima,
        totals,
        position,
        out,
        heads,
        PARTS=parts,
        PART=_PART,
        WIDTH=width,
        num_warps=2,
    )
    return out
