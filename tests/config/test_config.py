"""Recipes: every problem at once, nearest names, overrides, and a resolved copy that reads back."""

import subprocess
import sys

import pytest
import yaml

from internvl.config import DataConfig, TilesChoice, TilesConfig, eval_options, recipes
from internvl.config.docs import field_docs
from internvl.config.recipes import load_recipe, resolve
from internvl.errors import ConfigError

GOOD = {
    "model": {"id": "x"},
    "data": {"sources": [{"name": "a", "annotations": "a.jsonl"}]},
    "run": "runs/x",
    "global_batch": 8,
    "epochs": 1,
}
ROWS = {"global_batch": None, "global_batch_rows": 4, "epochs": None, "steps": 9}


def problems(tree, overrides=()):
    with pytest.raises(ConfigError) as caught:
        resolve(tree, overrides)
    return str(caught.value).splitlines()[1:]


def test_defaults_and_overrides():
    recipe = resolve({**GOOD}, ["optim.lr=1e-5", "data.sources.0.repeat=2", "model.lora.rank=8"])
    assert recipe.optim.lr == 1e-5
    assert recipe.data.sources[0].repeat == 2.0
    assert recipe.model.lora.rank == 8
    assert recipe.model.parts == ()
    assert resolve(GOOD).model.parts == ("multi_modal_projector", "language_model")


def test_all_problems_at_once_with_the_nearest_name():
    found = problems(
        {
            "model": {"id": "x", "train": ["language_modle"], "lora": {"rnk": 4}},
            "data": {"sources": [{"name": "a", "anotations": "b"}], "tiles": {"max": "two"}},
            "global_batch": 0,
            "run": "r",
        },
        ["foo"],
    )
    assert "model.lora.rnk: unknown key; did you mean rank?" in found
    assert "data.sources.0.anotations: unknown key; did you mean annotations?" in found
    assert any(line.startswith("data.tiles.max: input should be a valid integer") for line in found)
    assert any("'language_modle'" in line for line in found)
    assert any(line.startswith("global_batch: input should be greater than 0") for line in found)
    assert any("'foo' is not an override" in line for line in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 5}, "epochs, steps: give exactly one of the two"),
        ({"epochs": None}, "epochs, steps: give exactly one of the two"),
        ({"global_batch": None}, "global_batch, global_batch_rows: give exactly one of the two"),
        ({"global_batch_rows": 4}, "global_batch, global_batch_rows: give exactly one of the two"),
        ({**ROWS, "epochs": 1.0, "steps": None}, "packed; give steps"),
        ({**ROWS, "objective": {"name": "retrieval"}}, "for packed rows, not for pairs"),
        ({**ROWS, "data": {**GOOD["data"], "changed": "accept"}}, "data.changed: accept is not"),
        (
            {
                **ROWS,
                "data": {
                    **GOOD["data"],
                    "packing": "official",
                    "share_prefix": False,
                    "allow_overflow": True,
                },
            },
            "data.allow_overflow: not with global_batch_rows",
        ),
        ({"model": {"id": "x", "train": []}}, "nothing is trained"),
        (
            {"model": {"id": "x", "train": ["language_model"], "lora": {"rank": 4}}},
            "language_model is also in model.train",
        ),
        (
            {"data": {**GOOD["data"], "tiles": {"min": 4, "max": 2}}},
            "data.tiles.min: larger than data.tiles.max",
        ),
        (
            {"data": {"sources": GOOD["data"]["sources"] * 2}},
            "two sources are called 'a'",
        ),
    ],
)
def test_contradictions(change, said):
    assert any(said in line for line in problems({**GOOD, **change}))


def test_the_resolved_recipe_reads_back(tmp_path):
    recipe = resolve({**GOOD, "evals": {"e": {"annotations": "c.json", "prompt": "?"}}})
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipes.differences(recipe, recipe) == []
    other = resolve({**GOOD, "optim": {"lr": 1.0}, "log_every": 7})
    assert any(line.startswith("optim.lr was") for line in recipes.differences(recipe, other))
    assert not any("log_every" in line for line in recipes.differences(recipe, other))


