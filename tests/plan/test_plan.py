"""plan: against the measured steps, what does not fit, and the command line."""

import json
from dataclasses import replace
from pathlib import Path

import pair_runs
import pytest
import yaml
from data_files import chat_line, model_folder, picture, recipe, write_lines

from internvl import check, cli, plan
from internvl.config import recipes
from internvl.errors import UserError
from internvl.plan.work import FirstStep, Sequences, Work
from internvl.zoo import gpus

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = ROOT / "recipes" / "internvl_14b"


def released(name, rank=128, **keys):
    tree = {
        "model": {"id": f"OpenGVLab/{name}"},
        "data": {
            "sources": [{"name": "coco", "annotations": "none.jsonl"}],
            "tiles": {"max": 6},
            "max_tokens": 4096,
            "row_tokens": 16384,
            "max_tiles": 96,
        },
        "run": "run",
        "global_batch": 64,
        "epochs": 1,
    }
    if rank:
        tree["model"]["lora"] = {"rank": rank, "dropout": 0.0}
    return recipes.resolve(tree | keys)


def step_of(row):
    """What a measured step held, from its JSON."""
    samples, tokens = row["samples_per_step"], row["tokens_per_sample"]
    shared = 5 if "shared" in row["row"] else 1  # samples of an image, one prefix
    rows = round(row["rows_per_step"])
    attended_pairs = samples / shared * (shared * tokens) ** 2 / 2
    work = Work(
        samples,
        samples * row["tiles_per_sample"],
        samples * row["supervised_per_sample"],
        Sequences(rows, samples * tokens, attended_pairs),
    )
    one_row = Work(rows=Sequences(1, round(samples * tokens / rows)))
    return FirstStep((one_row,) * rows, work, 566_747)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "1b_coco_no_dropout",
        pytest.param("2b_coco_no_dropout", marks=slow),
        "2b_coco_shared_no_dropout",
        pytest.param("8b_coco_no_dropout", marks=slow),
        pytest.param("2b_full", marks=slow),
    ],
)
def test_the_prediction_is_near_what_was_measured(name):
    """Memory within the stated error; the times are of the calibration's own rows, measured with
    FlashAttention 4."""
    row = json.loads((RESULTS / f"train_{name}.json").read_text())
    rank = None if row["method"] == "full" else 128
    made = released(row["model"], rank, global_batch=row["samples_per_step"])
    made = replace(made, data=replace(made.data, row_tokens=row["row_tokens"]))
    made = replace(made, compute=replace(made.compute, attention="flash"))
    found = plan.make(made, gpus.find("H200"), step_of(row))
    assert found.memory.allocated_gib == pytest.approx(row["peak_gib"], rel=plan.MEMORY_ERROR)
    assert found.samples_per_s == pytest.approx(row["samples_per_s"], rel=0.1)
    needed = found.flops.needed / row["samples_per_step"] / 1e12
    assert needed == pytest.approx(row["tflop_per_sample"], rel=0.01)


@pytest.mark.parametrize(
    ("model", "samples_per_s", "peak_gib"),
    [("1b", 39.96, 14.26), pytest.param("2b", 25.83, 27.21, marks=slow)],
)
def test_dropout_is_in_the_prediction(model, samples_per_s, peak_gib):
    """The recipes as they are, on one H200 with FlexAttention."""
    row = json.loads((RESULTS / f"train_{model}_coco_no_dropout.json").read_text())
    made = released(row["model"], global_batch=row["samples_per_step"])
    made = replace(made, data=replace(made.data, row_tokens=row["row_tokens"]))
    lora = replace(made.model.lora, dropout=0.05)
    found = plan.make(
        replace(made, model=replace(made.model, lora=lora)), gpus.find("H200"), step_of(row)
    )
    assert found.samples_per_s == pytest.approx(samples_per_s, rel=0.1)
    assert found.memory.allocated_gib == pytest.approx(peak_gib, rel=0.05)
    assert found.component_s["dropout of adapters"] > 0


def test_small_models_in_4_bits_wait_for_the_host():
    work = Work(19, 123.5, 247, Sequences(5, 19 * 1710, 19 * 1710**2 / 2))
    step = FirstStep((Work(rows=Sequences(1, 7000)),) * 5, work, 100)
    seconds = []
    for quantize in (None, "4bit"):
        made = released("InternVL2-1B", global_batch=19)
        made = replace(made, data=replace(made.data, row_tokens=8192))
        made = replace(made, model=replace(made.model, quantize=quantize))
        found = plan.make(made, gpus.find("H200"), step)
        assert ("waiting for the host" in found.component_s) == (quantize is not None)
        seconds.append(found.step_s)
    measured = {row["row"]: row for row in json.loads((RESULTS / "memory_h200.json").read_text())}
    for name, predicted in zip(("1b_lora", "1b_qlora"), seconds, strict=True):
        assert predicted == pytest.approx(min(measured[name]["step_s"][1:]), rel=0.1)


