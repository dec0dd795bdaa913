"""Training by two processes that `internvl train` starts: signals, deaths, and going on after."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_run
from tiny_run import losses

from internvl.config import recipes
from internvl.errors import RunError
from internvl.training import checkpoint, run_folder

pytestmark = pytest.mark.slow

HOST = socket.gethostname()


def children(pid: int) -> list[int]:
    """Process ids of a process's children, oldest first."""
    return sorted(
        pid_of(file)
        for file in Path("/proc").glob("[0-9]*/stat")
        if fields(file) and int(fields(file)[1]) == pid
    )


def pid_of(file: Path) -> int:
    return int(file.parent.name)


def fields(file: Path) -> list[str]:
    """State, parent … of a process; empty if it has ended meanwhile."""
    try:
        return file.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    state = fields(Path(f"/proc/{pid}/stat"))
    return bool(state) and state[0] != "Z"


@contextmanager
def training(recipe: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """(launcher, process ids of its ranks) of a run that has taken two more steps."""
    before = max(losses(folder), default=0) if folder.exists() else 0
    words = [str(recipe), f"run={folder}", "--processes", "2"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "internvl", "train", *words], stderr=subprocess.PIPE, text=True
    )
    try:
        tiny_run.wait_for_step(folder, before + 2, launcher)
        yield launcher, children(launcher.pid)
    finally:
        for pid in (launcher.pid, *children(launcher.pid)):
            subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)
        launcher.wait()
        if launcher.stderr is not None:
            launcher.stderr.close()


def last_line(launcher: subprocess.Popen[str]) -> str:
    return launcher.communicate(timeout=120)[1].strip().splitlines()[-1]


def test_what_ends_a_rank_ends_the_run_which_goes_on(tmp_path: Path) -> None:
    recipe = tiny_run.make(tmp_path, steps=100_000, checkpoint={"every": 5, "keep": 2})
    recipe.write_text(recipe.read_text().replace("workers: 0", "workers: 1"))
    folder = tmp_path / "run"

    with training(recipe, folder) as (launcher, ranks):
        subprocess.run(["kill", "-9", str(ranks[1])], check=True)
        said = last_line(launcher)
        assert launcher.returncode == 128 + signal.SIGKILL
        assert f"rank 1 of 2 ranks on {HOST}: was killed by signal 9 (SIGKILL)" in said
        assert not any(map(is_alive, ranks))

    with training(recipe, folder) as (launcher, ranks):
        (reader,) = children(ranks[1])
        subprocess.run(["kill", "-9", str(reader)], check=True)
        said = last_line(launcher)
        assert launcher.returncode == 1
        assert re.search(
            rf"rank 1 of 2 ranks on {HOST}: a process that reads data .* was killed by signal 9 "
            r"\(SIGKILL\); it was reading .*train.jsonl line.*most likely the machine's memory ran",
            said,
        )

    held = rf"\(process \d+ on {HOST}, since 20"
    with training(recipe, folder) as (launcher, ranks):
        refused = pytest.raises(RunError, match=held)
        with refused as raised, run_folder.owned(recipes.load_recipe(recipe)):
            pass
        assert f"(process {ranks[0]} " in str(raised.value)
        launcher.send_signal(signal.SIGTERM)
        match = re.search(
            r"stopped at step (\d+) of 100000; checkpoint written", last_line(launcher)
        )
        assert match
        assert launcher.returncode == 1
        assert checkpoint.steps(folder / "checkpoints")[-1] == int(match[1])

    with training(recipe, folder) as (launcher, ranks):
        launcher.kill()
        launcher.wait()
        while any(map(is_alive, ranks)):
            time.sleep(0.1)
        # They were asked to stop first.
        assert checkpoint.steps(folder / "checkpoints")[-1] == max(losses(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
