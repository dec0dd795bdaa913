"""What passes between a launcher and its ranks."""

import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import ProcessFailure

from internvl import launchers


def test_torchrun_reads_the_sentence_that_ends_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv(launchers.ERROR_FILE, str(file))
    launchers.report("the disk is full", 1)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert failure.message == "the disk is full"
    assert failure.timestamp == pytest.approx(time.time(), abs=60)


def test_without_a_launcher_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(launchers.ERROR_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    launchers.report("the disk is full", 1)
    assert list(tmp_path.iterdir()) == []
