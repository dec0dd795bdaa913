"""Random numbers that depend on seed, step and rank alone."""

from contextlib import AbstractContextManager

import numpy as np
import torch

from internvl import dist


def preserve_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restores the states of torch's generators afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def seed_step(seed: int, step: int) -> None:
    """Seeds torch from the recipe's seed, the step and the rank."""
    # So no generator state needs saving, and ranks do not drop the same units.
    mixed = np.random.SeedSequence((seed, step, dist.rank())).generate_state(2, np.uint32)
    torch.manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)
