"""The engine that answers requests: images read ahead, slots refilled as answers end."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from internvl.data.chat import ChatEncoder
from internvl.data.images import STATISTICS
from internvl.inference.engine.scheduler import Job, Scheduler
from internvl.inference.settings import Settings
from internvl.models import configs, kernels

__all__ = ["Job", "Prompts", "Ready", "Scheduler", "accelerate", "longest", "runs", "scheduler"]

SLOTS = 128
"""Most requests in flight on a GPU, where its memory holds as many."""


def runs(model: Any, settings: Settings) -> bool:
    """True if the engine answers with these settings on this model; else `generate` does.

    Beam search, further settings of `transformers`, models spread over several devices or ranks,
    and attention other than to all earlier tokens are `generate`'s.
    """
    if settings.num_beams > 1 or settings.extra:
        return False
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return False
    # Each rank would wait for the others in every layer, and has other requests.
    return not any(isinstance(module, FSDPModule) for module in model.modules()) and _is_causal(
        model.config.text_config
    )


def _is_causal(config: Any) -> bool:
    """True if every layer attends to all earlier tokens and nothing else."""
    return set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def longest(config: Any) -> int:
    """Returns the longest sequence, in tokens, that the engine answers; `generate` takes others.

    Beyond it rotary embeddings change with the length of the sequence, or attention is a window.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [config.max_position_embeddings, getattr(config, "sliding_window", None)]
    if rope.get("rope_type") == "longrope":
        limits.append(rope["original_max_position_embeddings"])
    return min(limit for limit in limits if limit)


def accelerate(model: Any, *, float8: bool = False) -> None:
    """Replaces layers of a chat model on a GPU by their fast forms, as training has them.

    Names and values of weights stay, but for the decoder's in float8.

    Raises:
        UserError: float8 products that this GPU does not have.
    """
    # Here: a chat of a few answers needs none of it, and starts sooner.
    from internvl.compute.kernels import apply_compute
    from internvl.config import ComputeConfig

    compute = ComputeConfig(float8=float8, compile=False)
    apply_compute(model, model.device, compute)
    kernels.fuse_frozen_mlps(model)


def scheduler(
    model: Any,
    encoder: ChatEncoder,
    slots: int | None = None,
    *,
    compiled: bool = False,
    **options: Any,
) -> Scheduler:
    """Builds a scheduler for a chat model; its memory is freed with it.

    Args:
        slots: most requests in flight; None: as many as the GPU holds, up to 128, or 16 on a CPU.
        compiled: compile the blocks, which pays for some thousand requests.
        options: further ones of `Scheduler`.
    """
    if slots is None:
        slots = SLOTS if model.device.type == "cuda" else 16
    return Scheduler(
        model,
        end_id=encoder.tokenizer.convert_tokens_to_ids(encoder.template.end),
        statistics=STATISTICS[configs.chat_settings(model.config)["normalize"]],
        slots=slots,
        dtype=_compute_dtype(model),
        compiled=compiled,
        **options,
    )


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype that keys and values have: autocast's, else that of the weights."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.get_input_embeddings().weight.dtype  # type: ignore[operator]


class Ready:
    """A `Source` of jobs that are there."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.jobs = iter(jobs)

    def take(self, *, wait: bool) -> Job | None:
        """Returns the next job; see `Source`."""
        return next(self.jobs, None)


class Prompts:
    """A `Source` that encodes requests in threads, some ahead of the one that is taken."""

    def __init__(
        self,
        read: Callable[[int], Job],
        order: Sequence[int],
        *,
        ahead: int,
        most: int,
        pin: bool = False,
    ) -> None:
        """`read(i)` makes a job of request i; its exception is raised where the job is taken.

        Args:
            order: requests in the order in which they are begun.
            ahead: most requests that are read and not taken.
            most: jobs whose tokens reach this number go to `too_long` instead.
            pin: put tiles into memory that a GPU copies from while the host goes on.
        """
        self.read = read
        self.pin = pin
        self.left = iter(order)
        self.ahead = ahead
        self.most = most
        self.too_long: list[Job] = []
        """Jobs for `generate`."""
        # Decoding and resizing leave Python's lock to the others.
        threads = max(1, min(_THREADS, os.cpu_count() or 1, len(order)))
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.reading: deque[Future[Job]] = deque()

    def __enter__(self) -> "Prompts":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def take(self, *, wait: bool) -> Job | None:
        """Returns the next request as a job; see `Source`."""
        while True:
            while len(self.reading) < self.ahead:
                index = next(self.left, None)
                if index is None:
                    break
                self.reading.append(self.pool.submit(self._read, index))
            if not self.reading or not (wait or self.reading[0].done()):
                return None
            job = self.reading.popleft().result()
            if job.length < self.most:
                return job
            self.too_long.append(job)

    def _read(self, index: int) -> Job:
        job = self.read(index)
        if self.pin and job.prompt.tiles is not None:
            job.prompt = replace(job.prompt, tiles=job.prompt.tiles.pin_memory())
        return job


_THREADS = 8
"""Most threads that read images. Each reads some 40 images of 7 tiles a second, and more of them
would only wait for Python's lock, which whoever begins the GPU's work waits for too."""
