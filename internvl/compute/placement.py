"""Weights and products on their device and in their type."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def to_device(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """The model on its device: trained weights in float32, frozen ones in the compute type.

    Every rank has all of it, made from the same files and seed.
    """
    for parameter in model.parameters():
        kind = torch.float32 if parameter.requires_grad else DTYPES[dtype]
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, kind)
    return model.to(device)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Matrix products in the compute type; nothing changes for float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def synchronize(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Inside, so many CPU threads compute; None leaves them as they are."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
