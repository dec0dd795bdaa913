"""One rank of many in one process: the memory of a real rank, its rows, and no loss."""

import json
import re

import pair_runs
import pytest
import tiny_run
from ranks import run_ranks

from internvl import cli
from internvl.check import rehearse
from internvl.config import recipes
from internvl.zoo import gpus

STAGES = ("zero1", "zero3")
ADAPTED = ("model.train=[multi_modal_projector]", "model.lora.rank=4")

REAL = """
import json
from internvl import train
from internvl.check import rehearse
from internvl.config import recipes
from internvl.training.run import reading

peaks = {{}}
for stage in {stages!r}:
    recipe = recipes.load_recipe({recipe!r}, [f"parallel.shard={{stage}}", "steps=1"])
    state = train.build(recipe)
    batches = next(iter(reading.steps(state))).batches
    with rehearse.peak_bytes(state) as peak:
        for _ in range(2):
            train.train_step(state, batches)
    peaks[stage] = [peak[0], sum(batch.num_tokens for batch in batches)]
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


@pytest.mark.slow
def test_memory_is_that_of_a_real_rank_of_two(project):
    ranks = [json.loads(out) for out in run_ranks(REAL.format(stages=STAGES, recipe=str(project)))]
    peaks = []
    for stage in STAGES:
        # What a CPU computes with, so that the plan counts the same.
        computed = ["compute.compile=false", "compute.attention=dense"]
        recipe = recipes.load_recipe(project, [f"parallel.shard={stage}", *computed])
        rehearsed = rehearse.run(recipe, 2, gpus.find("h200"), steps=3)
        assert rehearsed.tokens in [rank[stage][1] for rank in ranks]
        real = max(rank[stage][0] for rank in ranks)
        assert rehearsed.peak_bytes == pytest.approx(real, rel=0.08)
        planned = rehearsed.plan.memory.allocated_gib * 2**30
        assert planned == pytest.approx(rehearsed.peak_bytes, rel=0.15)
        peaks.append(rehearsed.peak_bytes)
    assert peaks[0] > 1.05 * peaks[1]


def test_gradients_of_layers_that_two_forms_read_are_planned(tmp_path):
    """Whole until both have run back; here most of the memory, for layers are wide and few."""
    file = pair_runs.make(tmp_path)
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    config["qllama_config"]["intermediate_size"] = 8192
    (tmp_path / "start" / "config.json").write_text(json.dumps(config))
    compute = "compute={compile: false, checkpointing: full}"
    changes = ["parallel.shard=zero3", compute, "global_batch=16", "evals={}"]
    rehearsed = rehearse.run(recipes.load_recipe(file, changes), 8, gpus.find("h200"), steps=2)
    planned = rehearsed.plan.memory.allocated_gib * 2**30
    assert planned == pytest.approx(rehearsed.peak_bytes, rel=0.05)


def test_the_command_prints_what_was_measured_beside_the_plan_and_no_loss(project, capsys):
    words = ["check", str(project), "--rehearse", "--gpus", "16", "--gpu", "h200"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "parallel.shard=zero3"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    # What is cut off says where it was.
    phases = re.findall(r"rehearsal: (.+) \([\d.]+ s\)", err)
    drawn = ["model cut, weights drawn", "rows of the step read"]
    assert phases[2:] == [*drawn, "first step taken", *["step taken"] * 3], err
    assert "rehearsal of one rank of 16 on this CPU (parallel.shard=zero3, replicas=1)" in out
    assert "planned" in out
    assert "fits H200" in out
    assert "loss" not in out.replace("no loss: the stand-in", "")


def test_steps_of_rows_and_copies_of_shards(project):
    rows = ["global_batch=null", "global_batch_rows=8", "data.packing=official"]
    shards = ["parallel.shard=zero2", "parallel.replicas=2"]
    recipe = recipes.load_recipe(project, [*rows, *shards])
    rehearsed = rehearse.run(recipe, 4, steps=3)
    assert len(rehearsed.batches) == 2
    assert rehearsed.tokens > 256  # two rows, nearly full


def test_what_does_not_fit_is_said(project):
    small = gpus.Gpu("toy", 0.5, 100.0, 1.0)
    rehearsed = rehearse.run(recipes.load_recipe(project), 1, small, steps=3)
    assert "DOES NOT FIT toy (0.5 GiB)" in rehearsed.render()


def test_quantized_weights_are_refused(project):
    recipe = recipes.load_recipe(project, [*ADAPTED, "model.quantize=4bit"])
    with pytest.raises(ValueError, match="a rehearsal draws weights and does not quantize"):
        rehearse.run(recipe, 2)


def test_an_objective_that_measures_its_first_model_is_refused(project):
    recipe = recipes.load_recipe(project, ["objective.name=mpo"])
    with pytest.raises(ValueError, match="mpo measures its first model .* use --plan"):
        rehearse.run(recipe, 2)
