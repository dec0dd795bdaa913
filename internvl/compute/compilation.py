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
    """Raises torch's limit of recompilations, so that every row length may have its code."""
    # At the default of 8 torch gives up and runs the block eagerly from then on.
    return torch._dynamo.config.patch(recompile_limit=64)


@contextmanager
def compiling(compute: ComputeConfig, device: torch.device) -> Iterator[None]:
    """Context for the first call of compiled blocks.

    Raises:
        UserError: FlashAttention 4 and this torch do not fit together.
    """
    try:
        with several_shapes():
            yield
    # TypeError: this torch calls FlashAttention 4 with the arguments of another version.
    except (BackendCompilerFailed, TypeError) as error:
        if attention_backend(compute, device) != "flash":
            raise
        raise UserError(
            "FlashAttention 4 does not run as this torch calls it "
            f"({str(error).strip().splitlines()[0]}): pip install 'internvl[flash]' for the tested "
            "version of flash-attn-4, or set compute.attention=flex"
        ) from error


def uncompiled() -> AbstractContextManager[None]:
    """Runs compiled blocks eagerly."""
    # Generation has another shape for every token: each would be recompiled.
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(device: torch.device, dtype: str) -> Iterator[None]:
    """Context of a run's evaluations, in the run and from outside: compiled blocks run eagerly,
    matrix products in the compute dtype."""
    with autocast(device, dtype), uncompiled():
        yield


@contextmanager
def compiled() -> Iterator[None]:
    """Re-enables compiled blocks inside `uncompiled()`, for rows of one length."""
    with torch.compiler.set_stance("default"), several_shapes():
        yield
