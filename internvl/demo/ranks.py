"""Trains in two processes on two CPU cores, as on two GPUs."""

import subprocess
from pathlib import Path

from internvl import train
from internvl.config import Recipe
from internvl.errors import RanksFailed
from internvl.launch import local
from internvl.training import length


def train_in_two(recipe: Recipe, file: Path) -> None:
    """Trains `recipe` in two processes of its own.

    Args:
        file: path of the recipe, which they read.

    Raises:
        RanksFailed: one of them failed, for the reason in the text.
    """
    # Not two threads: they would wait for each other in every layer of a model this small, two
    # processes only once per step.
    if length.finished(recipe.run):
        train.run(recipe)  # says so
        return
    # The next commands that `train` prints are not those of a demo.
    ended = local.run(local.verb("train", str(file)), 2, stdout=subprocess.DEVNULL)
    if ended.code:
        raise RanksFailed(ended.sentence, ended.code)
