"""Spikes and numbers that are none: named, stopped or skipped, and judged alike after a resume."""

import json
import math
import random
import shutil

import pytest
import tiny_run
import torch

from internvl import log, train
from internvl.config import GuardConfig, recipes
from internvl.training import spikes
from internvl.training.spikes import Guard


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def remembering(steps, **settings):
    guard, draw = Guard(GuardConfig(window=16, **settings)), random.Random(0)
    for _ in range(steps):
        guard.remember(draw.gauss(2, 0.1), draw.gauss(1, 0.05))
    return guard


def test_a_spike_is_measured_against_the_median_of_the_window():
    guard = remembering(40, loss_spike=10.0, grad_spike=10.0)
    assert len(guard.losses) == 16
    middle, deviation = spikes.spread(guard.losses)
    assert (middle, deviation) == (pytest.approx(2, abs=0.1), pytest.approx(0.1, abs=0.06))
    assert guard.objection(41, middle + 9.9 * deviation, 1.0) is None
    assert guard.objection(41, 0.0, 0.0) is None  # lower is no spike
    said = guard.objection(41, middle + 12 * deviation, 1.0)
    assert said.startswith("the loss of step 41 is ")
    assert "12 deviations above" in said
    assert "16 steps before (guard.loss_spike = 10)" in said
    assert "gradient norm of step 41 is 9" in guard.objection(41, 2.0, 9.0)


def test_one_outlier_in_the_window_moves_nothing():
    guard = remembering(16, loss_spike=10.0)
    before = spikes.spread(guard.losses)
    guard.losses[3] = 1e6
    after = spikes.spread(guard.losses)
    assert after == (pytest.approx(before[0], rel=0.05), pytest.approx(before[1], rel=0.5))


def test_equal_losses_do_not_make_the_next_one_a_spike():
    guard = Guard(GuardConfig(loss_spike=5.0, window=8))
    for _ in range(8):
        guard.remember(2.0, 1.0)
    assert guard.objection(9, 2.05, 1.0) is None
    assert guard.objection(9, 2.2, 1.0)


@pytest.mark.parametrize(("steps", "settings"), [(15, {"loss_spike": 3.0}), (40, {})])
def test_without_a_window_or_a_limit_only_numbers_count(steps, settings):
    guard = remembering(steps, **settings)
    assert guard.objection(1, 1e9, 1e9) is None
    assert guard.objection(7, math.nan, 1.0) == "the loss of step 7 is not a finite number"
    assert guard.objection(7, 1.0, math.inf) == "the gradient of step 7 is not a finite number"


def test_the_row_that_is_named():
    class Row:
        def __init__(self, *names):
            self.names = names

    rows = [Row("a"), Row("b", "c"), Row("d")]
    assert spikes.worst(rows, [1.0, 3.0, 2.0]) == (3.0, ("b", "c"))
    assert spikes.worst(rows, [9.0, 3.0, math.nan]) == (math.inf, ("d",))
    assert spikes.worst([], []) == (-math.inf, ())


def settings(folder, **changes):
    guard = {"loss_spike": 0.5, "window": 8, "action": "skip", "max_skipped": 99, **changes}
    return [f"run={folder}", "optim.lr=1e-4", "steps=24", f"guard={json.dumps(guard)}"]


def kept(folder):
    metrics = [
        (row["step"], row["loss"], row["grad_norm"], row.get("skipped"))
        for row in log.StepLog(folder, "metrics.jsonl").rows()
    ]
    return metrics, log.StepLog(folder, spikes.SKIPPED).rows()


@pytest.mark.slow
def test_skipped_steps_are_listed_and_the_same_after_a_resume(project, tmp_path):
    """A limit so low that ordinary steps are skipped."""
    recipe = recipes.load_recipe(project, settings(tmp_path / "run"))
    train.run(recipe)
    metrics, skipped = kept(recipe.run)
    steps = [row["step"] for row in skipped]
    assert steps == [step for step, *_, mark in metrics if mark]
    assert 1 <= len(steps) <= 12
    assert min(steps) > 8
    assert any(step > 20 for step in steps)
    for row in skipped:
        assert f"the loss of step {row['step']} is " in row["reason"]
        assert all("train.jsonl line" in name for name in row["samples"])
    shutil.rmtree(recipe.run / "checkpoints" / "000024")
    (recipe.run / "finished.json").unlink()
    train.run(recipe)
    assert kept(recipe.run) == (metrics, skipped)


def test_a_skipped_step_leaves_the_weights_and_moments_alone(project, tmp_path):
    run = train.build(recipes.load_recipe(project, settings(tmp_path / "run", loss_spike=1e-6)))
    done = train.updates(run)
    for _ in range(30):
        before = [p.clone() for p in run.model.parameters()]
        numbers = next(done)
        same = all(map(torch.equal, before, run.model.parameters()))
        assert same is (numbers["lr"] == 0 or "skipped" in numbers)
        if "skipped" in numbers:
            break
    assert same
    assert run.guard.num_skipped == 1
    assert numbers["loss"] not in run.guard.losses


def test_a_spike_stops_or_too_many_do(project, tmp_path):
    low = recipes.load_recipe(
        project, settings(tmp_path / "a", loss_spike=1e-6, action="stop") + ["optim.lr=1e-9"]
    )
    with pytest.raises(train.RunError) as caught:
        train.run(low)
    found = str(caught.value)
    assert "from a row of " in found
    assert "train.jsonl line" in found
    assert "(guard.action=skip)" in found
    again = recipes.load_recipe(
        project, settings(tmp_path / "a", loss_spike=1e-6, max_skipped=2) + ["optim.lr=1e-9"]
    )
    with pytest.raises(train.RunError, match="3 steps were skipped, more than guard.max_skipped"):
        train.run(again)  # the recipe of a run folder may change its guard
