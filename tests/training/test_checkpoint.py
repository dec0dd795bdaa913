"""Checkpoints that cannot be written, or only in part."""

import subprocess

import pytest
import tiny_run
from tiny_run import command


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_loses_nothing(project, tmp_path):
    """On a file system of 60 MiB two checkpoints of 23 MiB fit, a third does not."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("unshare -rm is not allowed here")
    disk = tmp_path / "disk"
    disk.mkdir()
    words = command(project, disk / "run", "checkpoint.every=2", "checkpoint.keep=9", "steps=20")
    script = (
        f"mount -t tmpfs -o size=60m tmpfs {disk} && {' '.join(map(repr, words))}; "
        f"echo code $?; ls -a {disk}/run/checkpoints"
    )
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], check=False, capture_output=True, text=True
    )
    assert "code 1" in done.stdout, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert "000002" in done.stdout
    assert "partial" not in done.stdout
