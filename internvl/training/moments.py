"""Moments in 8 bits as plain tensors, which checkpoints cut and join like any other.

torchao keeps a moment as codes and a scale for each block of 256 values. Blocks that no shard cuts
are saved as they are, `NAME.codes` and `NAME.scale`; of a shape whose shards cut blocks the float32
values are saved. Imports torchao for moments that were saved in 8 bits alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from internvl.models.tensors import LazyTensor

CODES, SCALE = ".codes", ".scale"
_SMALLEST = 4096
"""Values of a shard from which torchao uses 8 bits."""


def is_packed(moment: Any) -> bool:
    """Returns whether this rank has a moment in 8 bits."""
    return hasattr(_local(moment), "codes")


def to_save(moments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the moments as plain tensors, those in 8 bits as two of them if they can be."""
    plain: dict[str, Any] = {}
    for name, moment in moments.items():
        if isinstance(moment, Tensor) and _has_whole_blocks(moment) and is_packed(moment):
            plain |= inner(name, moment)
        elif is_packed(moment):
            # Other ranks may have it in float32, and all must save one form.
            plain[name] = _like(moment, _local(moment).dequantize(), moment.shape)
        else:
            plain[name] = moment
    return plain


def inner(name: str, moment: Tensor) -> dict[str, Tensor]:
    """Returns codes and scales of a moment in 8 bits; they share its memory."""
    local = _local(moment)
    scales = torch.Size([moment.numel() // local.block_size])
    return {
        name + CODES: _like(moment, local.codes, moment.shape),
        name + SCALE: _like(moment, local.scale, scales),
    }


def to_load(
    moments: Mapping[str, Any], saved: Mapping[str, Any], stored: Callable[[], Mapping[str, Any]]
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Returns (tensors to load into, what to call once they are loaded).

    Args:
        moments: of the optimizer, which change in place.
        saved: by the names in the checkpoint.
        stored: returns lazy tensors of the checkpoint by name.
    """
    targets: dict[str, Any] = {}
    wide: dict[str, Tensor] = {}
    converted: list[str] = []
    for name, moment in moments.items():
        if name + CODES in saved:
            if is_packed(moment) and _has_whole_blocks(moment):
                # In place, so that codes come back as they were, not rounded once more.
                targets |= inner(name, moment)
            else:
                converted.append(name)
        elif is_packed(moment) and (isinstance(moment, DTensor) or len(saved[name].chunks) > 1):
            # Through float32: slices of a moment in 8 bits cannot be written.
            local = _local(moment)
            values = torch.empty(local.shape, device=local.device)
            wide[name] = targets[name] = _like(moment, values, moment.shape)
        else:
            targets[name] = moment

    @torch.no_grad()
    def finish() -> None:
        for name, values in wide.items():
            _local(moments[name]).copy_(_local(values))
        tensors = stored() if converted else {}
        for name in converted:
            _local(moments[name]).copy_(_values(name, moments[name], tensors))

    return targets, finish


def _values(name: str, moment: Tensor, tensors: Mapping[str, LazyTensor]) -> Tensor:
    """Returns this rank's float32 values of a moment that was saved in 8 bits."""
    from torchao.optim.subclass_8bit import OptimState8bit

    shape, first = tuple(moment.shape), 0
    if isinstance(moment, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            moment.shape, moment.device_mesh, moment.placements
        )
        first = offset[0]
    codes = tensors[name + CODES].rows(first, first + shape[0])
    scale = tensors[name + SCALE].read()
    # Rows may begin within a block, whose scale the rows before share.
    block = moment.numel() // len(scale)
    start = first * (moment.numel() // max(1, moment.shape[0]))
    blocks = (torch.arange(codes.numel()) + start) // block
    qmap = OptimState8bit.zeros((block,), signed=name.endswith("exp_avg"), block_size=block).qmap
    return (qmap[codes.flatten().long()] * scale[blocks]).view(shape)


def _has_whole_blocks(moment: Tensor) -> bool:
    """Returns whether every rank has whole blocks of a moment, and all of them in 8 bits."""
    if not isinstance(moment, DTensor):
        return True
    shards = 1
    for size, placement in zip(moment.device_mesh.shape, moment.placements, strict=True):
        shards *= size if isinstance(placement, Shard) else 1
    values, rest = divmod(moment.numel(), shards)
    # Uneven shards of rows would not be those of a list of scales.
    even = not rest and moment.shape[0] % shards == 0
    return even and values >= _SMALLEST and values % 256 == 0


def _local(moment: Any) -> Any:
    return moment.to_local() if isinstance(moment, DTensor) else moment


def _like(moment: Tensor, local: Tensor, shape: torch.Size) -> Any:
    """Returns this rank's values as a tensor that is sharded as `moment` is."""
    if not isinstance(moment, DTensor):
        return local
    # Stated, for a rank's values do not tell the shape of the whole.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, moment.device_mesh, moment.placements, run_check=False, shape=shape, stride=stride
    )
