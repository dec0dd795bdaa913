"""Triton kernels of seeded_dropout.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _hashed(seed, m, k, half):
    """32 random bits for row m and columns k and k + half, those of `seeded_dropout.mask`."""
    # lowbias32 with the second half of the seed between its multiplications.
    # A bit cast: the seed is signed, since torch draws no uint32.
    s0 = tl.load(seed).to(tl.uint32, bitcast=True)
    s1 = tl.load(seed + 1).to(tl.uint32, bitcast=True)
    h = (m.to(tl.uint32) * half)[:, None] + k.to(tl.uint32)[None, :] + s0
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = h ^ s1
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _zeroed(values, bits, below):
    # Not a mask of the load: neighbours that differ in it would be read one number at a time.
    return tl.where(bits >= below, values, 0.0).to(values.dtype)


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
    half: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    # Half the width a step: one hash has the bits of a column in each half.
    for start in range(0, half, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        bits = _hashed(seed, m, k, half)
        inside = (m < rows)[:, None] & (k < half)[None, :]
        in_weights = (k < half)[:, None] & (r < rank)[None, :]
        # 64 bits: rows times stride may be more than 2^31.
        entries = x + m.to(tl.int64)[:, None] * row_stride + k[None, :]
        weights = a + r[None, :] * (2 * half) + k[:, None]
        first = _zeroed(tl.load(entries, inside, other=0.0), bits & 0xFFFF, below)
        first_weights = tl.load(weights, in_weights, other=0.0)
        total = tl.dot(first, first_weights, total, input_precision=PRECISION)
        second = _zeroed(tl.load(entries + half, inside, other=0.0), bits >> 16, below)
        weights = tl.load(weights + half, in_weights, other=0.0)
        total = tl.dot(second, weights, total, input_precision=PRECISION)
    outputs = out + m.to(tl.int64)[:, None] * rank + r[None, :]
    # 1 / (1 - rate) once at the end rather than on every activation.
    total = (total * factor).to(out.dtype.element_ty)
    tl.store(outputs, total, (m < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def _back(
    du,
    x,
    a,
    seed,
    through,
    out,
    below,
    factor,
    rows,
    chunk,
    du_stride,
    row_stride,
    half: tl.constexpr,
    rank: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    chunk_index = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)
    in_weights = (r < rank)[:, None] & (k < half)[None, :]
    # A is read once and stays in registers; only activations and gradients stream by.
    weights = a + r[:, None] * (2 * half) + k[None, :]
    weights1 = tl.load(weights, in_weights, other=0.0)
    weights2 = tl.load(weights + half, in_weights, other=0.0)
    total1 = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    total2 = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(chunk_index * chunk, min(chunk_index * chunk + chunk, rows), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        bits = _hashed(seed, m, k, half)
        low, high = bits & 0xFFFF, bits >> 16
        inside = (m < rows)[:, None] & (k < half)[None, :]
        row = m.to(tl.int64)[:, None]
        in_gradient = (m < rows)[:, None] & (r < rank)[None, :]
        back = tl.load(du + row * du_stride + r[None, :], in_gradient, other=0.0)
        entries = x + row * row_stride + k[None, :]
        first = _zeroed(tl.load(entries, inside, other=0.0), low, below)
        total1 = tl.dot(tl.trans(back), first, total1, input_precision=PRECISION)
        second = _zeroed(tl.load(entries + half, inside, other=0.0), high, below)
        total2 = tl.dot(tl.trans(back), second, total2, input_precision=PRECISION)
        # The gradient of the input has the same mask: the bits are hashed once for both.
        up1 = _zeroed(tl.dot(back, weights1, input_precision=PRECISION) * factor, low, below)
        up2 = _zeroed(tl.dot(back, weights2, input_precision=PRECISION) * factor, high, below)
        to = through + row * (2 * half) + k[None, :]
        tl.store(to, up1.to(through.dtype.element_ty), inside)
        tl.store(to + half, up2.to(through.dtype.element_ty), inside)
    # A sum for each chunk of rows: atomic additions would round in another order each time.
    sums = out + (chunk_index * rank + r)[:, None] * (2 * half) + k[None, :]
    tl.store(sums, total1, in_weights)
    tl.store(sums + half, total2, in_weights)


def _shape(inputs: int, rank: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "half": inputs // 2,
        "rank": rank,
        "BLOCK_R": max(16, triton.next_power_of_2(rank)),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _plain(x: Tensor) -> Tensor:
    """Returns `x` with stride 1 along its rows, which the kernels assume."""
    return x if x.stride(-1) == 1 else x.contiguous()


def down(x: Tensor, a: Tensor, seed: Tensor, below: int, factor: float) -> Tensor:
    """x (M, K), A (R, K) -> (M, R)."""
    x, a, rows = _plain(x), a.contiguous(), len(x)
    out = x.new_empty(rows, len(a))
    # Small blocks for few rows, so that all of the GPU's processors have one.
    block = 32 if rows > 4096 else 16
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
            num_stages=4 if len(a) <= 64 else 2,
            **_shape(x.shape[1], len(a), x.dtype),
        )
    return out


_CHUNKS = 16
"""Chunks of rows whose sums are computed in parallel, then added in a fixed order."""


def back(
    du: Tensor, x: Tensor, a: Tensor, seed: Tensor, below: int, factor: float
) -> tuple[Tensor, Tensor]:
    """du (M, R), x (M, K), A (R, K) -> (M, K), float32 (R, K)."""
    du, x, a, rows = _plain(du), _plain(x), a.contiguous(), len(x)
    rank, inputs = a.shape
    through = x.new_empty((rows, inputs))
    if not rows:
        return through, x.new_zeros((rank, inputs), dtype=torch.float32)
    block_m, block_k = 32, 64
    chunk = triton.cdiv(triton.cdiv(rows, block_m), _CHUNKS) * block_m
    chunks = triton.cdiv(rows, chunk)
    sums = x.new_empty((chunks, rank, inputs), dtype=torch.float32)
    _back[(triton.cdiv(inputs // 2, block_k), chunks)](
        du,
        x,
        a,
        seed,
        through,
        sums,
        below,
        factor,
        rows,
        chunk,
        du.stride(0),
        x.stride(0),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=4 if rank <= 64 else 8,
        num_stages=3,
        **_shape(inputs, rank, x.dtype),
    )
    return through, sums.sum(0)
