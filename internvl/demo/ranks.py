"""Trains on two CPU cores as on two GPUs: `internvl demo` is two ranks from its start."""

import os
from pathlib import Path

from internvl import dist, train
from internvl.config import recipes

_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4096"}
"""There are 3,100 sizes in the first half of the chat model's training; more cost memory."""


def keep_kernels() -> None:
    """Has oneDNN keep all code that it compiles; to be called before the first product."""
    # It compiles for a size, and a packed row seldom has as many tokens as the one before. By
    # itself it keeps the last 1,024, and most are dropped before their size comes again.
    for name, value in _KERNELS.items():
        os.environ.setdefault(name, value)


def train_together(file: Path) -> None:
    """Trains the recipe of a file on all ranks; those that do nothing else wait for it here."""
    # Not two threads: they would wait for each other in every layer of a model this small, two
    # processes only once per step.
    dist.barrier()
    train.run(recipes.load_recipe(file))
