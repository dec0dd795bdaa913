"""Trains in two processes on two CPU cores, as on two GPUs."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch import distributed

from internvl import dist, train
from internvl.config import Recipe
from internvl.training import length

_LONGEST_WAIT = timedelta(minutes=10)
"""Timeout of collectives; the other process never works alone for longer than a step."""


def train_in_two(recipe: Recipe, file: Path) -> None:
    """Trains `recipe` in this process and in a second one that it starts.

    Args:
        file: path of the recipe, which the second process reads.
    """
    # Not two threads: they would wait for each other in every layer of a model this small, two
    # processes only once per step.
    if length.finished(recipe.run):
        train.run(recipe)  # says so
        return
    with _second_rank(file):
        train.run(recipe)


@contextmanager
def _second_rank(file: Path) -> Iterator[None]:
    """Starts `internvl train FILE` as rank 1 and makes this process rank 0."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    other = subprocess.Popen(
        [sys.executable, "-m", "internvl", "train", str(file)],
        env=os.environ | group | {"RANK": "1", "LOCAL_RANK": "1"},
    )
    try:
        address = f"tcp://localhost:{port}"
        distributed.init_process_group(
            "gloo", init_method=address, rank=0, world_size=2, timeout=_LONGEST_WAIT
        )
        yield
    except BaseException:
        other.terminate()
        raise
    finally:
        dist.shutdown()
        other.wait()
