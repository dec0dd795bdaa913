"""The engine that answers requests: images read ahead, slots refilled as answers end."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from internvl.data.chat import ChatEncoder
from internvl.data.images import STATISTICS
from internvl.inference.engine.reading import Prompts, processes_for
from internvl.inference.engine.scheduler import Job, Scheduler
from internvl.inference.engine.shared import ended_jobs, one_engine
from internvl.inference.settings import Settings
from internvl.models import configs, kernels

__all__ = [
    "Job",
    "Prompts",
    "Ready",
    "Scheduler",
    "accelerate",
    "captions",
    "ended_jobs",
    "longest",
    "one_engine",
    "processes_for",
    "runs",
    "scheduler",
]

SLOTS = 128
"""Most requests in flight on a GPU, where its memory holds as many."""


def runs(model: Any, settings: Settings) -> bool:
    """True if the engine answers with these settings on this model; else `generate` does.

    Beam search that samples or penalizes, further settings of `transformers`, models spread over
    several devices or ranks, and attention other than to all earlier tokens are `generate`'s.
    """
    if settings.num_beams > 1 and not settings.is_plain_search:
        return False
    if settings.num_beams == 1 and settings.extra:
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
    """Builds a scheduler of a chat model; its memory is freed with it.

    Args:
        slots: most requests in flight; None: as many as the GPU holds, up to 128, or 16 on a CPU.
        compiled: compile the blocks, which pays for some thousand requests.
        options: further ones of `Scheduler`.
    """
    return Scheduler(
        model,
        end_id=encoder.tokenizer.convert_tokens_to_ids(encoder.template.end),
        statistics=STATISTICS[configs.chat_settings(model.config)["normalize"]],
        slots=_slots(model, slots),
        dtype=_compute_dtype(model),
        compiled=compiled,
        **options,
    )


def captions(
    model: Any, slots: int | None = None, *, compiled: bool = False, **options: Any
) -> Scheduler:
    """Builds a scheduler of InternVL-14B's captions; arguments as of `scheduler`."""
    # An image has 67 MB of keys and values for the queries: forty at a time leave room for slots.
    options = {"row_tokens": 4096} | options
    return Scheduler(
        model,
        # As in the original, whose search ends at the id in the model's configuration.
        end_id=model.config.text_config.eos_token_id,
        statistics=STATISTICS["imagenet"],
        slots=_slots(model, slots),
        dtype=_compute_dtype(model),
        compiled=compiled,
        **options,
    )


def _slots(model: Any, slots: int | None) -> int:
    if slots is not None:
        return slots
    return SLOTS if model.device.type == "cuda" else 16


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
