"""`guard:`, `checkpoint:`, `stop:` refused updates, saved steps, early stopping."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from internvl.config.types import STRICT, Positive


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When an update is not applied. A loss or gradient that is NaN or infinite never is."""

    __pydantic_config__ = STRICT
    loss_spike: Annotated[float, Field(gt=0)] | None = None
    """Largest distance of a step's loss above the median of the previous steps, in scaled median
    absolute deviations; 10 is a cautious choice. null: spikes are not detected."""
    grad_spike: Annotated[float, Field(gt=0)] | None = None
    """The same for the norm of the gradient, before it is clipped."""
    window: Annotated[int, Field(ge=8)] = 50
    """Number of applied steps that a step is compared with; the first steps of a run are not
    judged."""
    action: Literal["stop", "skip"] = "stop"
    """stop: end the run and name the samples; skip: leave the update out, list it in
    skipped_steps.jsonl, and stop above `max_skipped`."""
    max_skipped: Positive = 10
    """With skip: most updates of a run that may be left out."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints are saved, to resume a run and to keep its best step."""

    __pydantic_config__ = STRICT
    every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints; 0 saves only at the end or when interrupted."""
    keep: Positive = 2
    """Number of newest checkpoints to keep."""
    best: str | None = None
    """An evaluation's metric, such as val/loss or coco/CIDEr: the step with its best value is kept
    too, in the folder `best`, which loads, evaluates and exports like a run folder."""
    best_is: Literal["auto", "min", "max"] = "auto"
    """auto: min for a loss, max for any other metric."""


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """Early stopping."""

    __pydantic_config__ = STRICT
    patience: Positive | None = None
    """Stop after this many evaluations in a row without a better `checkpoint.best`; null: train to
    the end."""
