"""Training in steps of packed rows: resumed bit for bit, and the same on one rank and two."""

import json
import shutil

import pytest
import tiny_run
import torch
from ranks import run_ranks

from internvl import check, log, plan, train
from internvl.config import recipes
from internvl.errors import CheckpointError, RunError
from internvl.zoo import gpus

TRAIN = """
from internvl import train
from internvl.config import recipes

train.run(recipes.load_recipe({recipe!r}, {settings!r}))
"""
ROWS = ["global_batch=null", "global_batch_rows=3", "steps=7", "checkpoint.every=3"]
PACKINGS = {
    "best-fit": [],
    "official": ["data.packing=official", "data.packing_buffers=2", "data.share_prefix=false"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def curve(folder):
    rows = log.StepLog(folder, "metrics.jsonl").rows()
    assert {row["rows"] for row in rows} == {3}
    return [(row["step"], row["samples"], row["loss"], row["grad_norm"]) for row in rows]


def go_back(folder):
    """As if the process had been killed after step 6 and its checkpoint."""
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "000007")


def close(one, other):
    assert [row[:2] for row in one] == [row[:2] for row in other]
    assert torch.allclose(torch.tensor(one), torch.tensor(other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", ["official", pytest.param("best-fit", marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit_and_on_two_ranks(project, tmp_path, packing):
    lora = ["model.train=[]", "model.lora={rank: 4, dropout: 0}"]  # ranks draw other dropout
    settings = [*ROWS, *PACKINGS[packing], *lora]
    folder = tmp_path / "run"
    recipe = recipes.load_recipe(project, [*settings, f"run={folder}"])
    train.run(recipe)
    whole = curve(folder)
    saved = json.loads((folder / "checkpoints" / "000006" / "state.json").read_text())
    assert saved["position"]["samples"] >= sum(row[1] for row in whole[:6])
    assert saved["position"]["open"]  # so that something waits across the interruption
    go_back(folder)
    train.run(recipe)
    assert curve(folder) == whole
    go_back(folder)
    run_ranks(TRAIN.format(recipe=str(project), settings=[*settings, f"run={folder}"]))
    assert curve(folder)[:6] == whole[:6]
    close(curve(folder), whole)
    with pytest.raises(RunError, match=r"data.row_tokens was None, is 300"):
        train.run(recipes.load_recipe(project, [*settings, f"run={folder}", "data.row_tokens=300"]))
    go_back(folder)
    state = folder / "checkpoints" / "000006" / "state.json"
    state.write_text(json.dumps({**saved, "position": {"samples": "many"}}))
    with pytest.raises(CheckpointError, match="`position` is none of a run"):
        train.run(recipe)


def test_two_ranks_take_the_same_steps_as_one(project, tmp_path):
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        settings = [*ROWS, "steps=4", "checkpoint.every=0", f"run={folder}"]
        run_ranks(TRAIN.format(recipe=str(project), settings=settings), num_ranks=ranks)
        found[ranks] = curve(folder)
    close(found[1], found[2])


def test_it_is_checked_and_planned(project, tmp_path):
    recipe = recipes.load_recipe(project, [*ROWS, f"run={tmp_path / 'run'}"])
    checked = check.run(recipe)
    assert not checked.problems
    assert "7 steps of 3 rows" in checked.arithmetic
    assert "the first step: 3 rows" in checked.arithmetic
    first = next(train.updates(train.build(recipe)))
    assert (checked.step.work.samples, checked.step.work.rows.tokens) == (
        first["samples"],
        first["tokens"],
    )
    assumed = plan.make(recipe, gpus.find("H200")).load
    assert assumed.micro_batches == pytest.approx(3)
    counted = plan.make(recipe, gpus.find("H200"), checked.step).load
    assert counted.micro_batches == 3
