"""Contexts for torch.compile: many shapes, first builds, eager stretches."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch._dynamo.exc import BackendCompilerFailed

from internvl.compute.backends import attention_backend
from internvl.compute.placement import autocast
from internvl.config import ComputeConfig
from internvl.errors import UserError


def several_shapes() -> AbstractContextManager[None]:
    """Lets torch keep the code for every row length; by itself it gives up at eight graphs."""
    return torch._dynamo.config.patch(recompile_limit=64)


@contextmanager
def compiling(compute: ComputeConfig, device: torch.device) -> Iterator[None]:
    """Inside, code is built for the first time.

    Raises:
        UserError: FlashAttention 4 and this torch do not go together, and what to do.
    """
    try:
        with several_shapes():
            yield
    except (BackendCompilerFailed, TypeError) as error:  # TypeError: called as another version is
        if attention_backend(compute, device) != "flash":
            raise
        raise UserError(
            "FlashAttention 4 does not run as this torch calls it "
            f"({str(error).strip().splitlines()[0]}): take another version of flash-attn-4, or do "
            "without it, compute.attention=flex"
        ) from error


def uncompiled() -> AbstractContextManager[None]:
    """Compiled blocks run as they are written: generation has a new shape for every token."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(device: torch.device, dtype: str) -> Iterator[None]:
    """How a run's evaluations compute, in the run and from outside: compiled blocks as they are
    written, matrix products in the compute type."""
    with autocast(device, dtype), uncompiled():
        yield


@contextmanager
def compiled() -> Iterator[None]:
    """Inside `uncompiled`, for rows of one length: compiled blocks are again."""
    with torch.compiler.set_stance("default"), several_shapes():
        yield
