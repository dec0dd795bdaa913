"""A model from parts in a recipe: what it may say, training, resuming, evaluating, exporting."""

import json
import shutil

import pytest
import tiny_run
import torch
from part_folders import split

from internvl import check, cli, evaluate, export, plan, train, zoo
from internvl.config import recipes
from internvl.config.recipes import load_recipe
from internvl.errors import ConfigError, ModelFolderError, UserError
from internvl.inference import load as loading
from internvl.training import checkpoint
from internvl.zoo import gpus

DATA = {"sources": [{"name": "none", "annotations": "none.jsonl"}], "max_tokens": 2048}


def resolved(**model):
    tree = {"model": model, "data": DATA, "run": "run", "global_batch": 8, "steps": 1}
    return recipes.resolve(tree)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return split(tmp_path_factory.mktemp("parts"))[:3]


def recipe_of(root, parts, run, *overrides, projector=False, **changes):
    """The tiny project on parts; embeddings are frozen, so that fresh rows are never saved."""
    vision, language, mlp = parts
    model = {
        "vision": str(vision),
        "language": str(language),
        "projector": str(mlp) if projector else None,
        "template": "Hermes-2",
        "train": ["vision_tower"],
    }
    sources = [{"name": "shapes", "annotations": str(root / "train.jsonl"), "images": str(root)}]
    evals = {"val": {"type": "caption", "annotations": str(root / "captions.json"), "limit": 2}}
    evals["val"] |= {"images": str(root), "max_new_tokens": 3, "before": False, "every": 100}
    if not changes.pop("evaluated", False):
        evals = {}
    data = {"sources": sources, "max_tokens": 256, "workers": 0}
    changes = {"model": model, "data": data, "steps": 4, "evals": evals} | changes
    changes |= {"checkpoint": {"every": 2}, "run": str(root / run), "threads": 1}
    return load_recipe(tiny_run.make(root, **changes), overrides)


def weights(run):
    return loading.load(run, device="cpu").model.state_dict()


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_an_id_and_parts_exclude_each_other():
    with pytest.raises(
        ConfigError, match=r"model.id, model.vision: a model by its id, or one from"
    ):
        resolved(id="a/b", vision="v", language="l", template="Hermes-2")
    with pytest.raises(ConfigError, match=r"model.id, model.ps_version: "):
        resolved(id="a/b", ps_version="v1")


@pytest.mark.parametrize("key", ["vision", "language", "template"])
def test_a_part_that_is_missing_is_named(key):
    model = {"vision": "v", "language": "l", "template": "Hermes-2"}
    del model[key]
    with pytest.raises(
        ConfigError, match=rf"1 problem.*\nmodel.{key}: missing; a model from parts"
    ):
        resolved(**model)


def test_no_model_at_all():
    with pytest.raises(ConfigError, match="model.id: missing; name a model, or its parts"):
        resolved(train=["language_model"])


def test_the_name_in_messages():
    model = resolved(vision="a/InternViT-6B", language="pretrained/Yi-34B/", template="x").model
    assert model.name == "InternViT-6B + Yi-34B"
    assert resolved(id="a/b").model.name == "a/b"


def test_the_first_recipe_plans_with_no_file_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["check", "internvl_chat_v1_2_sft", "--plan", "--gpu", "H200"])
    assert exit_code.value.code == 1  # one GPU does not hold it
    output = capsys.readouterr().out
    assert "InternViT-6B-448px-V1-2 + Nous-Hermes-2-Yi-34B" in output
    made = plan.make(load_recipe("internvl_chat_v1_2_sft"), gpus.find("H200"))
    assert made.parameters == made.trained == zoo.num_parameters(zoo.find("InternVL-Chat-V1-2"))
    lines = [" ".join(line.split()) for line in made.inherited.splitlines()]
    assert "data.template 'Hermes-2' model.template" in lines
    assert "data.normalize 'imagenet' default of a model from parts" in lines


def test_a_part_that_no_release_contains_is_refused_by_name():
    with pytest.raises(UserError, match=r"model.vision: my/vit is no folder, and no vision tower"):
        plan.make(resolved(vision="my/vit", language="Yi", template="Hermes-2"), gpus.find("H200"))
    made = resolved(vision="InternViT-300M-448px", language="QLLaMA", template="Hermes-2")
    with pytest.raises(UserError, match=r"model.language: QLLaMA .* needs a folder with config"):
        plan.make(made, gpus.find("H200"))


def test_a_tower_here_and_a_language_model_elsewhere_plan_together(parts):
    made = resolved(vision=str(parts[0]), language="Qwen/Qwen2-0.5B-Instruct", template="Hermes-2")
    found = plan.make(made, gpus.find("H200"))
    assert found.recipe.data.tiles.size == 84
    assert f"the tower of {parts[0]}" in found.inherited


