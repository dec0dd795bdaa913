"""Training in two processes, as on two GPUs: what one core takes minutes for, two do in half."""

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
from internvl.training import run_folder

_LONGEST_WAIT = timedelta(minutes=10)
"""For the other process, which never works alone for longer than a step."""


def train_in_two(recipe: Recipe, file: Path) -> None:
    """Trains by `recipe` here and in a process that is started for it.

    Two threads in one process would wait for each other in every layer of a model this small; two
    processes wait once a step, and without work for the cores.

    Args:
        file: where the recipe is; the other process reads it there.
    """
    if run_folder.finished(recipe.run):
        train.run(recipe)  # says so
        return
    with _another(file):
        train.run(recipe)


@contextmanager
def _another(file: Path) -> Iterator[None]:
    """Inside, this process is rank 0 of two; rank 1 is `internvl train FILE`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    other = subprocess.Popen(
        [sys.executable, "-m", "internvl", "train", str(file)],
        env=os.environ | group | {"RANK": "1", "LOCAL_RANK": "1"},
    )
    try:
        where = f"tcp://localhost:{port}"
        distributed.init_process_group(
            "gloo", init_method=where, rank=0, world_size=2, timeout=_LONGEST_WAIT
        )
        yield
    except BaseException:
        other.terminate()
        raise
    finally:
        dist.shutdown()
        other.wait()
