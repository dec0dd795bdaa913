"""Triton's side of dropped.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kept(seed, index, below):
    """Whether entries of these numbers stay; `dropped.mask` is the same in torch."""
    s0 = tl.load(seed).to(tl.uint32, bitcast=True)
    s1 = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    h = index.to(tl.uint32) + s0
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = h ^ s1
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    return h >= below.to(tl.uint32)


@triton.jit
def _down(
    x,
    a,
    seed,
    out,
    below,
    factor,
    rows,
    row_stride,
    inputs: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (m < rows)[:, None] & (k < inputs)[None, :]
        values = tl.load(x + m.to(tl.int64)[:, None] * row_stride + k[None, :], inside, other=0.0)
        kept = _kept(seed, m.to(tl.int64)[:, None] * inputs + k[None, :], below)
        values = tl.where(kept, values, 0.0).to(x.dtype.element_ty)
        known = (k < inputs)[:, None] & (r < rank)[None, :]
        weights = tl.load(a + r[None, :] * inputs + k[:, None], known, other=0.0)
        total = tl.dot(values, weights, total, input_precision=PRECISION)
    place = out + m.to(tl.int64)[:, None] * rank + r[None, :]
    total = (total * factor).to(out.dtype.element_ty)
    tl.store(place, total, (m < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def _across(
    du,
    x,
    seed,
    out,
    below,
    rows,
    each,
    du_stride,
    row_stride,
    inputs: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(part * each, min(part * each + each, rows), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < rows)[:, None] & (k < inputs)[None, :]
        values = tl.load(x + m.to(tl.int64)[:, None] * row_stride + k[None, :], inside, other=0.0)
        kept = _kept(seed, m.to(tl.int64)[:, None] * inputs + k[None, :], below)
        values = tl.where(kept, values, 0.0).to(x.dtype.element_ty)
        known = (r < rank)[:, None] & (m < rows)[None, :]
        back = tl.load(du + m.to(tl.int64)[None, :] * du_stride + r[:, None], known, other=0.0)
        total = tl.dot(back, values, total, input_precision=PRECISION)
    place = out + (part * rank + r)[:, None] * inputs + k[None, :]
    tl.store(place, total, (r < rank)[:, None] & (k < inputs)[None, :])


@triton.jit
def _up(
    du,
    a,
    seed,
    out,
    below,
    factor,
    rows,
    du_stride,
    inputs: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    known = (m < rows)[:, None] & (r < rank)[None, :]
    back = tl.load(du + m.to(tl.int64)[:, None] * du_stride + r[None, :], known, other=0.0)
    known = (r < rank)[:, None] & (k < inputs)[None, :]
    weights = tl.load(a + r[:, None] * inputs + k[None, :], known, other=0.0)
    total = tl.dot(back, weights, input_precision=PRECISION)
    index = m.to(tl.int64)[:, None] * inputs + k[None, :]
    total = tl.where(_kept(seed, index, below), total * factor, 0.0).to(out.dtype.element_ty)
    tl.store(out + index, total, (m < rows)[:, None] & (k < inputs)[None, :])


def _common(x: Tensor, a: Tensor) -> dict[str, object]:
    rank = len(a)
    return {
        "inputs": a.shape[1],
        "rank": rank,
        "BLOCK_R": max(16, triton.next_power_of_2(rank)),
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }


def _plain(x: Tensor) -> Tensor:
    """With neighbours in a row next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def down(x: Tensor, a: Tensor, seed: Tensor, below: int, factor: float) -> Tensor:
    """x (M, K), A (R, K) -> (M, R)."""
    x, a, rows = _plain(x), a.contiguous(), len(x)
    out = x.new_empty(rows, len(a))
    # Few rows are shared by as many of the GPU's processors as there are.
    block = 64 if rows >= 4096 else 32 if rows >= 2048 else 16
    if rows:
        _down[(triton.cdiv(rows, block),)](
            x,
            a,
            seed,
            out,
            below,
            factor,
            rows,
            x.stride(0),
            BLOCK_M=block,
            BLOCK_K=128 if len(a) <= 64 else 64,
            num_warps=4,
            num_stages=4,
            **_common(x, a),
        )
    return out


_PARTS = 8
"""Sums over rows that are made side by side, then added in a fixed order."""


def across(du: Tensor, x: Tensor, seed: Tensor, below: int) -> Tensor:
    """du (M, R), x (M, K) -> (R, K)."""
    du, x, rows = _plain(du), _plain(x), len(x)
    rank, inputs = du.shape[1], x.shape[1]
    block_m, block_k = 64, 128 if rank <= 64 else 64
    each = triton.cdiv(triton.cdiv(rows, block_m), _PARTS) * block_m
    parts = triton.cdiv(rows, each) if rows else 0
    out = x.new_zeros if not parts else x.new_empty
    sums = out((max(1, parts), rank, inputs), dtype=torch.float32)
    if parts:
        _across[(triton.cdiv(inputs, block_k), parts)](
            du,
            x,
            seed,
            sums,
            below,
            rows,
            each,
            du.stride(0),
            x.stride(0),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=4,
            num_stages=4,
            inputs=inputs,
            rank=rank,
            BLOCK_R=max(16, triton.next_power_of_2(rank)),
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        )
    return sums.sum(0).to(x.dtype)


def up(du: Tensor, a: Tensor, seed: Tensor, below: int, factor: float) -> Tensor:
    """du (M, R), A (R, K) -> (M, K)."""
    du, a, rows = _plain(du), a.contiguous(), len(du)
    out = du.new_empty(rows, a.shape[1])
    block_m, block_k = 64, 128
    if rows:
        _up[(triton.cdiv(rows, block_m), triton.cdiv(a.shape[1], block_k))](
            du,
            a,
            seed,
            out,
            below,
            factor,
            rows,
            du.stride(0),
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=4,
            num_stages=1,
            **_common(du, a),
        )
    return out
