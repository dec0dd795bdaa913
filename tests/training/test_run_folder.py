"""A run's folder: what lies in it, who may write to it, and when it is finished."""

import dataclasses
import os

import pytest
import tiny_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import losses, recipe_of

from internvl import log, train
from internvl.config import recipes
from internvl.errors import BadSample
from internvl.inference import load as loading
from internvl.models import bases
from internvl.training import run_folder, saved_steps

HELD = rf"another process is training in .*run \(process {os.getpid()} on \S+, since 20\d\d-"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def test_a_finished_run_says_so(project, tmp_path, caplog):
    recipe = recipe_of(project, tmp_path, "steps=2")
    train.run(recipe)
    before = losses(recipe.run)
    with caplog.at_level("INFO", logger="internvl"):
        log.get_logger().propagate = True
        train.run(recipe)
    assert "is finished" in caplog.text
    assert losses(recipe.run) == before


def test_the_run_folder(project, tmp_path):
    recipe = recipe_of(project, tmp_path, "steps=12")
    train.run(recipe)
    assert recipes.load_recipe(recipe.run / "recipe.yaml") == loading.complete(recipe).recipe
    saved = sorted(p.name for p in (recipe.run / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == ["000010", "000012"]  # keep = 2
    assert (recipe.run / "checkpoints" / "LATEST").read_text().strip() == "000012"
    rows = log.StepLog(recipe.run, "metrics.jsonl").rows()
    assert [row["samples"] for row in rows] == [8] * 12
    assert rows[-1]["loss"] < rows[0]["loss"]
    events = EventAccumulator(str(recipe.run / "tensorboard")).Reload()
    wanted = ("loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "data_wait_s")
    for name in (*wanted, "memory_gib"):
        assert len(events.Scalars(name)) == 12
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r["loss"] for r in rows])


def test_a_second_process_and_another_recipe_are_refused(project, tmp_path):
    recipe = recipe_of(project, tmp_path, "steps=2")
    with (
        run_folder.owned(recipe),
        pytest.raises(train.RunError, match=HELD),
    ):
        train.run(recipe)
    train.run(recipe)
    with pytest.raises(train.RunError, match="optim.lr was 0.001, is 0.01"):
        train.run(recipe_of(project, tmp_path, "steps=2", "optim.lr=0.01"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(train.RunError, match="not empty and no run"):
        train.run(recipe_of(project, tmp_path, f"run={tmp_path / 'full'}"))


def test_a_run_that_failed_before_its_first_step_takes_what_its_message_asks_for(project, tmp_path):
    short = recipe_of(project, tmp_path, "steps=1", "data.max_tokens=20", "data.tiles.size=32")
    with pytest.raises(BadSample, match="Raise data.max_tokens"):
        train.run(short)
    assert not saved_steps.has_begun(short.run)
    # As if the base had been made anew since.
    (place,) = bases.read(short.run).values()
    bases.write(short.run, {"id": dataclasses.replace(place, name="older", digest="0" * 16)})
    bases.write(short.run, {"id": dataclasses.replace(place, digest="0" * 16)})
    assert bases.read(short.run)["id"].digest == "0" * 16
    recipe = recipe_of(project, tmp_path, "steps=1", "data.max_tokens=256")
    train.run(recipe)
    assert bases.read(recipe.run)["id"] == place
    saved = recipes.load_recipe(recipe.run / "recipe.yaml")
    # The first recipe's own values are gone with it.
    assert (saved.data.max_tokens, saved.data.tiles.size) == (256, 64)
    assert saved_steps.has_begun(recipe.run)
