"""Sums over ranks are the gradient of one process."""

import json

import pytest
import tiny_run
import torch
from ranks import run_ranks

GRADIENT = """
import json
import torch
from internvl import dist, train
from internvl.config import recipes
from internvl.parallel import gradients
from internvl.training.run import reading

recipe = recipes.load_recipe({recipe!r}, {settings!r})
run = train.build(recipe)
run.optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.0)
kept = gradients.clip_gradients

def keep(parameters, limit):
    norm = kept(parameters, 1e9)
    torch.save([p.grad for p in parameters], {to!r} + str(dist.rank()) + ".pt")
    return norm

gradients.clip_gradients = keep
step = next(reading.steps(run))
train.train_step(run, step.batches)
print(json.dumps([name for row in step.batches for name in row.names]))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def test_the_sum_over_ranks_is_the_gradient_of_one(project, tmp_path):
    settings = ["steps=1", f"run={tmp_path / 'run'}"]
    found = {}
    for ranks in (1, 2):
        to = str(tmp_path / f"{ranks}-")
        code = GRADIENT.format(recipe=str(project), settings=settings, to=to)
        found[ranks] = [json.loads(out) for out in run_ranks(code, num_ranks=ranks)]
    assert all(found[2])
    assert sorted([*found[2][0], *found[2][1]]) == sorted(found[1][0])
    (whole, *halves) = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt")
    )
    for one, first, second in zip(whole, *halves, strict=True):
        assert (one is None) is (first is None)
        if one is not None:
            assert torch.equal(first, second)
            torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-6)