def test_what_fits_and_what_makes_it_fit():
    h200 = plan.make(released("InternVL2-2B"), gpus.find("H200"))
    assert h200.fits
    assert h200.remedy == ""
    assert "125,829,120 of" in h200.render()
    small = plan.make(released("InternVL2-2B"), gpus.find("4090"))
    assert not small.fits
    text = small.render()
    assert "DOES NOT FIT: " in text
    assert "compute.checkpointing=full makes it fit" in text
    made = released("InternVL2-2B", compute={"checkpointing": "full"})
    assert plan.make(made, gpus.find("4090")).fits
    # Preference optimization too: no second model, no logits of two answers.
    for name in ("internvl2_5_2b_mpo_lora", "internvl3_2b_mpo_lora"):
        assert plan.make(recipes.load_recipe(name), gpus.find("4090")).fits


@pytest.mark.slow
def test_the_ladder_is_climbed_together_where_no_setting_is_enough():
    found = plan.make(released("InternVL2-Llama3-76B"), gpus.find("H200"))
    assert "compute.checkpointing=full data.row_tokens=" in found.remedy
    assert "model.quantize=4bit together make it fit" in found.remedy
    full = plan.make(released("InternVL2-26B", rank=None), gpus.find("L4"))
    assert "no setting makes it fit" in full.remedy


def test_less_is_kept_and_more_computed_down_the_ladder():
    kinds = ("none", "selective", "full")
    made = [released("InternVL2-2B", compute={"checkpointing": kind}) for kind in kinds]
    plans = [plan.make(one, gpus.find("A100-80")) for one in made]
    memory = [one.memory.allocated_gib for one in plans]
    seconds = [one.step_s for one in plans]
    assert memory == sorted(memory, reverse=True)
    assert seconds == sorted(seconds)
    two = plan.make(made[0], gpus.find("A100-80"), num_gpus=2)
    assert plans[0].step_s / 2 < two.step_s < plans[0].step_s
    assert two.memory.components["frozen weights"] == plans[0].memory.components["frozen weights"]


def test_only_the_configuration_is_read(tmp_path):
    folder = model_folder(tmp_path / "model")
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    made = recipe(folder, tmp_path / "none.jsonl", tmp_path, tmp_path / "run")
    found = plan.make(made, gpus.find("L40S"))
    assert found.parameters == plan.model_of(made).num_parameters()
    assert "assumed, for the data were not read" in found.render()


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="is no folder, and no released model"):
        plan.make(released("InternVL9-2B"), gpus.find("H200"))
    with pytest.raises(UserError, match="does not train with sft; choose retrieval"):
        plan.make(released("InternVL-14B-224px"), gpus.find("H200"))


