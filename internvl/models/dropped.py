"""LoRA's dropout where no mask lies in memory: kernels that make it from a seed as they go.

A's product, its gradient and the gradient of its input read the activations once each; drawing a
mask, keeping it, and writing the masked activations would be five times the traffic, and a byte for
every number of them until the backward pass. Entry (m, k) of M x K is dropped where a hash of
m K + k and the seed is below a share of 2^32 (lowbias32 of Wellons' hash-prospector, keyed before
both multiplications), so the same seed gives the same mask in every kernel.

Shapes: M rows, K inputs, R ranks; a seed is int32 (2,) on the device.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

_HAS_TRITON = find_spec("triton") is not None


def used(x: Tensor) -> bool:
    """Whether the kernels take the place of masks for such an input."""
    return x.is_cuda and _HAS_TRITON


def seed(device: torch.device) -> Tensor:
    """int32 (2,) from torch's generator: passes that draw the same numbers have the same masks."""
    return torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=device)


def mask(seed: Tensor, rows: int, inputs: int, rate: float) -> Tensor:
    """bool (M, K), true where an entry is dropped, as the kernels have it."""
    s0, s1 = (seed.long() & _WORD).unbind()
    h = torch.arange(rows * inputs, device=seed.device)
    h = (h + s0) & _WORD
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _WORD
    h = h ^ s1
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _WORD
    h = h ^ (h >> 16)
    return (h < _below(rate)).view(rows, inputs)


_WORD = 0xFFFFFFFF


def _below(rate: float) -> int:
    return round(rate * 2**32)


@torch.library.custom_op("internvl::dropped_down", mutates_args=())
def down(x: Tensor, a: Tensor, seed: Tensor, rate: float) -> Tensor:
    """(x with dropout) A': x (M, K), A (R, K) -> (M, R)."""
    if x.is_cuda:
        from internvl.models import dropped_kernels

        return dropped_kernels.down(x, a, seed, _below(rate), 1 / (1 - rate))
    return (x.masked_fill(mask(seed, len(x), x.shape[1], rate), 0) / (1 - rate)) @ a.t()


@down.register_fake
def _(x: Tensor, a: Tensor, seed: Tensor, rate: float) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("internvl::dropped_across", mutates_args=())
def across(du: Tensor, x: Tensor, seed: Tensor, rate: float) -> Tensor:
    """du' x where nothing is dropped, A's gradient where x has the factor 1 / (1 - rate) already:
    du (M, R), x (M, K) -> (R, K)."""
    if x.is_cuda:
        from internvl.models import dropped_kernels

        return dropped_kernels.across(du, x, seed, _below(rate))
    return du.t() @ x.masked_fill(mask(seed, len(x), x.shape[1], rate), 0)


@across.register_fake
def _(du: Tensor, x: Tensor, seed: Tensor, rate: float) -> Tensor:
    return x.new_empty(du.shape[1], x.shape[1])


@torch.library.custom_op("internvl::dropped_up", mutates_args=())
def up(du: Tensor, a: Tensor, seed: Tensor, rate: float) -> Tensor:
    """The input's gradient through A, (du A) with dropout: du (M, R), A (R, K) -> (M, K)."""
    if du.is_cuda:
        from internvl.models import dropped_kernels

        return dropped_kernels.up(du, a, seed, _below(rate), 1 / (1 - rate))
    return (du @ a).masked_fill(mask(seed, len(du), a.shape[1], rate), 0) / (1 - rate)


@up.register_fake
def _(du: Tensor, a: Tensor, seed: Tensor, rate: float) -> Tensor:
    return du.new_empty(du.shape[0], a.shape[1])
