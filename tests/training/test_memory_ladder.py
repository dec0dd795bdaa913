"""The fall-back ladder: every rung is a setting of a recipe, taken one after the other."""

import pytest

from internvl.config import recipes
from internvl.errors import ConfigError
from internvl.training import memory_ladder

TREE = {
    "model": {"id": "m"},
    "data": {"sources": [{"name": "x", "annotations": "x.jsonl"}], "row_tokens": 32768},
    "run": "r",
    "global_batch": 8,
    "epochs": 1,
}


def climb(**changes):
    recipe = recipes.resolve({**TREE, **changes})
    settings = []
    while (found := memory_ladder.next_rung(recipe)) is not None:
        rung, value = found
        assert memory_ladder.advice(recipe).startswith(f"Set {rung.key}={value}")
        settings.append(f"{rung.key}={value}")
        following = recipes.resolve({**TREE, **changes}, settings)
        changed = recipes.differences(recipe, following)
        # What keeps the results is what a run folder may change, and the other way round.
        assert (changed == []) is rung.keeps_results
        recipe = following
    assert "every setting that saves memory is in use" in memory_ladder.advice(recipe)
    return settings


SAME = [
    "compute.checkpointing=selective",
    "compute.checkpointing=full",
    "data.row_tokens=16384",
    "data.row_tokens=8192",
    "compute.offload=true",
]


def test_full_training_ends_with_moments_on_the_cpu():
    assert climb()[:6] == [*SAME, "optim.offload=true"]
    assert "optim.offload=true" not in climb(optim={"name": "adamw-8bit"})
    with pytest.raises(ConfigError, match="optim.offload: only with optim.name: adamw"):
        climb(optim={"name": "adamw-8bit", "offload": True})


def test_adapters_end_with_a_smaller_base():
    assert climb(model={"id": "m", "lora": {"rank": 4}})[:6] == [*SAME, "model.quantize=4bit"]


def test_pairs_are_encoded_in_smaller_parts():
    cuts = [f"objective.micro_batch={number}" for number in (4, 2, 1)]
    checkpointing, offload = SAME[:2], SAME[-1]
    found = climb(objective={"name": "retrieval"}, model={"id": "m", "train": ["heads"]})
    assert found == [*checkpointing, *cuts, offload, "optim.offload=true"]


@pytest.mark.parametrize("rung", memory_ladder.LADDER, ids=lambda rung: rung.key)
def test_every_rung_says_what_it_saves_and_costs(rung):
    assert rung.saves
    assert rung.costs
