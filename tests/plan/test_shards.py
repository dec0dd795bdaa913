"""Plans of several GPUs: what each holds and sends, by stage, and what makes a model fit."""

import json
import re
from pathlib import Path

import pytest

from internvl import plan, zoo
from internvl.config import recipes
from internvl.plan import memory, shards
from internvl.plan.load import load_of
from internvl.plan.work import FirstStep, Sequences, Work
from internvl.zoo import gpus

H200 = gpus.find("h200")


def released(name, shard="zero3", lora=None, **keys):
    model = {"id": f"OpenGVLab/{name}"} | ({"lora": {"rank": lora}} if lora else {})
    tree = {
        "model": model,
        "data": {"sources": [{"name": "s", "annotations": "none.jsonl"}], "max_tokens": 4096},
        "compute": {"checkpointing": "full"},
        "parallel": {"shard": shard},
        "run": "run",
        "global_batch": 128,
        "epochs": 1,
    }
    return recipes.resolve(tree | keys)


@pytest.fixture(scope="module")
def parts():
    """The smallest released model, counted for a recipe: (recipe, model on the meta device)."""
    recipe = plan.complete(released("InternVL2-1B")).recipe
    return recipe, plan.model_of(recipe)


def states_of(parts, shard, num_gpus=8, replicas=1):
    recipe, model = parts
    parallel = {} if shard == "none" else {"shard": shard, "replicas": replicas}
    recipe = recipes.resolve(recipes.to_tree(recipe) | {"parallel": parallel})
    cut = shards.of(model, recipe, num_gpus)
    load = load_of(recipe, model, None, num_gpus)
    return cut, memory.predict(model, recipe, load, num_gpus, cut=cut)


def test_every_stage_takes_less_than_the_one_before(parts):
    totals = [states_of(parts, s)[1].allocated_gib for s in ("none", "zero1", "zero2", "zero3")]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4


def test_states_are_cut_over_the_gpus_of_a_copy(parts):
    _, model = parts
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    for num_gpus, replicas in ((8, 1), (32, 1), (32, 4)):
        cut, footprint = states_of(parts, "zero3", num_gpus, replicas)
        assert cut.num_shards == num_gpus // replicas
        assert footprint.components["trained weights"] == 4 * trained / cut.num_shards
        assert footprint.components["optimizer states"] == 8 * trained / cut.num_shards
        # A frozen tower of this size stays whole.
        assert footprint.components["frozen weights"] == pytest.approx(2 * frozen, rel=1e-3)


def test_a_frozen_tower_runs_in_every_pass_of_preferences_under_shards():
    """As long as a vision part that trains; without shards its tokens are kept."""
    objective = {"name": "mpo", "reference": "live"}

    def passes_s(shard, train):
        recipe = recipes.to_tree(released("InternVL2-1B", shard, lora=16, objective=objective))
        recipe["model"]["train"] = train
        found = plan.make(recipes.resolve(recipe), H200, num_gpus=8)
        return found.component_s["passes without gradients"]

    whole, again = passes_s("none", []), passes_s("none", ["multi_modal_projector"])
    assert whole < again
    for shard in ("zero1", "zero2", "zero3"):
        assert passes_s(shard, []) == pytest.approx(again)


def test_units_are_those_of_training(parts):
    """The cut parameters, each in one unit."""
    recipe, model = parts
    cut = shards.of(model, recipe, 4)
    layers = len(model.model.language_model.layers)
    whole = sum(p.numel() for p in model.parameters() if id(p) in cut.whole)
    assert cut.all == sum(p.numel() for p in model.parameters()) - whole
    assert len(cut.others) == layers
    assert sum(unit.whole for unit in cut.tower) == 0  # frozen and small


def test_what_a_gpu_sends(parts):
    sent = {
        stage: {name: sent for name, sent, _ in states_of(parts, stage)[0].traffic(2)}
        for stage in ("zero1", "zero2", "zero3")
    }
    cut = states_of(parts, "zero3")[0]
    once = 7 / 8 * 2 * cut.all
    # Weights once a step; or twice a row, but for the root. Gradients once a step, or a row.
    assert sent["zero2"]["all-gather"] == pytest.approx(7 / 8 * 2 * cut.trained)
    assert once < sent["zero3"]["all-gather"] / 2 < 2 * once
    assert sent["zero1"]["reduce-scatter"] == 7 / 8 * 4 * cut.trained
    assert sent["zero2"]["reduce-scatter"] == 2 * sent["zero1"]["reduce-scatter"]
    hybrid = {name: sent for name, sent, _ in states_of(parts, "zero3", 16, 2)[0].traffic(1)}
    assert hybrid["all-reduce"] == pytest.approx(4 * cut.trained / 8)


def test_links_inside_a_machine_and_between():
    assert H200.link_gb_per_s(8) == pytest.approx(351)
    assert H200.link_gb_per_s(16) == pytest.approx(312)  # eight cards of 400 Gb/s a machine
    assert gpus.find("4090").link_gb_per_s(8) < 26


def test_gpus_that_do_not_divide_are_refused(parts):
    with pytest.raises(ValueError, match="6 GPUs do not divide into 4 copies"):
        states_of(parts, "zero3", 6, 4)


