"""Device and dtype of weights and of matrix products."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def to_device(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """Moves the model to its device: trained weights in float32, frozen ones in `dtype`.

    Every rank has all of it, from the same files and seed. Before it is sharded `device` is where
    it is, so that no GPU has to hold all of it.
    """
    for parameter in model.parameters():
        weight_dtype = torch.float32 if parameter.requires_grad else DTYPES[dtype]
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, weight_dtype)
    return model.to(device)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Autocasts matrix products to `dtype`; does nothing for float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def synchronize(device: torch.device) -> None:
    """Waits until the GPU has run all queued kernels; returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets the number of CPU threads inside; None leaves it."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
