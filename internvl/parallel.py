"""Where a model lives and computes. One device today; every function takes the same model and
returns it, so sharding over a mesh is a change of this file alone."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from internvl import dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def place(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """The model on its device: trained weights in float32, frozen ones in the compute type.

    Raises:
        ValueError: several ranks; sharding is not built yet.
    """
    if dist.world_size() > 1:
        raise ValueError("training on several ranks is not built yet; start one process")
    for parameter in model.parameters():
        kind = torch.float32 if parameter.requires_grad else DTYPES[dtype]
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, kind)
    return model.to(device)


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Matrix products in the compute type; nothing changes for float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a global norm of `max_norm`; returns the norm before."""
    return nn.utils.clip_grad_norm_(list(parameters), max_norm)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
