"""Log lines, progress, metrics.jsonl and TensorBoard."""

import errno
import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import on_terminal

from internvl import log
from internvl.errors import UserError


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
    assert "4 of 4 images (100%), took 00:00" in lines[-1]


def test_progress_lines_are_not_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    with log.Progress("images", total=100, every_s=60) as progress:
        for _ in range(100):
            progress.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("total", "done", "elapsed_s", "line"),
    [
        (200, 50, 10, "50 of 200 images (25%), 00:30 left, 5.0 images/s"),
        (200, 5, 200, "5 of 200 images (2%), 2:10:00 left, 40.0 s/image"),
        (200, 0, 10, "0 of 200 images (0%), ? left"),
        (200, 200, 10, "200 of 200 images (100%), took 00:10, 20.0 images/s"),
        (None, 1500, 10, "1,500 images, 150 images/s"),
    ],
)
def test_progress_line(total: int | None, done: int, elapsed_s: float, line: str) -> None:
    progress = log.Progress("images", total=total, every_s=60)
    progress.update(done)
    assert progress.line(elapsed_s) == line


def test_a_note_replaces_the_speed_and_its_first_and_last_are_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.setup()
    with log.Progress("steps", total=6, done=2, every_s=60) as progress:
        for step in range(3, 7):
            progress.update(note=f"loss {step}")
    first, last = capsys.readouterr().err.splitlines()
    assert "3 of 6 steps (50%), 00:00 left, loss 3" in first
    assert "6 of 6 steps (100%), took 00:00, loss 6" in last


_BAR = """
import time
from pathlib import Path
from internvl import log
log._BAR_DELAY_S = 0
log.setup()
with log.also_to(Path("train.log")), log.Progress("steps", total=3) as progress:
    for loss in (3, 2, 1):
        time.sleep(0.15)
        progress.update(note=f"loss {loss}")
        log.get_logger().info("checkpoint %d", loss)
"""


def test_a_terminal_shows_a_bar_and_the_file_its_lines(tmp_path: Path) -> None:
    out = on_terminal([sys.executable, "-c", _BAR], tmp_path)
    drawn = [text for text in re.split(r"[\r\n]+", out) if "/3 steps" in text]
    assert any(re.match(r"\|█+[^|]*\| 2/3 steps, 00:00 left, loss 2", text) for text in drawn), out
    lines = [line.partition(" ")[2] for line in out.splitlines() if "checkpoint" in line]
    assert len(lines) == 3
    assert "3 of 3 steps (100%), took 00:00, loss 1" in out
    assert "1 of 3 steps (33%)" not in out
    saved = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2].split(",")[0] for line in saved] == [
        *("1 of 3 steps (33%)", "checkpoint 3", "checkpoint 2"),
        *("3 of 3 steps (100%)", "checkpoint 1"),
    ]


def test_a_log_file_is_appended_and_ends_with_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.log"
    with log.also_to(file):
        log.get_logger().info("step %d", 1)
        log.get_logger().info("half of a character: \udc80")
    log.get_logger().info("not in the file")
    with pytest.raises(UserError), log.also_to(file):
        raise UserError("a.png: cut; replace it")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == [
        "step 1",
        "half of a character: \\udc80",
        "a.png: cut; replace it",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", lines[0][:20])
    assert "cut" not in capsys.readouterr().err


def test_a_silent_program_stays_silent_with_a_log_file(tmp_path: Path) -> None:
    code = (
        "import logging\n"
        "from pathlib import Path\n"
        "from internvl import log\n"
        "with log.also_to(Path('train.log')):\n"
        "    log.get_logger().info('hello')\n"
        "    log.get_logger().warning('careful')\n"
        "log.get_logger().info('hello')\n"
        "assert log.get_logger().level == logging.NOTSET and log.get_logger().propagate\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("", "careful\n")
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["hello", "careful"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_a_log_file_on_a_full_disk_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.log"
    file.symlink_to("/dev/full")
    log.setup()
    with pytest.raises(OSError, match="No space left") as caught, log.also_to(file):
        log.get_logger().info("step 1")
    assert caught.value.filename == str(file)
    # Lines wait until there is space.
    with log.also_to(file):
        log.get_logger().info("step 2")
        file.unlink()
        log.get_logger().info("step 3")
    assert [line[20:] for line in file.read_text().splitlines()] == ["step 2", "step 3"]


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from internvl import log\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
        "rows = log.StepLog(Path(), 'rows.jsonl')\n"
        "rows.append({'step': 1})\n"
        "try:\n    rows.append({'step': 2, 'name': 30 * 'x'})\n"
        "except OSError as error:\n    print(error.filename)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "rows.jsonl\n"
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1}\n'


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
