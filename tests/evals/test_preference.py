"""Accuracy and margin of held-out pairs, against two plain models."""

import preference_runs
import pytest
import torch

from internvl import train
from internvl.config import recipes
from internvl.files import read_numbers
from internvl.training.run import saving

EVAL = {"type": "preference", "max_tokens": 256, "before": True}
ADAPTERS = ["model.train=[]", "model.lora={rank: 4, dropout: 0.0}"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    still = [pair for pair in preference_runs.PAIRS if "video" not in pair]
    pairs = folder / "pairs.jsonl"
    source = {"annotations": str(pairs), "images": str(folder)}
    return preference_runs.make(folder, still, evals={"held_out": {**EVAL, **source}})


@pytest.mark.parametrize(
    "settings", [ADAPTERS, pytest.param([], marks=pytest.mark.slow)], ids=["adapters", "full"]
)
def test_margins_are_those_of_two_models(project, tmp_path, settings):
    folder = tmp_path / "run"
    settings = [*settings, f"run={folder}", "steps=3", "optim.lr=0.01"]
    recipe = recipes.load_recipe(project, settings)
    train.run(recipe)
    before, after = (read_numbers(folder / f"evals/{n:06d}.json", "") for n in (0, 3))
    assert before["held_out/margin"] == pytest.approx(0, abs=1e-5)
    state = train.build(recipe)
    saving.resume(state)
    plain = preference_runs.TwoModels(state.recipe)
    rewards = []
    with torch.no_grad():
        for chosen, rejected, tiles in preference_runs.encoded(state):
            ours = [plain.logps(state.model.eval(), e, tiles)[0] for e in (chosen, rejected)]
            theirs = [plain.logps(plain.reference, e, tiles)[0] for e in (chosen, rejected)]
            rewards.append([0.1 * float(a - b) for a, b in zip(ours, theirs, strict=True)])
    margins = [chosen - rejected for chosen, rejected in rewards]
    assert after["held_out/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert after["held_out/accuracy"] == sum(m > 0 for m in margins) / len(margins)
    assert max(map(abs, margins)) > 1e-3