@pytest.mark.parametrize(("batch", "changes"), [({}, []), (ROWS, ["data.row_tokens"])])
def test_the_length_of_a_row_changes_a_run_that_counts_rows(batch, changes):
    recipe, other = (resolve({**GOOD, **batch}, [f"data.row_tokens={n}"]) for n in (8192, 16384))
    assert [line.split()[0] for line in recipes.differences(recipe, other)] == changes


def test_what_a_step_counts_is_what_changes_a_run():
    recipe, other = (resolve({**GOOD, **ROWS, "global_batch_rows": n}) for n in (4, 8))
    assert recipes.differences(recipe, other) == ["global_batch_rows was 4, is 8"]
    assert recipes.differences(resolve(GOOD), recipe)


def test_what_a_recipe_leaves_out_of_tiles_is_open():
    """And what is made in Python is what it says."""
    data = resolve(GOOD, ["data.tiles.max=6"]).data
    assert data.tiles == TilesChoice(max=6)
    assert data.normalize is None
    for name in ("tiling", "statistics"):
        with pytest.raises(ValueError, match="left to the checkpoint"):
            getattr(data, name)
    assert (DataConfig().tiling, DataConfig().statistics) == (TilesConfig(), "imagenet")
    whole = ["data.tiles={size: 28, min: 1, max: 2, thumbnail: true, pad_square: false}"]
    recipe = resolve(GOOD, [*whole, "data.normalize=clip"])
    assert recipe.data.tiling == TilesConfig(size=28, max=2)
    again = resolve(yaml.safe_load(recipes.to_yaml(recipe)))
    assert again == recipe


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "is not YAML"), ("", "holds no keys"), ("- 1", "holds no keys")]
)
def test_files_that_are_no_recipe(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="there is no recipe"):
        load_recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("samples", "batch", "drop_last", "steps"),
    [(566_747, 512, False, 1107), (566_747, 512, True, 1106), (64, 8, False, 8), (65, 8, False, 9)],
)
def test_the_number_of_steps(samples, batch, drop_last, steps):
    recipe = resolve({**GOOD, "global_batch": batch, "drop_last": drop_last})
    assert recipe.num_steps(samples) == steps


def test_reading_recipes_needs_no_torch():
    code = "import internvl.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_on_is_a_word_and_true_a_truth_value(tmp_path):
    """YAML 1.1, which PyYAML reads, has a boolean for `on`."""
    file = tmp_path / "recipe.yaml"
    lora = "lora: {rank: 4, on: [vision_tower]}"
    sources = "sources: [{name: a, annotations: a.jsonl, augment: true}]"
    file.write_text(
        f"model: {{id: m, {lora}}}\ndata: {{{sources}}}\nrun: r\nglobal_batch: 8\nsteps: 1\n"
    )
    found = load_recipe(file, ["model.lora.on=[language_model]", "drop_last=false"])
    assert found.model.lora.on == ("language_model",)
    assert found.data.sources[0].augment is True
    assert load_recipe(file).model.lora.on == ("vision_tower",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: a\nsteps: 1\nrun: b\n", "the key 'run' is there twice (lines 1 and 3); keep one"),
        ("optim:\n  lr: 1\n  'lr': 2\n", "the key 'lr' is there twice (lines 2 and 3); keep one"),
        ("evals: {a: {}, a: {}}\n", "the key 'a' is there twice (line 1); keep one"),
        ("data:\n  sources:\n  - name: a\n    name: b\n", "the key 'name' is there twice (lines 3"),
    ],
)
def test_a_repeated_key_is_refused_with_both_lines(tmp_path, text, said):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_recipe(file)
    assert str(refused.value).startswith(f"{file}: {said}")


