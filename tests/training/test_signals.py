"""Ctrl-C, SIGTERM and SIGKILL: a run goes on exactly, as if nothing had stopped it."""

import json
import os
import signal
import subprocess

import pytest
import tiny_run
from ranks import run_ranks
from tiny_run import command, losses, recipe_of, wait_for_step

from internvl import evals, log, train
from internvl.errors import Interrupted
from internvl.training import checkpoint, signals

# Adapters drop inputs at random: the random numbers must come back too.
SETTINGS = ("steps=6", "checkpoint.every=2", "model.train=[]", "model.lora={rank: 4}")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def straight(project, tmp_path_factory):
    """Loss and gradient norm of each step of a run that nothing stopped."""
    return losses(train.run(recipe_of(project, tmp_path_factory.mktemp("straight"), *SETTINGS)))


def send_within_step(monkeypatch, step, *signums):
    """This process sends itself real signals while it computes a step."""
    train_step = train.train_step

    def interrupted_step(state, batches):
        numbers = train_step(state, batches)
        if state.step == step:
            for signum in signums:
                os.kill(os.getpid(), signum)
        return numbers

    monkeypatch.setattr(train, "train_step", interrupted_step)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on(
    project, straight, tmp_path, monkeypatch, signum
):
    recipe = recipe_of(project, tmp_path, *SETTINGS)
    handler = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        send_within_step(patch, 3, signum)  # no step that saves anyway
        with pytest.raises(Interrupted, match="stopped at step 3 of 6; checkpoint written"):
            train.run(recipe)
    assert signal.getsignal(signum) is handler
    assert checkpoint.steps(recipe.run / "checkpoints") == [2, 3]
    assert list(losses(recipe.run)) == [1, 2, 3]
    train.run(recipe)
    assert losses(recipe.run) == straight


def test_a_signal_ends_an_evaluation_which_is_done_when_the_run_goes_on(
    project, straight, tmp_path, monkeypatch
):
    source = {"type": "loss", "annotations": str(project.parent / "train.jsonl"), "every": 3}
    section = json.dumps({"seen": source | {"images": str(project.parent)}})
    recipe = recipe_of(project, tmp_path, *SETTINGS, "checkpoint.every=100", f"evals={section}")
    run_all = evals.run_all

    def asked(*values):
        os.kill(os.getpid(), signal.SIGTERM)
        return run_all(*values)

    with monkeypatch.context() as patch:
        patch.setattr(evals, "run_all", asked)
        with pytest.raises(Interrupted, match="stopped at step 3 of 6; checkpoint written"):
            train.run(recipe)
    assert checkpoint.steps(recipe.run / "checkpoints") == [3]
    assert not (recipe.run / "evals" / "000003.json").exists()
    train.run(recipe)
    assert (recipe.run / "evals" / "000003.json").exists()
    assert losses(recipe.run) == straight


def test_forked_readers_leave_ctrl_c_to_the_run(capfd):
    """A terminal sends it to them too."""
    log.setup()
    with signals.stop_signal() as stop:
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            os._exit(int(stop.asked))
        assert os.waitpid(child, 0)[1] == 0
    assert "stopping" not in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once():
    with signals.stop_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


KILLED = """
import os
import signal
from pathlib import Path
from internvl import train
from internvl.config import recipes
from internvl.training import checkpoint

def kill(*args, **keys):
    os.kill(os.getpid(), signal.SIGKILL)

original, calls = {where}, []

def counted(*args, **keys):
    calls.append(args)
    return kill() if len(calls) == {call} else original(*args, **keys)

{where} = counted
train.run(recipes.load_recipe(Path({recipe!r}), {settings!r}))
"""


@pytest.mark.parametrize(
    ("where", "call", "left"),
    [
        ("train.train_step", 4, ["000002"]),  # step 3 is done again
        ("checkpoint.write_json", 2, [".000004.partial", "000002"]),  # in the middle of a save
    ],
)
def test_a_killed_run_goes_on(project, straight, tmp_path, where, call, left):
    recipe = recipe_of(project, tmp_path, *SETTINGS)
    settings = [f"run={recipe.run}", *SETTINGS]
    code = KILLED.format(where=where, call=call, recipe=str(project), settings=settings)
    with pytest.raises(AssertionError, match="rank 0 failed"):
        run_ranks(code, num_ranks=1)
    folders = [path.name for path in (recipe.run / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(folders) == left
    train.run(recipe)
    assert losses(recipe.run) == straight


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
    train.run(recipe_of(project, tmp_path, "steps=30", f"run={folder}"))
    assert losses(folder) == losses(straight)
