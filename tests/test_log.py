"""Log lines, progress, metrics.jsonl and TensorBoard."""

import errno
import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from internvl import log


@pytest.fixture(autouse=True)
def quiet_after() -> Iterator[None]:
    yield
    logger = log.get_logger()
    logger.handlers = []
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.mark.slow
def test_an_installed_torchao_does_not_warn_in_every_process() -> None:
    pytest.importorskip("torchao")
    code = "from internvl import log; log.setup(); import transformers.modeling_utils"
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_setup_twice_says_a_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    log.setup()
    log.get_logger().info("hello")
    assert capsys.readouterr().err.count("hello") == 1


def test_higher_ranks_only_warn(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(rank=3)
    log.get_logger().info("hello")
    log.get_logger().warning("careful")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("[rank 3] careful")


def test_a_program_that_only_imports_hears_nothing() -> None:
    code = (
        "from internvl import log\n"
        "log.get_logger().info('hello')\n"
        "with log.Progress('images', total=2, every_s=0) as progress:\n"
        "    progress.update(); progress.update()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_progress_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    with log.Progress("images", total=4, every_s=0) as progress:
        for _ in range(4):
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "1 of 4 images (25%)" in lines[0]
    assert lines[-1].endswith("00:00 left")


def test_progress_lines_are_not_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    with log.Progress("images", total=100, every_s=60) as progress:
        for _ in range(100):
            progress.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("total", "done", "elapsed_s", "line"),
    [
        (200, 50, 10, "50 of 200 images (25%), 5.0 a second, 00:30 left"),
        (200, 0, 10, "0 of 200 images (0%), 0.0 a second, ? left"),
        (None, 1500, 10, "1,500 images, 150.0 a second"),
    ],
)
def test_progress_line(total: int | None, done: int, elapsed_s: float, line: str) -> None:
    progress = log.Progress("images", total=total, every_s=60)
    progress.update(done)
    assert progress.line(elapsed_s) == line


def test_metrics_round_trip_with_numbers_json_does_not_know(tmp_path: Path) -> None:
    metrics = log.StepLog(tmp_path / "run", "metrics.jsonl")
    metrics.append({"step": 1, "loss": 0.5, "who": "sft"})
    metrics.append({"step": 2, "loss": math.nan, "low": -math.inf, "high": math.inf})
    lines = metrics.path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5, "who": "sft"}
    assert json.loads(lines[1]) == {
        "step": 2,
        "loss": "NaN",
        "low": "-Infinity",
        "high": "Infinity",
    }
    second = metrics.rows()[1]
    assert math.isnan(second["loss"])
    assert (second["low"], second["high"]) == (-math.inf, math.inf)


def test_truncate_after_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    metrics = log.StepLog(tmp_path, "metrics.jsonl")
    for step in range(1, 6):
        metrics.append({"step": step, "loss": math.nan})
    with metrics.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    metrics.truncate_after(3)
    metrics.append({"step": 4, "loss": 1.0})
    assert [row["step"] for row in metrics.rows()] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_before_the_first_row_does_nothing(tmp_path: Path) -> None:
    metrics = log.StepLog(tmp_path, "metrics.jsonl")
    metrics.truncate_after(10)
    assert metrics.rows() == []
    assert not metrics.path.exists()


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    metrics = log.StepLog(tmp_path, "metrics.jsonl")
    metrics.path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        metrics.truncate_after(1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    metrics = log.StepLog(tmp_path, "metrics.jsonl")
    metrics.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        metrics.append({"step": 1})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(metrics.path)


def _events(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    board = log.TensorBoard(tmp_path)
    board.scalars(1, {"train/loss": 2.0, "train/lr": 0.5})
    board.scalars(2, {"train/loss": 1.0})
    board.close()
    assert _events(tmp_path, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert _events(tmp_path, "train/lr") == [(1, 0.5)]


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    first = log.TensorBoard(tmp_path)
    for step in range(1, 5):
        first.scalars(step, {"loss": 10.0})
    first.close()
    # As of an earlier second: files of one second are read in the order of a counter, 10 before 9.
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / "events.out.tfevents.0000000001.first")
    resumed = log.TensorBoard(tmp_path, purge_step=3)
    resumed.scalars(3, {"loss": 7.0})
    resumed.close()
    assert _events(tmp_path, "loss") == [(1, 10.0), (2, 10.0), (3, 7.0)]
