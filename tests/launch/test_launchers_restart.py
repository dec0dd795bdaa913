"""torchrun starts a group again in which a rank was killed, and the run goes on."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import tiny_run
from ranks import run_ranks
from tiny_run import losses

pytestmark = pytest.mark.slow

STEPS = ("steps=12", "checkpoint.every=2", "checkpoint.keep=1", "parallel.shard=zero3")
KILLED_AFTER = 5


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process id of the processes that a launcher has started."""
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        variables = dict(word.split("=", 1) for word in words if "=" in word)
        if parent == launcher and "TORCHELASTIC_RUN_ID" in variables:
            ranks[int(variables["RANK"])] = int(folder.name)
    return ranks


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path):
    recipe = tiny_run.make(tmp_path, size=kills.SIZE, global_batch=4)
    expected, run = tmp_path / "undisturbed", tmp_path / "run"
    run_ranks(kills.CODE.format(recipe=str(recipe), settings=[*STEPS, f"run={expected}"]))
    words = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "internvl", "train"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, str(recipe), *STEPS]
        + [f"run={run}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        tiny_run.wait_for_step(run, KILLED_AFTER, launcher)
        started = ranks_of(launcher.pid)
        os.kill(started[1], signal.SIGKILL)
        said = launcher.communicate(timeout=120)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == 0, said
    assert started.keys() == {0, 1}
    log = (run / "train.log").read_text(encoding="utf-8")
    starts = [int(step) for step in re.findall(r"from step (\d+);", log)]
    assert len(starts) == 2
    assert starts[0] == 0
    # Written while steps are taken: that of step 2 is complete when that of step 4 begins.
    assert starts[1] >= 2
    assert starts[1] % 2 == 0
    assert len(losses(run)) == 12
    assert kills.differences(run, expected) == []
