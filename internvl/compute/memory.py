"""Offloads tensors saved for the backward pass to the CPU; measures peak memory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from internvl.config import ComputeConfig

_LEAST_OFFLOADED = 4096  # bytes; smaller tensors stay where they are


@contextmanager
def offloaded(model: nn.Module, device: torch.device, compute: ComputeConfig) -> Iterator[None]:
    """Moves tensors saved for backward to the CPU if `compute.offload` is set; weights stay."""
    if not compute.offload:
        yield
        return
    weights: set[int] = set()

    def note(module: nn.Module, inputs: Any = None) -> None:
        tensors = chain(module.parameters(), module.buffers())
        whole = (tensor for tensor in tensors if not isinstance(tensor, DTensor))
        weights.update(tensor.untyped_storage().data_ptr() for tensor in whole)

    def copied(tensor: Tensor, home: torch.device) -> Tensor:
        # Compiled code asserts the strides of its inputs, which `.to` might change.
        pinned = device.type == "cuda" and home.type == "cpu"
        copy = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=home, pin_memory=pinned
        )
        # On the stream that computes: nothing is freed or read too early.
        return copy.copy_(tensor, non_blocking=True)

    def leave(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        stays = (
            tensor.device.type != device.type
            or tensor.nbytes < _LEAST_OFFLOADED
            or 0 in tensor.stride()
            or tensor.untyped_storage().data_ptr() in weights
        )
        return tensor if stays else (tensor.device, copied(tensor, torch.device("cpu")))

    def fetch(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return saved if isinstance(saved, Tensor) else copied(saved[1], saved[0])

    note(model)
    with ExitStack() as stack:
        for module in model.modules():
            # Gathered right before, its weights have memory of another address every time.
            if hasattr(module, "unshard"):
                hook = module.register_forward_pre_hook(note)
                stack.callback(hook.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(leave, fetch))
        yield


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory so far in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
