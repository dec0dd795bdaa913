"""What the first step of a run holds, as `check` counted it."""

from dataclasses import dataclass

from internvl.plan.flops import Work


@dataclass(frozen=True)
class FirstStep:
    """The rows of a run's first step, as a plan reckons with them."""

    work: Work
    row_tokens: tuple[int, ...]
    """Tokens of each row, without padding."""
    samples_an_epoch: int