def test_the_plan_names_the_stage_that_fits_and_says_what_is_sent():
    large = released("InternVL2-40B", "none")
    text = plan.make(large, H200, None, 16).render()
    assert "DOES NOT FIT" in text
    assert re.search("parallel.shard=zero[123] makes it fit", text)
    text = plan.make(released("InternVL2-40B"), H200, None, 16).render()
    assert "zero3: 1 copy of the model, each over 16 GPUs" in text
    assert "all-gather" in text
    assert "waiting for messages" in text


def test_one_gpu_plans_as_without_shards():
    alone, cut = (released("InternVL2-1B", shard) for shard in ("none", "zero3"))
    plans = [plan.make(recipe, H200, None, 1) for recipe in (alone, cut)]
    assert plans[0].memory == plans[1].memory
    assert plans[0].component_s == plans[1].component_s


SLOW = pytest.mark.slow
# All on the GPUs of the original's scripts: zoo/test_recipe_table.py.
MANY = [
    ("internvl_chat_v1_2_sft", 64),
    pytest.param("internvl_chat_v1_2_sft_32gpus", 32, marks=SLOW),
    ("internvl2_40b_full", 16),
    ("internvl_14b_head_coco", 4),
    ("internvl_14b_full_coco", 32),
    pytest.param("internvl_14b_full_coco", 8, marks=SLOW),
]


@pytest.mark.parametrize(("name", "num_gpus"), MANY)
def test_recipes_for_many_gpus_fit_in_the_memory_that_they_state(name, num_gpus):
    (path,) = (Path(zoo.__file__).parent / "recipes").rglob(f"{name}.yaml")
    text = " ".join(path.read_text(encoding="utf-8").replace("\n#", " ").split())
    stated = [int(gib) for gib in re.findall(r"(\d+) GiB(?: of (?:each|them))?,? by plan", text)]
    planned = plan.make(recipes.load_recipe(path), gpus.find("a100-80"), None, num_gpus)
    assert planned.fits
    assert round(planned.memory.total_gib) in stated


def test_internvl_14b_on_four_gpus_takes_less_than_the_original():
    for method, original in (("head", 24), ("lora", 37)):
        made = recipes.load_recipe(f"internvl_14b_{method}_flickr30k")
        assert plan.make(made, gpus.find("a100-40"), None, 4).memory.total_gib <= original


def measured(row):
    """Figures of a row of benchmarks/rehearse.py, of one rank on an H200."""
    file = Path(__file__).parents[2] / "benchmarks/results/rehearse_h200.json"
    return next(figures for figures in json.loads(file.read_text()) if figures["row"] == row)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 1000, 700])
@pytest.mark.parametrize("num_gpus", [8, 32])
def test_the_peak_of_a_rank_of_40b(length, num_gpus):
    """Everything trained; the shorter the samples, the more tiles a row has."""
    figures = measured(f"40b_full_{num_gpus}")[str(length)]
    tiles = figures["tiles"]
    made = recipes.load_recipe(
        "internvl_chat_v1_2_sft_32gpus", [f"global_batch={tiles * num_gpus}"]
    )
    rows = Sequences(1, length * tiles, tiles * length * (length + 1) / 2)
    row = Work(samples=tiles, tiles=tiles, supervised=4096, rows=rows)
    step = FirstStep((row,) * num_gpus, row * num_gpus, tiles * num_gpus)
    planned = plan.make(made, H200, step, num_gpus)
    assert planned.memory.allocated_gib == pytest.approx(figures["allocated_gib"], rel=0.05)


def test_a_backward_pass_has_a_copy_less_of_a_unit_than_a_forward_pass(parts):
    cut = states_of(parts, "zero3")[0]
    largest = max(unit.whole for unit in cut.others)
    forward, backward = (cut.gathered(cut.others, n) for n in (shards.FORWARD, shards.BACKWARD))
    assert forward - backward == 2 * largest
    # What was sent before is on its way, or a unit's own gradients are whole: never both.
    assert cut.on_their_way(cut.others) == 4 * max(unit.trained for unit in cut.others)
    assert cut.unit_gradients(cut.others) == 6 * max(unit.trained for unit in cut.others)
    # The gradient of the embedding, tied to the output matrix here or not, and the heads'.
    assert cut.head_gradients(1) == 2 * cut.root_early


def test_gradients_of_several_micro_batches_are_there_all_the_time(parts):
    recipe, model = parts
    assert load_of(recipe, model, None, 8).per_gpu(8) > 1
    for stage in ("zero2", "zero3"):
        cut, footprint = states_of(parts, stage)
        assert footprint.components["gradients"] == 4 * cut.trained / cut.num_shards


@pytest.mark.parametrize(("method", "num_gpus"), [("head", 4), ("lora", 4), ("full", 32)])
def test_the_peak_of_a_rank_of_internvl_14b(method, num_gpus):
    """Beside one of an H200; captions are assumed to be longer than those that were measured."""
    made = recipes.load_recipe(f"internvl_14b_{method}_flickr30k")
    planned = plan.make(made, H200, None, num_gpus)
    figures = measured(f"14b_{method}_{num_gpus}")
    assert planned.memory.allocated_gib == pytest.approx(figures["allocated_gib"], rel=0.06)
