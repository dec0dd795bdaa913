"""Runs of several ranks that are stopped at a step, and go on in another call."""

from ranks import run_ranks

RUN = """
import os
import signal
from internvl import train
from internvl.config import recipes
from internvl.errors import Interrupted

take = train.train_step

def step(state, rows):
    for row in rows:
        print(*row.names, sep="\\n")
    metrics = take(state, rows)
    if state.step == {until}:
        os.kill(os.getpid(), signal.SIGTERM)
    return metrics

train.train_step = step
{before}
try:
    train.run(recipes.load_recipe({recipe!r}, {settings!r}))
except Interrupted:
    pass
"""
EPOCH = ["steps=6", "checkpoint.every=1", "checkpoint.keep=1"]


def run(project, folder, *settings, num_ranks, until=0, before=""):
    """Runs to step `until`, or to the end, on `num_ranks` ranks; returns the samples' names."""
    words = [f"run={folder}", *EPOCH, *settings]
    code = RUN.format(until=until, recipe=str(project), settings=words, before=before)
    return [
        name for said in run_ranks(code, num_ranks=num_ranks) for name in said.split("\n") if name
    ]