def test_a_repeated_key_of_an_override_is_refused():
    assert "data: the key 'meta' is there twice (line 1); keep one" in problems(
        GOOD, "data={meta: a, meta: b}"
    )


def test_a_key_may_replace_a_merged_one(tmp_path):
    file = tmp_path / "recipe.yaml"
    tree = yaml.safe_dump(GOOD).replace("optim:", "optim:\n  <<: {lr: 5.0, weight_decay: 0.25}")
    if "optim:" not in tree:
        tree += "optim: {<<: {lr: 5.0, weight_decay: 0.25}, lr: 0.5}\n"
    file.write_text(tree)
    optim = load_recipe(file).optim
    assert optim.weight_decay == 0.25
    assert optim.lr != 5.0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n", "git lfs pull"),
        ("run: a\n".encode("utf-16"), "text in UTF-16: save it as UTF-8"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_another_file_than_a_recipe_is_named(tmp_path, content, said):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_recipe(file)
    assert str(file) in str(refused.value)
    assert said in str(refused.value)


def test_an_image_becomes_no_more_tiles_than_can_be_listed():
    said = "data.tiles.max: input should be less than or equal to 1000, not 1000000000"
    assert problems(GOOD, "data.tiles.max=1000000000") == [said]


# Sections of several types under one key.

_FLAT_EVAL = {
    "annotations": "a",
    "images": ".",
    "prompt": None,
    "max_tokens": 8192,
    "form": "auto",
    "split": "test",
    "modes": ["c", "g"],
    "recall_k": [1, 5, 10],
    "rerank": 0,
    "train": None,
    "pictures": None,
    "tokenize": "ptb",
    "max_new_tokens": 30,
    "classes": None,
    "key": None,
}
_FLAT_OBJECTIVE = {
    "weights": {},
    "micro_batch": None,
    "kept_micro_batches": 1,
    "label_smoothing": 0.0,
    "weighting": "token",
    "loss_normalization": "global",
}


@pytest.mark.parametrize("name", ["caption", "loss", "retrieval", "classify"])
@pytest.mark.parametrize("objective", ["sft", "retrieval", "stage2"])
def test_resolved_recipes_with_the_keys_of_every_type_still_load(name, objective):
    """Earlier versions saved them so, each at its default."""
    tree = {
        **GOOD,
        "evals": {"e": {"type": name, **_FLAT_EVAL}},
        "objective": {"name": objective, **_FLAT_OBJECTIVE},
    }
    recipe = resolve(tree)
    assert recipe.evals["e"].type == name
    assert recipe.objective.name == objective
    assert resolve(yaml.safe_load(recipes.to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evals.e.recall_k=[1]", "evals.e.recall_k: not a key of caption but of retrieval"),
        ("evals.e.recal_k=[1]", "evals.e.recal_k: unknown key; known: type, annotations"),
        ("evals.e.tokenise=ptb", "evals.e.tokenise: unknown key; did you mean tokenize?"),
        ("evals.e.type=los", "evals.e.type: must be one of caption, loss, retrieval, classify"),
        (
            "objective.micro_batch=2",
            "objective.micro_batch: not a key of sft but of retrieval, stage2; "
            "set data.row_tokens instead",
        ),
    ],
)
def test_a_key_of_another_type_is_refused_by_name(override, says):
    tree = {**GOOD, "evals": {"e": {"annotations": "a"}}}
    (line,) = problems(tree, [override])
    assert line.startswith(says)


def test_a_section_without_a_type_is_the_first():
    recipe = resolve({**GOOD, "evals": {"e": {"annotations": "a"}}, "objective": {}})
    assert (recipe.evals["e"].type, recipe.objective.name) == ("caption", "sft")


def test_every_option_of_evaluate_has_a_text():
    for key, sections in eval_options().items():
        for section in sections:
            assert field_docs(section)[key], (section, key)
