"""Metrics go to a file, to TensorBoard and, when asked, to Weights & Biases."""

import sys
from pathlib import Path

import pytest

from internvl import log
from internvl.errors import UserError
from internvl.training import tracking


def test_a_missing_library_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb=images needs .* 'internvl\[wandb\]'"):
        tracking.open_metrics(tmp_path, 0, "images")


def test_without_it_there_are_the_file_and_tensorboard(tmp_path):
    log.StepLog(tmp_path, "metrics.jsonl").append({"step": 7, "loss": 1.0})
    metrics = tracking.open_metrics(tmp_path, 3, None)  # resumed at step 3
    metrics.write(4, {"loss": 0.5})
    metrics.show(4, {"val/loss": 0.7})
    metrics.close()
    assert log.StepLog(tmp_path, "metrics.jsonl").rows() == [{"step": 4, "loss": 0.5}]
    assert list((tmp_path / "tensorboard").iterdir())
    tracking.Metrics([]).write(1, {"loss": 1.0})  # of a rank that writes nothing


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_offline_runs_stay_in_the_folder(tmp_path):
    pytest.importorskip("wandb", reason="Weights & Biases: internvl[wandb]")
    folder = tmp_path / "lora"
    folder.mkdir()
    for first in (1, 2):  # the second goes on after step 1
        metrics = tracking.open_metrics(folder, first - 1, "images")
        metrics.write(first, {"loss": 1.0 / first})
        metrics.close()
    assert len({path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-*")}) == 1
    assert len(log.StepLog(folder, "metrics.jsonl").rows()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_lines_wait_while_the_disk_is_full_and_are_all_written(tmp_path, caplog):
    rows = log.StepLog(tmp_path, "metrics.jsonl")
    metrics = tracking.Metrics([], rows)
    rows.path.symlink_to("/dev/full")
    log.get_logger().propagate = True
    metrics.write(1, {"loss": 2.0})
    metrics.write(2, {"loss": 1.0})
    # Records, not lines: a handler may be there twice.
    full = {id(r) for r in caplog.records if "metrics.jsonl: the disk is full" in r.getMessage()}
    assert len(full) == 1
    assert "The run goes on; its lines wait in memory for space" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        metrics.close()
    rows.path.unlink()
    metrics.write(3, {"loss": 0.5})
    metrics.close()
    assert [row["loss"] for row in rows.rows()] == [2.0, 1.0, 0.5]
