"""Two forward passes of one step that draw the same random numbers; the first keeps no graph."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from internvl.compute import rng


def discard_saved_tensors() -> AbstractContextManager[None]:
    """Frees tensors saved for the backward pass at once: a forward pass that needs no graph."""
    # Not `no_grad`: under it compiled blocks are other code, which draws other random numbers.
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


def rng_state(device: torch.device) -> Tensor:
    """Returns the state of the device's random generator."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch inside and restores its generators afterwards; None does neither."""
    if seed is None:
        yield
        return
    with rng.preserve_rng(device):
        torch.manual_seed(seed)
        yield
