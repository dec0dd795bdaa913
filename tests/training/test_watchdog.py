"""Two real ranks of which one reads a sample that takes long: who is named, and the stacks."""

from pathlib import Path

import pytest
import tiny_run
from ranks import run_ranks

from internvl import dist, errors
from internvl.training import tracking, watchdog
from internvl.training.watchdog import Status, Watchdog

SLOW = """
import time
from internvl import train
from internvl.config import recipes
from internvl.data import loader

original = loader.read_rgb

def slow_read(source, *rest):
    if str(source).endswith("red-cross.png"):
        time.sleep(600)
    return original(source, *rest)

loader.read_rgb = slow_read
train.run(recipes.load_recipe({recipe!r}, {settings!r}))
"""


@pytest.mark.slow
def test_a_sample_that_takes_long_is_named_with_its_rank_and_stacks(tmp_path: Path) -> None:
    recipe = tiny_run.make(tmp_path)
    settings = ["watchdog_s=2", "data.workers=1", "steps=6"]
    with pytest.raises(AssertionError, match="Timed out waiting 4000ms"):
        run_ranks(SLOW.format(recipe=str(recipe), settings=settings))
    folder = tmp_path / "run"
    log = (folder / tracking.LOG_FILE).read_text()
    report = (folder / watchdog.FOLDER / "report.txt").read_text()
    assert report in log
    assert errors.explain(RuntimeError("Timed out waiting 4000ms")) in log
    first = report.splitlines()[0]
    assert first.startswith("no progress for ")
    assert "The others wait for rank" in first
    assert f"Stacks of every rank are in {folder / watchdog.FOLDER}" in first
    slow = [line for line in report.splitlines() if "and waits for" in line and "jsonl" in line]
    # Red crosses are the fifth and sixth line.
    assert any("line" in line and ("5" in line or "6" in line) for line in slow), report
    stacks = [
        (folder / watchdog.FOLDER / f"rank-{rank:05d}.stacks").read_text() for rank in range(2)
    ]
    assert all("Thread 0x" in text or "Current thread" in text for text in stacks)
    # The loader worker's own.
    assert "in slow_read" in "".join(stacks)


def status(rank: int, **values: object) -> Status:
    return Status(**{"rank": rank, "host": "node", "written_s": 1000.0, **values})  # type: ignore[arg-type]


READS = {"reads": "a.jsonl line 7", "reads_s": 900.0}


@pytest.mark.parametrize(
    ("statuses", "sentence"),
    [
        ([status(0), status(1)], "All ranks are at the same point."),
        ([status(0), status(1, **READS)], "The others wait for rank 1."),
        (
            [status(0, waits_for_ranks=True, collectives=5), status(1, collectives=5)],
            "The others wait for rank 1.",
        ),
        (
            [status(0, collectives=5), status(1, collectives=4)],
            "The others wait for rank 1.",
        ),
        ([status(0), status(1, written_s=600.0)], "Nothing is heard of rank 1."),
        ([status(0)], "Nothing is heard of rank 1."),
    ],
)
def test_who_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: list[Status], sentence: str
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    assert Watchdog(tmp_path, 100.0)._blame(statuses, 1005.0) == sentence


def test_what_a_rank_does_is_a_line() -> None:
    working = status(1, phase="trains", step=12, rows=["a.jsonl line 3"])
    assert working.describe(1005) == "rank 1 on node trains step 12 (rows of a.jsonl line 3)"
    reading = status(1, phase="reads", step=12, **READS)
    assert reading.describe(1005) == (
        "rank 1 on node reads step 12, and waits for a.jsonl line 7 for 105 s"
    )
    assert status(0, phase="compiles", waits_for_ranks=True).describe(1005) == (
        "rank 0 on node compiles and waits for other ranks"
    )


def test_a_run_that_gets_on_leaves_nothing(tmp_path: Path) -> None:
    with watchdog.watching(tmp_path, 0.5):
        for _ in range(10):
            watchdog.beat("trains", 2)
    assert list(tmp_path.iterdir()) == []