def test_data_are_counted_where_they_can_be_read(tmp_path, capsys):
    folder = model_folder(tmp_path / "model")
    picture(tmp_path / "a.jpg", (336, 168))
    rows = [chat_line("<image>\nWhat?", f"Answer {i}.", image="a.jpg") for i in range(6)]
    file = write_lines(tmp_path / "x.jsonl", rows)
    made = recipe(folder, file, tmp_path, tmp_path / "run")
    step = check.run(made).step
    assert step.samples_per_epoch == 6
    assert step.work.samples == made.global_batch
    assert step.work.tiles == 3  # of one image, shared by the four samples of the step
    found = plan.make(made, gpus.find("H200"), step)
    assert found.load.work == step.work
    assert "an epoch of 6 samples" in found.render()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.to_yaml(made))
    with pytest.raises(SystemExit) as done:
        cli.main(["check", str(path), "--plan", "--gpu", "a100-40"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "no problem found" in said
    assert "plan for 1 x A100-40" in said
    assert said.count("images and conversations") == 1


def test_a_plan_without_model_and_data(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.to_yaml(released("InternVL2-1B")))
    with pytest.raises(SystemExit) as done:
        cli.main(["check", str(path), "--plan", "--gpu", "H200"])
    assert done.value.code == 0
    assert "fits: " in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        cli.main(["check", str(path), "--plan", "--gpu", "H20O"])
    assert done.value.code == 2
    assert "did you mean H200?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        cli.main(["check", str(path), "--plan", "--gpu", "H200", "--gpus", "0"])
    assert done.value.code == 2


def test_gpus_are_found_by_what_people_and_drivers_call_them():
    assert gpus.find("h100").name == "H100-80"
    assert gpus.find("a100 40").name == "A100-40"
    assert gpus.recognize("NVIDIA H200", 139.8).name == "H200"
    assert gpus.recognize("NVIDIA A100-SXM4-40GB", 39.4).name == "A100-40"
    assert gpus.recognize("NVIDIA H100 PCIe", 79.2).name == "H100-PCIe-80"
    assert gpus.recognize("NVIDIA H100 80GB HBM3", 79.1).name == "H100-80"
    assert gpus.recognize("NVIDIA GeForce RTX 4090", 23.6).name == "4090-24"
    assert gpus.recognize("NVIDIA T4", 15.0) is None


def test_quantized_weights_are_smaller():
    made = released("InternVL2-8B")
    quantized = replace(made, model=replace(made.model, quantize="4bit"))
    parts = plan.make(quantized, gpus.find("H200")).memory.components
    before = plan.make(made, gpus.find("H200")).memory.components
    assert parts["quantized weights"] + parts["frozen weights"] < 0.4 * before["frozen weights"]
    kept = parts["language model activations"] / before["language model activations"]
    assert kept == pytest.approx(1, abs=0.1)  # adapters on 4 bits are not joined


def pairs(name, *changes):
    return recipes.load_recipe(RECIPES / f"internvl_14b_{name}.yaml", changes)


@pytest.mark.parametrize("name", ["lora_flickr30k", "head_coco", "stage2"])
def test_recipes_of_internvl_14b_are_planned(name):
    found = plan.make(pairs(name), gpus.find("H200"))
    assert found.fits
    said = found.render()
    assert said.count("error up to") == 2  # of memory and time
    assert found.memory.components["frozen weights"] > 23 * 2**30
    # The first pass of gradient caching, where the step is cut.
    assert ("first pass of gradient caching" in found.component_s) == (name != "head_coco")


def test_full_fine_tuning_of_internvl_14b_does_not_fit():
    found = plan.make(pairs("full_flickr30k", "objective.micro_batch=2"), gpus.find("A100-80"))
    assert not found.fits
    parts = found.memory.components
    states = ("trained weights", "gradients", "optimizer states")
    # 16 bytes a weight, 4 of the output matrix, which no loss reaches.
    assert sum(parts[name] for name in states) == 16 * 13_836_319_747 - 12 * 4096 * 49_954
    assert "no setting makes it fit" in found.remedy
    assert "shard it over several (--gpus 8 parallel.shard=zero3)" in found.render()


@pytest.mark.slow
def test_what_is_cut_and_computed_again_takes_less_and_longer():
    changes = (
        ("compute.checkpointing=none", "objective.micro_batch=null"),
        ("compute.checkpointing=none", "objective.micro_batch=16"),
        ("compute.checkpointing=selective", "objective.micro_batch=16"),
        ("compute.checkpointing=full", "objective.micro_batch=16"),
        ("compute.checkpointing=full", "objective.micro_batch=16", "compute.offload=true"),
    )
    plans = [plan.make(pairs("lora_flickr30k", *one), gpus.find("H200")) for one in changes]
    memory = [one.memory.allocated_gib for one in plans]
    seconds = [one.step_s for one in plans]
    assert memory == sorted(memory, reverse=True)
    assert seconds == sorted(seconds)
    assert len({one.flops.needed for one in plans}) == 1
    assert "compute.checkpointing=full makes it fit" in plans[0].remedy
    larger = plan.make(pairs("lora_flickr30k", "data.tiles.size=364"), gpus.find("H200"))
    assert larger.flops.needed > 1.6 * plans[0].flops.needed


@pytest.mark.parametrize(
    ("model", "objective", "size", "most"),
    [
        ("InternVL-14B-224px", "retrieval", 224, 1),
        ("InternVL-14B-Flickr30K-FT-364px", "retrieval", 364, 1),
        ("InternVL2-2B", "sft", 448, 12),
        ("InternVL-Chat-V1-2", "sft", 448, 1),
    ],
)
def test_tiles_of_a_released_model_that_is_not_here(model, objective, size, most):
    tree = yaml.safe_load(recipes.to_yaml(released(model, rank=0)))
    tree["data"] |= {"tiles": None, "normalize": None, "template": None, "system_message": None}
    recipe = recipes.resolve(tree | {"objective": {"name": objective}})
    made = plan.complete(recipe)
    assert (made.recipe.data.tiling.size, made.recipe.data.tiling.max) == (size, most)
    said = [line.split(maxsplit=2) for line in made.render().splitlines()]
    source = "table of released models (config.json is not here)"
    assert ["data.tiles.size", str(size), source] in said


def test_pairs_are_counted_where_they_can_be_read(tmp_path):
    made = recipes.load_recipe(pair_runs.make(tmp_path), ("objective.micro_batch=4",))
    step = check.run(made).step
    assert step.samples_per_epoch == 48
    work, batch = step.work, step.micro_batches[0]
    assert work.tiles == made.global_batch == work.texts.count == work.matches.count / 2
    assert batch.texts.length % 8 == batch.matches.length % 8 == 0
    assert work.texts.tokens <= sum(padded.texts.tokens for padded in step.micro_batches)
    found = plan.make(made, gpus.find("H200"), step)
    assert found.load.work == step.work
    assert (found.load.largest.samples, found.load.micro_batches) == (4, 2)
    assert "an epoch of 48 samples" in found.render()
