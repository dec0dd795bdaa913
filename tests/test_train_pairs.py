"""Fine-tuning InternVL-14B: what trains, runs end to end, resuming, merging and exporting."""

import json
import time

import pair_runs
import pytest
import torch
from ranks import Verb, run_ranks

from internvl import check, evaluate, export, log, train, zoo
from internvl.config import LayerDecayConfig, LoraConfig, OptimConfig, recipes
from internvl.errors import UserError
from internvl.inference import load as loading
from internvl.models.adapters import lora
from internvl.models.dual import configs as dual_configs
from internvl.models.dual import files as dual_files
from internvl.models.vision import count_parameters
from internvl.training import optim

LORA = [
    "model.train=[text_projection,lm_head]",
    "model.lora={rank: 4, on: [vision_tower, language_model]}",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    pair_runs.make(folder)
    return folder


def recipe_of(project, tmp_path, *overrides):
    return recipes.load_recipe(project / "recipe.yaml", [f"run={tmp_path / 'run'}", *overrides])


def rows(folder):
    return list(log.StepLog(folder, "metrics.jsonl").rows())


def losses(folder):
    return {row["step"]: (row["itc"], row["itm"], row["grad_norm"]) for row in rows(folder)}


def full_size():
    official = zoo.official_config(zoo.find("InternVL-14B-224px"))
    return dual_files.empty_model(dual_configs.from_official(official))


def test_what_trains_at_full_size():
    model = full_size()
    lora.select_trainable(model, ("vision_tower", "language_model", "heads"))
    assert count_parameters(model) == (13_834_975_747, 13_834_975_747)
    lora.select_trainable(model, ("heads",))
    assert count_parameters(model)[0] == 3_145_728 + 33_207_168 + 53_515_008 + 8_194 + 1
    lora.select_trainable(model, ("queries", "query_pool", "itm_head", "logit_scale"))
    assert count_parameters(model)[0] == 956_418_048 + 393_216 + 53_515_008 + 8_194 + 1
    lora.select_trainable(model, ("text_projection", "lm_head"))
    assert count_parameters(model)[0] == 207_757_312
    lora.attach(model, LoraConfig(rank=16, on=("vision_tower", "language_model")))
    assert count_parameters(model)[0] == 287_055_872
    assert not any(".cross_attn." in n and ".lora_" in n for n, _ in model.named_parameters())


def test_parameter_groups_at_full_size():
    model = full_size()
    decay = OptimConfig(
        lr=1e-6,
        weight_decay=0.05,
        decay_scalars=True,
        layer_decay=LayerDecayConfig(vision=0.9, qllama=0.9),
    )
    groups = optim.build(model, decay).param_groups
    assert len(groups) == 167
    names = {id(p): name for name, p in model.named_parameters()}
    of = {names[id(p)]: group for group in groups for p in group["params"]}
    assert len(of) == len(names)
    for name, scale, weight_decay in [
        ("model.vision_tower.embeddings.cls_token", 0.9**49, 0.05),
        ("model.vision_tower.encoder.layer.47.attention.q_proj.weight", 0.9, 0.05),
        ("model.vision_tower.encoder.layer.0.lambda_1", 0.9**48, 0.0),
        ("image_pool.k_proj.bias", 1.0, 0.0),
        ("model.query_tokens.weight", 0.9**33, 0.05),
        ("logit_scale", 0.9**33, 0.05),
        ("model.language_model.layers.31.mlp.up_proj.weight", 0.9, 0.05),
        ("model.language_model.norm.weight", 1.0, 0.0),
        ("text_projection.weight", 1.0, 0.05),
    ]:
        assert of[name]["lr_scale"] == pytest.approx(scale, rel=1e-12)
        assert of[name]["weight_decay"] == weight_decay
    lora.attach(model, LoraConfig(rank=16, on=("vision_tower", "language_model")))
    scales = optim.layer_scales(model, LayerDecayConfig(vision=0.9, qllama=0.9))
    stem = "model.vision_tower.encoder.layer.2.attention.q_proj"
    for part in ("base_layer", "lora_A.default"):
        assert scales[f"{stem}.{part}.weight"] == (("vision", 3), pytest.approx(0.9**46))


def test_a_run_learns_and_its_folder_is_a_dual(project, tmp_path):
    evals = {
        "shapes": {
            "type": "retrieval",
            "annotations": str(project / "captions.txt"),
            "images": str(project),
            "clean": True,
            "before": True,
        }
    }
    schedule = ["optim.lr=5e-4", "optim.warmup_ratio=0.1", f"evals={json.dumps(evals)}"]
    recipe = recipe_of(project, tmp_path, "steps=40", *schedule)
    folder = train.run(recipe)
    found = rows(folder)
    assert [row["samples"] for row in found] == [8] * 40
    assert all(row["loss"] == pytest.approx(row["itc"] + row["itm"]) for row in found)
    assert sum(r["itc"] for r in found[-5:]) < 0.5 * sum(r["itc"] for r in found[:5])
    before, after = (
        json.loads((folder / f"evals/{step:06d}.json").read_text()) for step in (0, 40)
    )
    for mode in "cg":
        name = f"shapes/{mode}_mean_recall"
        assert after[name] > before[name] + 0.2
    measured = evaluate.run(folder, ["shapes"], device="cpu")
    assert measured == {key: pytest.approx(value) for key, value in after.items()}


@pytest.mark.parametrize("objective", ["retrieval", pytest.param("stage2", marks=pytest.mark.slow)])
def test_micro_batches_train_the_same(project, tmp_path, objective):
    found = []
    for number in ("null", "3"):
        settings = [f"objective={{name: {objective}, micro_batch: {number}}}", "optim.lr=1e-4"]
        run = tmp_path / number
        folder = train.run(recipe_of(project, tmp_path, f"run={run}", "steps=6", *settings))
        found.append([row["loss"] for row in rows(folder)])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.slow
def test_killed_and_resumed_bit_for_bit(project, tmp_path):
    """With gradient caching, dropout and stochastic depth: every draw must come back."""
    settings = [*LORA, "objective.micro_batch=3", "model.drop_path=0.3", "steps=24"]
    straight = train.run(recipe_of(project, tmp_path, *settings))
    folder = tmp_path / "killed"
    process = Verb("train", str(project / "recipe.yaml"), f"run={folder}", *settings)
    until = time.monotonic() + 3600
    while time.monotonic() < until and max(losses(folder), default=0) < 7:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert max(losses(folder)) < 24
    train.run(recipe_of(project, tmp_path, f"run={folder}", *settings))
    assert losses(folder) == losses(straight)


def test_adapters_merge_and_export_to_the_official_layout(project, tmp_path):
    recipe = recipe_of(project, tmp_path, *LORA, "steps=6", "optim.lr=1e-2")
    train.run(recipe)
    trained = loading.load(recipe.run, device="cpu", dtype="float32")
    start = loading.load(recipe.model.id, device="cpu", dtype="float32")
    pictures = sorted(project.glob("*.jpg"))[:4]
    texts = ["a red circle", "a green square"]
    export.run(recipe.run, tmp_path / "merged", "official")
    merged = loading.load(tmp_path / "merged", device="cpu", dtype="float32")
    for mode in "cg":
        found = [h.encode_images(pictures, mode=mode) for h in (trained, merged, start)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
        assert (found[0] - found[2]).abs().max() > 1e-3
    found = [h.encode_texts(texts) for h in (trained, merged, start)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-3
    moved = {
        name.replace(".base_layer", "").split(".")[0]
        for name, tensor in trained.model.state_dict().items()
        if ".lora_" not in name
        and not torch.equal(tensor, start.model.state_dict()[name.replace(".base_layer", "")])
    }
    assert moved == {"text_projection"}  # the output matrix is listed, no loss reaches it


def test_another_size_of_pictures_resizes_the_positions(project, tmp_path):
    recipe = recipe_of(project, tmp_path, "steps=2", "data.tiles.size=112")
    train.run(recipe)
    trained = loading.load(recipe.run, device="cpu")
    assert trained.image_size == 112
    export.run(recipe.run, tmp_path / "official", "official")
    written = json.loads((tmp_path / "official/config.json").read_text())
    assert written["force_image_size"] == 112
    again = loading.load(tmp_path / "official", device="cpu")
    positions = "model.vision_tower.embeddings.position_embeddings"
    assert again.image_size == 112
    assert torch.equal(again.model.state_dict()[positions], trained.model.state_dict()[positions])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.name=sft"], "does not train with sft; choose retrieval or stage2"),
        (["model.train=[multi_modal_projector]"], "unknown part 'multi_modal_projector'; parts"),
    ],
)
def test_what_does_not_fit_is_refused(project, tmp_path, overrides, said):
    sources = "data.sources=[{name: s, annotations: x.jsonl}]"
    with pytest.raises(UserError, match=said):
        loading.for_training(recipe_of(project, tmp_path, sources, *overrides))


def test_bad_pairs_are_raised_or_listed(project, tmp_path):
    folder = tmp_path / "data"
    pair_runs.draw(folder)
    (folder / "0003.jpg").write_bytes(b"no image")
    sources = (
        "data.sources=[{name: s, type: flickr_format, "
        f"annotations: {folder}/captions.txt, images: {folder}}}]"
    )
    settings = [sources, "epochs=1", "steps=null", "objective.micro_batch=4"]
    with pytest.raises(UserError, match=r"captions.txt line [89]: .*0003.jpg"):
        train.run(recipe_of(project, tmp_path, *settings))
    skip = ["data.on_bad_sample=skip", "data.max_bad_fraction=0.1"]
    done = train.run(recipe_of(project, tmp_path, f"run={tmp_path / 'skip'}", *settings, *skip))
    assert len((done / "bad_samples.jsonl").read_text().splitlines()) == 2
    assert sum(row["samples"] for row in rows(done)) == 46


RANKS = """
from pathlib import Path
from internvl import train
from internvl.config import recipes

train.run(recipes.load_recipe(Path({recipe!r}), {settings!r}))
"""


@pytest.mark.slow
def test_two_ranks_train_as_one(project, tmp_path):
    settings = ["steps=4", "objective.micro_batch=2", "optim.lr=1e-4"]
    one = train.run(recipe_of(project, tmp_path, *settings))
    folder = tmp_path / "two"
    code = RANKS.format(recipe=str(project / "recipe.yaml"), settings=[*settings, f"run={folder}"])
    run_ranks(code)
    found, wanted = losses(folder), losses(one)
    assert found.keys() == wanted.keys()
    for step, numbers in wanted.items():
        assert found[step] == pytest.approx(numbers, rel=1e-3)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.slow
def test_written_out_attention_changes_no_result(project, tmp_path, checkpointing):
    """Also cut into micro-batches, and where scores are computed again in the backward pass."""
    found = {}
    for attention in ("auto", "eager"):
        recipe = recipe_of(
            project,
            tmp_path / attention,
            "steps=3",
            "objective.micro_batch=3",
            f"compute.attention={attention}",
            f"compute.checkpointing={checkpointing}",
        )
        found[attention] = losses(train.run(recipe))
    for step in (1, 2, 3):
        assert found["eager"][step] == pytest.approx(found["auto"][step], rel=1e-4)


def test_a_check_reads_every_pair(project, tmp_path):
    folder = tmp_path / "data"
    pair_runs.draw(folder)
    (folder / "0003.jpg").write_bytes(b"no image")
    lines = (folder / "captions.txt").read_text()
    (folder / "captions.txt").write_text(lines + "0000.jpg,A red circle.\n0000.jpg,...\n")
    sources = (
        "data.sources=[{name: s, type: flickr_format, "
        f"annotations: {folder}/captions.txt, images: {folder}}}]"
    )
    checked = check.run(recipe_of(project, tmp_path, sources, "epochs=2", "steps=null"))
    said = checked.render()
    assert [str(bad).split(":")[0].rpartition(" ")[2] for bad in checked.problems] == [
        *("8", "9", "51")
    ]
    assert "50 samples per epoch in 50 groups; 2 epochs of them in steps of 8" in said
    assert "1 sample equals another sample" in said
    assert " pairs in 1 micro-batch(es)" in said
    assert "\nsummarize:" in said


def test_a_check_says_what_does_not_fit(project, tmp_path):
    sources = "data.sources=[{name: s, annotations: x.jsonl}]"
    with pytest.raises(UserError, match="does not train with sft"):
        check.run(recipe_of(project, tmp_path, sources, "objective.name=sft"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("float32", []),
        pytest.param("bfloat16", [], marks=pytest.mark.slow),
        pytest.param("bfloat16", LORA, marks=pytest.mark.slow),
    ],
)
def test_a_run_measures_the_same_inside_and_outside(project, tmp_path, dtype, how):
    """Also without a word on tiles, and where all weights are in float32, its export does."""
    files = {"annotations": str(project / "captions.txt"), "images": str(project)}
    evals = {"shapes": {"type": "retrieval", **files, "recall_k": [1, 5], "rerank": 3}}
    settings = [f"evals={json.dumps(evals)}", f"dtype={dtype}", "data.tiles={}"]
    folder = train.run(recipe_of(project, tmp_path, "steps=2", *settings, *how))
    assert recipes.load_recipe(folder / "recipe.yaml").data.tiling.size == 84
    inside = json.loads((folder / "evals/000002.json").read_text())
    found = evaluate.measure(folder, device="cpu", to=tmp_path / "outside")
    assert found.metrics == inside
    ranks = [
        path / "shapes.jsonl" for path in (tmp_path / "outside/result", folder / "evals/000002")
    ]
    assert ranks[0].read_text() == ranks[1].read_text()
    if dtype == "float32":
        export.run(folder, tmp_path / "export", "official")
        own = evaluate.measure(
            tmp_path / "export",
            ["retrieval-folder"],
            device="cpu",
            to=tmp_path / "exported",
            annotations=project / "captions.txt",
            images=project,
            recall_k=[1, 5],
            rerank=3,
        )
        scores = {name.replace("retrieval-folder", "shapes"): v for name, v in own.metrics.items()}
        assert scores == inside
        return
    other = evaluate.measure(folder, device="cpu", dtype="float32", to=tmp_path / "other")
    assert other.computed == "float32; inside the run: bfloat16 autocast"
    line = json.loads((tmp_path / "other/result.jsonl").read_text().splitlines()[0])
    assert line["computed"] == other.computed
