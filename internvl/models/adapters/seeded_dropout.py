"""LoRA's dropout without a mask in memory: computed again from a seed wherever it is applied.

Drawing a mask, saving it and applying it is a multiple of the memory traffic that A's product has,
and a byte for every activation until the backward pass. Here an entry is dropped if a hash of its
position and a seed (lowbias32 of Wellons' hash-prospector, keyed before both multiplications) is
below rate * 2^32. The hash is ten operations on int32 that the compiler fuses with what writes or
reads the activations anyway, so it costs their arithmetic alone.

Shapes: M rows, K inputs; a seed is int32 (2,) on the device.
"""

from typing import Any

import torch
from torch import Tensor


def used(x: Tensor) -> bool:
    """True in compiled code on CUDA: elsewhere each operation would be a pass over memory."""
    return x.is_cuda and torch.compiler.is_compiling()


def seed(device: torch.device) -> Tensor:
    """Draws a seed, int32 (2,), from torch's generator."""
    # On the device, so that recomputation (which restores the generator) draws the same mask and
    # the host does not wait.
    return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=device)


def mask(seed: Tensor, rows: int, inputs: int, rate: float, *, again: bool = False) -> Tensor:
    """bool (M, K), true where dropout at `rate` with this seed drops an entry.

    Args:
        again: compute the same mask by another expression. The compiler merges equal expressions,
            and would save what the forward pass has computed rather than compute it again.
    """
    row = torch.arange(rows, device=seed.device)[:, None] * inputs
    column = torch.arange(inputs, device=seed.device)
    if again:
        h = _as_int32(row) + (_as_int32(column) + seed[0])
    else:
        h = _as_int32(row + column) + seed[0]
    # int32 wraps as uint32 does; only a shift to the right needs its upper bits cleared.
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = h ^ seed[1]
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    # The hash's last step changes low bits only, which a comparison hardly sees.
    return h < round(rate * 2**32) - 2**31


def _as_int32(index: Tensor) -> Tensor:
    """int64 -> int32, wrapped, in generated code as well."""
    # There a range has the type of the kernel's indices whatever it is cast to: 64 bits where the
    # kernel is large or a width unknown, and the hash would not wrap. What an operation has made of
    # it is cast; this one costs nothing.
    return (index & -1).to(torch.int32)


def zeroed(x: Tensor, seed: Tensor, rate: float, *, again: bool = False) -> Tensor:
    """(…, K) -> the same with dropped entries zero, the others not scaled."""
    inputs = x.shape[-1]
    gone = mask(seed, x.numel() // inputs, inputs, rate, again=again)
    return torch.where(gone.view(x.shape), 0, x)


def drop(x: Tensor, seed: Tensor, rate: float) -> Tensor:
    """(…, K) -> the same with dropout; nothing but the seed is saved for the backward pass."""
    return _Drop.apply(x, seed, rate)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, rate: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.rate = rate
        return zeroed(x, seed, rate) / (1 - rate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return zeroed(gradient, seed, ctx.rate, again=True) / (1 - ctx.rate), None, None
