"""Recipes of the original's training scripts train two steps of a few narrow blocks.

A recipe is trained as it stands but for its files and what makes a run large. Recipes of an equal
`key_of` differ in values alone, and the first of them stands for all. The vision tower is one small
one everywhere; a stage that starts from a run starts from a model, but for one whole chain.
"""

import json
import math
from pathlib import Path

import data_files
import pair_runs
import part_folders
import preference_runs
import pytest
import tiny_run
from chat_folders import add_tokenizer, official_folder

from internvl import train, zoo
from internvl.config import released
from internvl.config.recipes import load_recipe

pytestmark = pytest.mark.slow
FACTS = Path(__file__).with_name("scripts.json")
SMALL = [
    "steps=2",
    "epochs=null",
    "dtype=float32",
    "device=cpu",
    "data.workers=0",
    "data.meta=null",
    "data.tiles.size=84",
    "optim.warmup_steps=1",
    "checkpoint.every=0",
    "evals={}",
]
TEMPLATES = {"LlamaForCausalLM": "Hermes-2", "Phi3ForCausalLM": "phi3-chat"}
LANGUAGES = {
    "InternLM2ForCausalLM": 8,
    "InternLM3ForCausalLM": 2,
    "LlamaForCausalLM": 7,
    "Phi3ForCausalLM": 5,
    "QLLaMA": 3,
    "Qwen2ForCausalLM": 5,
    "Qwen3ForCausalLM": 2,
    "Qwen3MoeForCausalLM": 2,
}
"""Language model -> trainings that differ in more than values."""


def architecture(recipe):
    """The language model's class and the pixel shuffle's version."""
    model = recipe.model
    while model.id is not None and released.of_run(model.id):
        model = load_recipe(released.of_run(model.id)).model
    if model.id is None:
        language, version = zoo.find_language_model(model.language), model.ps_version or "v2"
    else:
        start = zoo.find(model.id)
        language, version = zoo.LANGUAGE_MODELS[start.language], start.ps_version
        if start.family == "dual":
            return "QLLaMA", version
    return language["architectures"][0], version


def key_of(recipe):
    """What decides how a recipe trains, values aside."""
    return (
        *architecture(recipe),
        recipe.model.id is None and ("parts", recipe.model.projector is None),
        recipe.model.parts,
        recipe.model.lora is not None,
        recipe.objective.name,
        recipe.data.packing,
        getattr(recipe.objective, "loss_normalization", None),
    )


@pytest.fixture(scope="module")
def groups():
    """Key -> scripts whose recipes have it."""
    by_key = {}
    for path in json.loads(FACTS.read_text(encoding="utf-8")):
        script = Path(path).stem
        by_key.setdefault(key_of(load_recipe(script)), []).append(script)
    return by_key


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Images with conversations, preference pairs and captions."""
    folder = tmp_path_factory.mktemp("project")
    lines = []
    for number, size in enumerate([(200, 90), (80, 150), (100, 100), (300, 90)]):
        data_files.picture(folder / f"{number}.png", size)
        lines.append(data_files.chat_line("What?", f"A picture {number}.", image=f"{number}.png"))
    data_files.write_lines(folder / "chat.jsonl", lines)
    # Frames of videos are drawn anew each time, which log-probabilities kept beforehand refuse.
    still = [pair for pair in preference_runs.PAIRS if "video" not in pair]
    preference_runs.make(folder / "pairs", still)
    captions = [{"image": f"{n}.png", "caption": f"a red {n}"} for n in range(4)]
    (folder / "coco.json").write_text(json.dumps(captions), encoding="utf-8")
    return folder


def sources(recipe, folder):
    """The recipe's kind of data in small files, and rows and steps of a few of them."""
    if recipe.objective.name == "retrieval":
        (source,) = recipe.data.sources
        assert source.type == "coco_format"
        return [
            f"data.sources.0.annotations={folder / 'coco.json'}",
            f"data.sources.0.images={folder}",
            "global_batch=2",
        ]
    pairs = recipe.objective.name == "mpo"
    name = "pairs/pairs.jsonl" if pairs else "chat.jsonl"
    source = {"name": "small", "annotations": str(folder / name), "insert_image_mark": True}
    source |= {"images": str(folder / "pairs" if pairs else folder)}
    source |= {"type": "preference"} if pairs else {}
    counted = "global_batch_rows=2" if recipe.global_batch_rows else "global_batch=3"
    rows = ["data.row_tokens=600"] if recipe.data.row_tokens else []
    return [f"data.sources={json.dumps([source])}", "data.max_tokens=300", *rows, counted]


def start_of(recipe, folder):
    """A small model of the recipe's language model; one for all recipes that have it."""
    name, version = architecture(recipe)
    to = folder / f"{name}.{version}"
    if to.exists():
        return to
    if name == "QLLaMA":
        return pair_runs.model_folder(to)
    if name == "InternLM2ForCausalLM":
        return data_files.model_folder(to, "internlm2-chat", "internlm2")
    template = TEMPLATES.get(name, "internvl2_5")
    return add_tokenizer(official_folder(name, to, template=template, ps_version=version), "qwen2")


def parts_of(recipe, whole, to):
    """The small model taken apart, for recipes that start from parts."""
    to.mkdir()
    tokenizer = "internlm2" if whole.name.startswith("InternLM2") else "qwen2"
    vision, language, projector, _ = part_folders.split(to, tokenizer=tokenizer, whole=whole)
    named = [f"model.projector={projector}"] if recipe.model.projector else []
    return [f"model.vision={vision}", f"model.language={language}", *named]


def check_run(folder):
    rows = tiny_run.losses(folder)
    assert [*rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows.values() for value in row)
    assert all(norm > 0 for _, norm in rows.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_scripts_train_two_steps(groups, project, tmp_path, language):
    chosen = [scripts[0] for key, scripts in groups.items() if key[0] == language]
    assert len(chosen) == LANGUAGES[language]
    for script in chosen:
        recipe = load_recipe(script)
        start = start_of(recipe, project)
        if recipe.model.id is None:
            begin = parts_of(recipe, start, tmp_path / f"{script}.parts")
        else:
            begin = [f"model.id={start}"]
        run = tmp_path / script
        train.run(load_recipe(script, [*SMALL, f"run={run}", *sources(recipe, project), *begin]))
        check_run(run)


def test_every_script_is_one_of_a_group(groups):
    represented = [
        script for key, scripts in groups.items() if key[0] in LANGUAGES for script in scripts
    ]
    refused = [
        script for key, scripts in groups.items() if key[0] not in LANGUAGES for script in scripts
    ]
    assert len(represented) == 122
    assert all("gpt_oss_20b" in script for script in refused)
    assert len(refused) == 4


def test_stages_follow_each_other(project, tmp_path, monkeypatch):
    """Each stage under its own name, from the run of the one before it."""
    monkeypatch.chdir(tmp_path)
    for script in ("stage1", "stage1_5", "stage2"):
        recipe = load_recipe(f"internvl2_5_8b_{script}")
        begin = []
        if recipe.model.id is None:
            begin = parts_of(recipe, start_of(recipe, project), tmp_path / "parts")
        overrides = [*SMALL, *sources(recipe, project), *begin]
        train.run(load_recipe(recipe.run.name, overrides))
        check_run(recipe.run)
