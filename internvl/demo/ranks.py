"""Trains on two CPU cores as on two GPUs: `internvl demo` is two ranks from its start."""

import os
from pathlib import Path

from internvl import dist, train
from internvl.config import recipes


def keep_kernels() -> None:
    """Has oneDNN keep all code that it compiles; to be called before the first product."""
    # It compiles for a size, and a packed row seldom has as many tokens as the one before. By
    # itself it keeps the last 1,024, and most are dropped before their size comes again: the first
    # half of the chat model's training has 3,100.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")


def train_together(file: Path) -> None:
    """Trains the recipe of a file on all ranks; those that do nothing else wait for it here."""
    # Not two threads: they would wait for each other in every layer of a model this small, two
    # processes only once per step.
    dist.barrier()
    train.run(recipes.load_recipe(file))
