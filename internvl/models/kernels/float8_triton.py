"""The Triton kernel of float8_mlp.py: a program for each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _activate(
    states,
    gate,
    small,
    scales,
    columns,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # 64 bits: rows times columns may pass 2^31.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    x = tl.load(states + row * columns + column, inside, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(gate + row * columns + column, inside, other=0.0).to(tl.float32)
        y = x * g / (1.0 + tl.exp(-g))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    largest = tl.max(tl.abs(y), 0)
    # As `quantize`: a row that is not finite becomes one of NaN, and zeros have no logarithm.
    y = tl.where(largest < float("inf"), y, float("nan"))
    largest = tl.minimum(tl.maximum(largest, 7.888609052210118e-31), 1e37)
    # The exponent from the bits: logarithms are rounded, and scales must be powers of two.
    bits = (largest / 448.0).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    rounded = (y * inverse).to(small.dtype.element_ty)
    tl.store(small + row * columns + column, rounded, inside)
    tl.store(scales + row, scale)


def activate(states: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `float8_mlp.activate`."""
    states = states.contiguous()
    gate = None if gate is None else gate.contiguous()
    rows, columns = states.shape
    small = torch.empty_like(states, dtype=torch.float8_e4m3fn)
    scales = states.new_empty((rows, 1), dtype=torch.float32)
    width = triton.next_power_of_2(columns)
    _activate[(rows,)](
        states,
        states if gate is None else gate,
        small,
        scales,
        columns,
        GATED=gate is not None,
        COLUMNS=width,
        num_warps=max(4, min(16, width // 512)),
    )
    return small, scales
