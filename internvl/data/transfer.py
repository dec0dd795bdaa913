"""Carries units between processes: pickled, but with all of their pixels in one tensor."""

import io
import pickle
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def dump(value: Any) -> tuple[bytes, list[Tensor]]:
    """Pickles a value without its pixels; returns (pickle, uint8 tensors in its order)."""
    tensors: list[Tensor] = []
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)

    def outside(held: Any) -> Any:
        # Only pixels are uint8; all other values are small and are pickled.
        if not isinstance(held, Tensor) or held.dtype != torch.uint8:
            return None
        tensors.append(held)
        return held.shape

    pickler.persistent_id = outside  # type: ignore[method-assign]
    pickler.dump(value)
    return buffer.getvalue(), tensors


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of uint8 tensors together."""
    return sum(tensor.numel() for tensor in tensors)


def load(pickled: bytes, pixels: Tensor) -> Any:
    """Unpickles what `dump` pickled; its tensors share the memory of `pixels`, uint8 (bytes,)."""
    start = 0

    # Called in the order in which they were pickled, so that shapes alone say where each is.
    def view(shape: torch.Size) -> Tensor:
        nonlocal start
        end = start + shape.numel()
        viewed = pixels[start:end].view(shape)
        start = end
        return viewed

    unpickler = pickle.Unpickler(io.BytesIO(pickled))
    unpickler.persistent_load = view  # type: ignore[method-assign]
    return unpickler.load()
