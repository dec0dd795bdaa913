"""Trains on two CPU cores as on two GPUs: `internvl demo` is two ranks from its start."""

from pathlib import Path

from internvl import dist, train
from internvl.config import recipes


def train_together(file: Path) -> None:
    """Trains the recipe of a file on all ranks; those that do nothing else wait for it here."""
    # Not two threads: they would wait for each other in every layer of a model this small, two
    # processes only once per step.
    dist.barrier()
    train.run(recipes.load_recipe(file))
