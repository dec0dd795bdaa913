"""Guard that refuses updates whose loss or gradient is not finite or spikes.

A step is judged before its update is applied, against the median of the steps before and their
deviation: 1.4826 times the median distance from the median. The steps remembered are part of a
checkpoint, so that a resumed run judges alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from internvl import dist, log
from internvl.config import GuardConfig
from internvl.errors import RunError

SKIPPED = "skipped_steps.jsonl"
"""The file of a run folder that lists every update that was not applied."""
_NAMED = 8  # samples named in a sentence
_LEAST_SHARE = 0.01  # of the median: steps that hardly differ have no deviation to speak of


class Named(Protocol):
    """A batch that has the names of its samples."""

    @property
    def names(self) -> tuple[str, ...]: ...


@dataclass
class Guard:
    """Judges steps by earlier ones; its state is part of a checkpoint."""

    config: GuardConfig
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    num_skipped: int = 0

    def objection(self, step: int, loss: float, norm: float) -> str | None:
        """Returns why the update of `step`, by its loss and gradient norm, is refused, or None."""
        for quantity, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                return f"the {quantity} of step {step} is not a finite number"
        for quantity, key, value, earlier in (
            ("loss", "loss_spike", loss, self.losses),
            ("gradient norm", "grad_spike", norm, self.norms),
        ):
            allowed = getattr(self.config, key)
            # A few steps have no spread: the first ones of a run are never refused.
            if allowed is None or len(earlier) < self.config.window:
                continue
            middle, deviation = spread(earlier)
            if value > middle + allowed * deviation:
                return (
                    f"the {quantity} of step {step} is {value:.4g}, "
                    f"{(value - middle) / deviation:.3g} deviations above {middle:.4g}, the median "
                    f"of the {len(earlier)} steps before (guard.{key} = {allowed:g})"
                )
        return None

    def remember(self, loss: float, norm: float) -> None:
        """Adds a step that was applied to those that the next ones are compared with."""
        # New lists: `state` has handed out the old ones.
        self.losses = [*self.losses, loss][-self.config.window :]
        self.norms = [*self.norms, norm][-self.config.window :]

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as plain numbers."""
        return {"losses": self.losses, "norms": self.norms, "num_skipped": self.num_skipped}

    def restore(self, state: Any) -> None:
        """Restores what `state` returned. Raises RunError if it is damaged."""
        try:
            losses, norms = (list(map(float, state[key])) for key in ("losses", "norms"))
            num_skipped = int(state["num_skipped"])
        except (KeyError, TypeError, ValueError):
            raise RunError(
                "state.json of the newest checkpoint is damaged (`guard`); remove this "
                "checkpoint's folder to go on from the one before"
            ) from None
        self.losses, self.norms, self.num_skipped = losses, norms, num_skipped


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns (median, robust deviation) of numbers that are not all zero."""
    # Of normal values this is the standard deviation, but a few outliers do not move it.
    middle = median(values)
    deviation = 1.4826 * median(abs(value - middle) for value in values)
    return middle, max(deviation, _LEAST_SHARE * abs(middle), 1e-12)


def worst(rows: Sequence[Named], losses: Sequence[float]) -> tuple[float, tuple[str, ...]]:
    """Returns the highest loss of a row and the names of its samples; NaN counts as the highest."""
    ranked = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if not ranked:
        return -math.inf, ()
    index = ranked.index(max(ranked))
    return ranked[index], rows[index].names


def refuse(guard: Guard, step: int, reason: str, names: Sequence[str], listed: log.StepLog) -> None:
    """Stops the run, or lists the step as skipped, as the recipe says.

    Args:
        names: samples of the row that is the likely cause.

    Raises:
        RunError: `action: stop`, or more steps skipped than `max_skipped`.
    """
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    sentence = f"{reason}, from a row of {', '.join(names[:_NAMED])}{more}"
    if guard.config.action == "stop":
        raise RunError(
            f"{sentence}. Nothing was saved since the last checkpoint; look at these samples, "
            "lower optim.lr, compute in float32 (dtype=float32), or go on without such steps "
            "(guard.action=skip)"
        )
    guard.num_skipped += 1
    if dist.is_main():
        listed.append({"step": step, "reason": reason, "samples": list(names)})
    log.get_logger().warning("%s; this update is skipped", sentence)
    if guard.num_skipped > guard.config.max_skipped:
        raise RunError(
            f"{guard.num_skipped} steps were skipped, more than guard.max_skipped = "
            f"{guard.config.max_skipped} allows; the last: {sentence}. All are listed in "
            f"{listed.path}"
        )
