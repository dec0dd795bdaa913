"""More epochs for a finished run: what goes on exactly, what is refused, by which words."""

import json
import shutil

import pytest
import tiny_run
from tiny_run import losses, recipe_of

from internvl import check, log, train
from internvl.config import recipes
from internvl.config.recipes import load_recipe
from internvl.data import sampler
from internvl.data.sampler import SampleOrder
from internvl.data.sources import open_sources
from internvl.errors import RunError, UserError
from internvl.training import length, optim

# 48 samples: the last of five steps has 8 instead of 10.
PARTIAL = ("steps=null", "global_batch=10", "checkpoint.every=1", "checkpoint.keep=99")
CONSTANT = ("optim.min_lr_ratio=1", "optim.warmup_steps=0")
LORA = ("model.train=[]", "model.lora={rank: 4}")  # dropout: the RNG must go on too


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory):
    """A run of one epoch whose last step was smaller; tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    return train.run(recipe_of(project, folder, *PARTIAL, "epochs=1"))


def rows(folder):
    return log.StepLog(folder, "metrics.jsonl").rows()


def go_back(folder, step):
    """Removes what a run wrote after `step`, as if its machine had gone then."""
    (folder / "finished.json").unlink()
    for saved in (folder / "checkpoints").iterdir():
        if saved.name.isdigit() and int(saved.name) > step:
            shutil.rmtree(saved)


def test_less_data_than_a_step_is_said_before_a_run_of_no_step(project, tmp_path):
    # As the original's scripts are translated: 512 samples a step, and a rest is left out.
    large = ("steps=null", "epochs=1", "global_batch=512", "drop_last=true")
    recipe = recipe_of(project, tmp_path, *large)
    said = "48 samples in all are less than a step of 512, .* set global_batch=48 or less"
    with pytest.raises(RunError, match=said):
        train.run(recipe)
    (problem,) = check.run(recipe).problems
    assert problem.reason.startswith("48 samples in all are less than a step of 512")
    few = recipe_of(project, tmp_path, *large[:1], "global_batch=48", "epochs=0.001")
    with pytest.raises(RunError, match="epochs = 0.001 of 48 samples are none; raise epochs"):
        train.run(few)
    # Nothing is in the way of the run that the message asks for.
    train.run(recipe_of(project, tmp_path, *large, "global_batch=48"))


def test_without_a_decay_two_times_one_epoch_are_two_epochs_bit_for_bit(project, tmp_path, caplog):
    settings = [*CONSTANT, *LORA, "steps=null"]
    straight = train.run(
        recipe_of(project, tmp_path, f"run={tmp_path / 'whole'}", *settings, "epochs=2")
    )
    run = train.run(recipe_of(project, tmp_path, *settings, "epochs=1"))
    assert len(losses(run)) == 6
    with caplog.at_level("INFO", logger="internvl"):
        log.get_logger().propagate = True
        train.run(load_recipe(run, ["epochs=2"]))
    assert losses(run) == losses(straight)
    assert "from step 6 to 12; its learning rates so far were those of the longer" in caplog.text
    for name in ("adapter/adapter_model.safetensors", "finished.json"):
        assert (run / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.slow
def test_every_epoch_shows_every_sample_and_a_resume_goes_on_exactly(finished, tmp_path, caplog):
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(finished, run)
    before = rows(run)
    with caplog.at_level("INFO", logger="internvl"):
        log.get_logger().propagate = True
        train.run(load_recipe(run, ["epochs=3"]))
    assert "rates so far were those of a run of 5 steps; from here on" in caplog.text
    after = rows(run)
    assert after[:5] == before
    assert [row["samples"] for row in after] == [10, 10, 10, 10, 8, *[10] * 9, 6]
    # The schedule is that of fifteen steps, as its formula gives it.
    recipe = load_recipe(run)
    for row in after[5:]:
        assert row["lr"] == optim.lr_at(row["step"] - 1, 15, recipe.optim)
    shutil.copytree(run, again)
    for step in (11, 7, 5):
        go_back(again, step)
        train.run(load_recipe(again))
        assert losses(again) == losses(run)
    # And once more, as a number of steps: 10 a step from the end of the third epoch on.
    train.run(load_recipe(run, ["steps=17"]))
    assert [row["samples"] for row in rows(run)][15:] == [10, 10]


def test_the_samples_of_longer_runs_are_those_of_whole_epochs(finished):
    recipe = load_recipe(finished)
    order = SampleOrder(
        open_sources(recipe.data), share_prefix=recipe.shares_prefix, seed=recipe.seed
    )
    ended = [sampler.Ending(5, 48), sampler.Ending(10, 96)]
    num_steps, total = length.of_run(load_recipe(finished, ["epochs=3"]), order, ended)
    assert (num_steps, total) == (15, 144)
    for epoch in range(3):
        lines = [
            line
            for step in range(5 * epoch, 5 * epoch + 5)
            for ref in order.between(*sampler.step_bounds(step, 10, total, ended))
            for line in ref.lines
        ]
        assert sorted(lines) == list(range(48))


def test_a_run_of_an_earlier_version_is_counted(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    end = json.loads((run / "finished.json").read_text())
    assert end == {"step": 5, "samples": 48, "why": "all steps are done"}
    (run / "finished.json").write_text(json.dumps({"step": 5, "why": end["why"]}))
    train.run(load_recipe(run, ["epochs=2"]))
    assert [row["samples"] for row in rows(run)] == [10, 10, 10, 10, 8] * 2


@pytest.mark.slow
def test_rows_go_on_where_they_waited(project, tmp_path):
    settings = ["global_batch_rows=2", *CONSTANT]
    whole = f"run={tmp_path / 'whole'}"
    straight = train.run(recipe_of(project, tmp_path, whole, *settings, "steps=6"))
    run = train.run(recipe_of(project, tmp_path, *settings, "steps=3"))
    train.run(load_recipe(run, ["steps=6"]))
    assert losses(run) == losses(straight)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["epochs=0.5"],
            "finished after 5 steps, and the new length is not longer (epochs was",
        ),
        (["steps=4"], "the new length is not longer"),
        (["epochs=2", "optim.lr=0.1"], "another recipe (optim.lr was 0.001, is 0.1); set it back"),
    ],
)
def test_what_is_not_more_of_the_same_is_refused_by_name(finished, tmp_path, overrides, said):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with pytest.raises(RunError) as refused:
        train.run(load_recipe(run, overrides))
    assert said in str(refused.value)
    assert load_recipe(run).epochs == 1  # nothing is changed by what is refused
    assert (run / "finished.json").exists()


def test_an_unfinished_run_is_refused_and_a_finished_one_says_how(finished, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    go_back(run, 3)
    with pytest.raises(RunError, match=r"not finished \(epochs was 1.0, is 2.0\); let it end"):
        train.run(load_recipe(run, ["epochs=2"]))
    with caplog.at_level("INFO", logger="internvl"):
        log.get_logger().propagate = True
        train.run(load_recipe(run))
        train.run(load_recipe(run))
    assert f"is finished; `internvl train {run} epochs=2` goes on with it" in caplog.text
    assert losses(run) == losses(finished)


def test_a_moved_run_goes_on_where_it_is_now(finished, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved)
    recipe = load_recipe(moved)
    assert recipe.run == moved
    assert recipes.differences(load_recipe(finished), recipe) == []


@pytest.mark.parametrize("text", ["[]", "{", '{"endings": [{"step": "x", "samples": 1}]}', "{}"])
def test_a_damaged_note_of_earlier_ends_is_refused(tmp_path, text):
    (tmp_path / "endings.json").write_text(text)
    with pytest.raises(UserError, match=r"endings.json is damaged .*; restore it"):
        length.endings(tmp_path)
