"""`guard:`, `checkpoint:`, `stop:` what keeps a run safe."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from internvl.config.types import STRICT, Positive


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What keeps an update from being applied. A loss or gradient that is no number always does."""

    __pydantic_config__ = STRICT
    loss_spike: Annotated[float, Field(gt=0)] | None = None
    """Robust deviations that a step's loss may lie above the median of the steps before; 10 is a
    cautious choice. null: spikes are let through."""
    grad_spike: Annotated[float, Field(gt=0)] | None = None
    """The same for the norm of the gradient, before it is clipped."""
    window: Annotated[int, Field(ge=8)] = 50
    """Applied steps that a spike is measured against; the first ones of a run are not judged."""
    action: Literal["stop", "skip"] = "stop"
    """stop ends the run and names the samples; skip leaves the update out, lists it in
    skipped_steps.jsonl, and stops above `max_skipped`."""
    max_skipped: Positive = 10
    """With skip: updates of a run that may be left out."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved on the way, for going on after an interruption."""

    __pydantic_config__ = STRICT
    every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints; 0 saves only at the end or when interrupted."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    best: str | None = None
    """An evaluation's metric, such as val/loss or coco/CIDEr: the step where it is best is kept as
    well, in the folder `best`, which loads, evaluates and exports as the run itself does."""
    best_is: Literal["auto", "min", "max"] = "auto"
    """auto: min for a loss, max for any other metric."""


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When a run ends before its last step."""

    __pydantic_config__ = STRICT
    patience: Positive | None = None
    """Evaluations in a row without a better `checkpoint.best`; null trains to the end."""
