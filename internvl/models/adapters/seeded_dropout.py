"""LoRA's dropout without a mask in memory: kernels regenerate it from a seed.

A's product reads the activations once, and the backward pass once more, for A's gradient and that
of the input. Drawing a mask, saving it and writing masked activations is a multiple of that
traffic, and a byte for every activation until the backward pass. A hash of position and seed
(lowbias32 of Wellons' hash-prospector, keyed before both multiplications) has 16 bits each for
columns k and k + K / 2; an entry is dropped if they are below rate * 2^16. A seed is the same mask
in all kernels.

Shapes: M rows, K inputs, an even number, R ranks; a seed is int32 (2,) on the device.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None


def used(x: Tensor) -> bool:
    """True if the Triton kernels support `x`: on CUDA, of even width."""
    return x.is_cuda and _HAS_TRITON and x.shape[-1] % 2 == 0


def possible(rate: float) -> float:
    """Returns `rate` rounded to the nearest multiple of 1/65536."""
    return _below(rate) / 2**16


def seed(device: torch.device) -> Tensor:
    """Draws a seed, int32 (2,), from torch's generator."""
    # On the device, so that recomputation (which restores the generator) draws the same mask and
    # the host does not wait.
    return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=device)


def mask(seed: Tensor, rows: int, inputs: int, rate: float) -> Tensor:
    """bool (M, K), true where the kernels drop an entry."""
    # int64 masked to 32 bits: torch has few operations on uint32.
    s0, s1 = (seed.long() & _WORD).unbind()
    h = torch.arange(rows * (inputs // 2), device=seed.device).view(rows, -1)
    h = (h + s0) & _WORD
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _WORD
    h = h ^ s1
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _WORD
    h = h ^ (h >> 16)
    return torch.cat([h & 0xFFFF, h >> 16], 1) < _below(rate)


_WORD = 0xFFFFFFFF


def _below(rate: float) -> int:
    return round(rate * 2**16)


# Not `custom_op`, whose wrapper took the processor 20 us a call: 3,000 calls in a micro-batch.
_LIBRARY = torch.library.Library("internvl", "FRAGMENT")
_LIBRARY.define("dropped_down(Tensor x, Tensor a, Tensor seed, float rate) -> Tensor")
_LIBRARY.define(
    "dropped_back(Tensor du, Tensor x, Tensor a, Tensor seed, float rate) -> (Tensor, Tensor)"
)


def down(x: Tensor, a: Tensor, seed: Tensor, rate: float) -> Tensor:
    """(x with dropout) A': x (M, K), A (R, K) -> (M, R)."""
    return torch.ops.internvl.dropped_down(x, a, seed, rate)


def back(du: Tensor, x: Tensor, a: Tensor, seed: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Gradients through A: of its input, (du A) with dropout, (M, K), and of A, float32 (R, K),
    du' times x with dropout.

    Args:
        du: (M, R).
        x: (M, K), with the factor 1 / (1 - rate) already.
        a: (R, K).
    """
    return torch.ops.internvl.dropped_back(du, x, a, seed, rate)


@torch.library.impl(_LIBRARY, "dropped_down", "CPU")
def _(x: Tensor, a: Tensor, seed: Tensor, rate: float) -> Tensor:
    return (x.masked_fill(mask(seed, len(x), x.shape[1], rate), 0) / (1 - rate)) @ a.t()


@torch.library.impl(_LIBRARY, "dropped_back", "CPU")
def _(du: Tensor, x: Tensor, a: Tensor, seed: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    gone = mask(seed, len(x), x.shape[1], rate)
    through = (du @ a).masked_fill(gone, 0) / (1 - rate)
    return through, du.t().float() @ x.masked_fill(gone, 0).float()


@torch.library.impl(_LIBRARY, "dropped_down", "CUDA")
def _(x: Tensor, a: Tensor, seed: Tensor, rate: float) -> Tensor:
    from internvl.models.adapters import seeded_dropout_triton

    return seeded_dropout_triton.down(x, a, seed, _below(rate), 1 / (1 - rate))


@torch.library.impl(_LIBRARY, "dropped_back", "CUDA")
def _(du: Tensor, x: Tensor, a: Tensor, seed: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    from internvl.models.adapters import seeded_dropout_triton

    return seeded_dropout_triton.back(du, x, a, seed, _below(rate), 1 / (1 - rate))


@torch.library.register_fake("internvl::dropped_down", lib=_LIBRARY)
def _(x: Tensor, a: Tensor, seed: Tensor, rate: float) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.register_fake("internvl::dropped_back", lib=_LIBRARY)
def _(du: Tensor, x: Tensor, a: Tensor, seed: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(a.shape, dtype=torch.float32)