def test_files_that_are_not_there_are_named(parts, tmp_path):
    recipe = recipe_of(tmp_path, parts, "run", f"model.vision={tmp_path}/gone")
    with pytest.raises(ModelFolderError, match=r"^model.vision: .*gone: no such folder"):
        train.run(recipe)
    recipe = recipe_of(tmp_path, parts, "run", f"model.projector={tmp_path}/gone.pth")
    with pytest.raises(ModelFolderError, match=r"gone.pth: no such projector file"):
        check.run(recipe)
    recipe = recipe_of(tmp_path, parts, "run", "model.template=Hermes")
    with pytest.raises(UserError, match=r"unknown conversation template 'Hermes'; known: "):
        check.run(recipe)


def test_the_check_says_where_images_and_conversations_are_from(parts, tmp_path):
    checked = check.run(recipe_of(tmp_path, parts, "run"))
    assert not checked.problems
    lines = [" ".join(line.split()) for line in checked.inherited.splitlines()]
    assert f"data.tiles.size 84 the tower of {parts[0]}" in lines
    assert "data.tiles.max 1 default of a model from parts" in lines
    assert "data.template 'Hermes-2' model.template" in lines


def test_what_is_random_depends_on_the_seed_alone(parts, tmp_path):
    shrunk = split(tmp_path / "small", rows=563)[:3]
    states = []
    for seed, drawn in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(drawn)
        recipe = recipe_of(tmp_path, shrunk, "run", f"seed={seed}")
        before = torch.get_rng_state()
        states.append(loading.for_training(recipe).model.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(states[0], states[1])
    differing = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert differing == {
        "model.language_model.embed_tokens.weight",
        *(
            f"model.multi_modal_projector.linear_{n}.{kind}"
            for n in (1, 2)
            for kind in ("weight", "bias")
        ),
    }


class _Stop(RuntimeError):
    """Stands for a process that is killed."""


def test_a_killed_run_ends_as_one_that_was_not(parts, tmp_path, monkeypatch):
    """The projector and new embeddings are fresh and frozen: no checkpoint holds them."""
    shrunk = split(tmp_path / "small", rows=563)[:3]
    whole = train.run(recipe_of(tmp_path, shrunk, "whole"))
    step = train.train_step

    def killed(state, rows):
        if state.step == 3:
            raise _Stop
        return step(state, rows)

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_step", killed)
        with pytest.raises(_Stop):
            train.run(recipe_of(tmp_path, shrunk, "killed"))
    assert checkpoint.steps(tmp_path / "killed" / "checkpoints") == [2]
    torch.rand(5)
    again = train.run(recipe_of(tmp_path, shrunk, "killed"))
    assert equal(weights(whole), weights(again))
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, again)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_is_evaluated_loaded_and_exported(parts, tmp_path):
    words = ("model.train=[]", "model.lora.rank=2", "data.tiles.size=112")
    recipe = recipe_of(tmp_path, parts, "run", *words, projector=True, evaluated=True, steps=2)
    run = train.run(recipe)
    assert not (run / "adapter").exists()
    saved = load_recipe(run / "recipe.yaml").model
    assert saved.start == recipe.model.start
    inside = json.loads((run / "evals" / "000002.json").read_text())
    measured = evaluate.run(run, device="cpu")
    assert measured["val/average_length"] == inside["val/average_length"]
    chat = loading.load(run, device="cpu")
    assert (chat.template.name, chat.tiles.size, len(chat.tokenizer)) == ("Hermes-2", 112, 572)
    for layout in ("official", "hf"):
        folder = export.run(run, tmp_path / layout, layout)
        exported = loading.load(folder, device="cpu")
        assert exported.template == chat.template
        assert exported.model.config.text_config.vocab_size == 572
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ModelFolderError, match="no checkpoint yet"):
        loading.load(run, device="cpu")


@pytest.mark.slow
def test_a_run_on_parts_moves_with_them_and_another_starts_from_it(parts, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    names = [old / path.name for path in parts]
    old.mkdir()
    for path, copy in zip(parts, names, strict=True):
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    train.run(recipe_of(old, names, "run", projector=True))
    lora = ["model.lora.rank=4", "model.train=[]", f"model.id={old}/run", f"run={old}/upper"]
    reset = [f"model.{key}=null" for key in ("vision", "language", "projector", "template")]
    train.run(load_recipe(old / "recipe.yaml", [*reset, *lora]))
    folders = ("run", "upper", "upper/adapter")
    expected = {name: weights(old / name) for name in folders}
    old.rename(new)
    for name in folders:
        assert equal(weights(new / name), expected[name])
    (new / "projector.pth").unlink()
    with pytest.raises(ModelFolderError, match=r"run: its base model .*/projector.pth is not the"):
        weights(new / "upper")
