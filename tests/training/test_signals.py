"""Ctrl-C and SIGTERM end a run after a step, with a checkpoint from which it goes on exactly."""

import signal
import subprocess

import pytest
import tiny_run
from tiny_run import command, losses, recipe_of, wait_for_step

from internvl import train


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


@pytest.mark.slow
def test_ctrl_c_saves_and_goes_on(project, tmp_path):
    straight = train.run(recipe_of(project, tmp_path, "steps=30"))
    folder = tmp_path / "stopped"
    process = subprocess.Popen(command(project, folder, "steps=30"), stderr=subprocess.PIPE)
    wait_for_step(folder, 7, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1].decode()
    assert process.returncode == 1
    assert "checkpoint written" in said
    subprocess.run(command(project, folder, "steps=30"), check=True)
    assert losses(folder) == losses(straight)
