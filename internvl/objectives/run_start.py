"""What an objective is told of a run before its next step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from internvl.config import DataConfig
from internvl.data.loader import Read
from internvl.data.sampler import UnitRef
from internvl.data.sources import Source


@dataclass(frozen=True)
class RunStart:
    """A run that is about to take step `step` + 1."""

    folder: Path
    step: int
    reference: str
    """`objective.reference`, resolved; "" for objectives without one."""
    model: Any
    device: torch.device
    data: DataConfig
    files: Sequence[Source]
    refs: Callable[[], Sequence[UnitRef]]
    """Lists the samples that the run shows; one may come several times."""
    reader: Dataset[Read]
    pad: Callable[[Any], Any]
    """Pads a row as training does."""
    computing: Callable[[], AbstractContextManager[Any]]
    """Makes the context in which rows are computed as training computes them."""
    initial_model: Callable[[], Any]
    """Loads the weights that the run started from once more, frozen, on the device."""
    in_step: bool
    """True if every forward is collective, so that all ranks must run as many."""
