"""Contexts for torch.compile: many shapes, first builds, eager stretches."""

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch._dynamo.exc import BackendCompilerFailed

from internvl.compute.backends import attention_backend
from internvl.compute.placement import autocast
from internvl.config import ComputeConfig
from internvl.errors import UserError


def tracing() -> AbstractContextManager[None]:
    """Settings under which blocks are traced: every row length may have its code, and numbers that
    modules hold are constants."""
    return torch._dynamo.config.patch(
        # At the default of 8 torch gives up and runs the block eagerly from then on.
        recompile_limit=64,
        # Of blocks in shards torch would make them inputs of the graph wherever sizes may change:
        # kernels that know no head width, code in its cache that it cannot find again.
        specialize_int=True,
        specialize_float=True,
        # Layers that share a product or a mask keep it for one another, in a recomputed block too:
        # what they kept is in the graph, and is empty again when the block ends.
        skip_fwd_side_effects_in_bwd_under_checkpoint=True,
    )


def _is_of_flash(error: BaseException) -> bool:
    """True if code of FlashAttention, or of torch's calls of it, raised the error or its cause."""
    causes = (getattr(error, "inner_exception", None), error.__cause__)
    frames = traceback.extract_tb(error.__traceback__)
    files = (Path(frame.filename) for frame in frames)
    return any("flash_attn" in file.parts or "flash" in file.name for file in files) or any(
        _is_of_flash(cause) for cause in causes if cause is not None
    )


@contextmanager
def compiling(compute: ComputeConfig, device: torch.device) -> Iterator[None]:
    """Context for the first call of compiled blocks.

    Raises:
        UserError: FlashAttention 4 and this torch do not fit together.
    """
    try:
        with tracing():
            yield
    # TypeError: this torch calls FlashAttention 4 with the arguments of another version.
    except (BackendCompilerFailed, TypeError) as error:
        if attention_backend(compute, device) != "flash" or not _is_of_flash(error):
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
    with torch.compiler.set_stance("default"), tracing():
        yield
