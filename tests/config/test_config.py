"""Recipes: every problem at once, nearest names, overrides, and a resolved copy that reads back."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from internvl.config import (
    DataConfig,
    Recipe,
    TilesChoice,
    TilesConfig,
    eval_options,
    foreign,
    recipes,
)
from internvl.config.docs import field_docs
from internvl.config.problems import keys
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
    assert any(line.startswith("data.tiles.max: must be a whole number") for line in found)
    assert any("'language_modle'" in line for line in found)
    assert any(line.startswith("global_batch: must be above 0") for line in found)
    assert any("'foo' is not an override" in line for line in found)


ZERO3 = {"parallel": {"shard": "zero3"}}


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
        ({"parallel": {"replicas": 2}}, "parallel.replicas: only with parallel.shard"),
        ({"parallel": {"offload": "cpu"}}, "parallel.offload: only with parallel.shard"),
        ({"parallel": {"reduce": "bfloat16"}}, "parallel.reduce: only with parallel.shard"),
        (
            {**ZERO3, "model": {"id": "x", "quantize": "4bit", "train": [], "lora": {"rank": 4}}},
            "remove model.quantize",
        ),
        ({**ZERO3, "compute": {"float8": True}}, "set compute.float8: false"),
        ({**ZERO3, "optim": {"offload": True}}, "set parallel.offload: cpu instead"),
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
    with pytest.raises(ConfigError, match=r"`internvl check internvl2_2b_lora --copy \S+g.yaml`"):
        load_recipe(tmp_path / "missing.yaml")


def test_a_list_of_data_sets_is_no_recipe(tmp_path):
    meta = tmp_path / "custom.json"
    meta.write_text('{"a": {"root": "", "annotation": "a.jsonl"}}', encoding="utf-8")
    with pytest.raises(ConfigError, match="custom.json is a list of data sets, no recipe") as no:
        load_recipe(meta)
    words = str(no.value).split("`internvl train ")[1].rstrip("`").replace("'", "").split()
    assert load_recipe(words[0], words[1:]).data.meta == meta


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("PER_DEVICE_BATCH_SIZE=4", "here it is global_batch ("),
        ("GRADIENT_ACC=2", "here it is global_batch ("),
        ("GPUS=2", "all GPUs are used; `--gpus N` uses fewer"),
        ("PARTITION=a", "`internvl launch RECIPE --nodes N --partition NAME`"),
    ],
)
def test_a_variable_of_the_scripts_names_what_stands_for_it(override, says):
    (line,) = problems(GOOD, [override])
    assert says in line


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
    said = "data.tiles.max: must be 1000 or less, not 1000000000"
    assert problems(GOOD, "data.tiles.max=1000000000") == [said]


TRIED = {
    "lr=2e-5": "write optim.lr=2e-5",
    "learning_rate=2e-5": "here it is optim.lr",
    "optim.learning_rate=2e-5": "here it is optim.lr",
    "batch_size=4": "here it is global_batch (counts samples over all devices",
    "per_device_train_batch_size=4": "here it is global_batch (",
    "gradient_accumulation_steps=8": "here it is global_batch (",
    "num_train_epochs=3": "here it is epochs",
    "max_steps=3": "here it is steps",
    "lora_rank=16": "here it is model.lora.rank (adapters are a section, `model.lora: {rank: 16",
    "use_llm_lora=16": "here it is model.lora.rank",
    "lora_alpha=32": "here it is model.lora.alpha",
    "freeze_backbone=true": "here it is model.train (it lists what trains, all else is frozen)",
    "max_seq_length=4096": "here it is data.max_tokens",
    "data.max_length=4096": "here it is data.max_tokens",
    "weight_decay=0.1": "write optim.weight_decay=0.1",
    "warmup_ratio=0.1": "write optim.warmup_ratio=0.1",
    "lr_scheduler_type=cosine": "here it is optim.schedule",
    "output_dir=runs/x": "here it is run (the run folder)",
    "max_dynamic_patch=6": "here it is data.tiles.max",
    "save_steps=100": "here it is checkpoint.every",
    "bf16=true": "here it is dtype",
    "max_tokens=3": "it is one of another section: data.max_tokens, evals.NAME.max_tokens",
    "lora.rank=3": "it is one of another section: model.lora",
    "learnin_rate=3": "did you mean optim.lr?",
}


@pytest.mark.parametrize(("override", "says"), TRIED.items())
def test_a_key_of_another_trainer_names_ours(override, says):
    (line,) = problems(GOOD, [override])
    assert line.startswith(f"{override.partition('=')[0].split('.rank')[0]}: unknown key; ")
    assert says in line


def test_every_key_that_is_named_instead_exists():
    for name, (key, _) in foreign.ours().items():
        assert key in keys(Recipe), (name, key)
        # A key of ours that has its own place is no foreign one.
        assert name not in [dotted for dotted in keys(Recipe) if "." not in dotted]


WRONG = {
    "model.lora=16": "model.lora: must be a section of keys, not 16",
    "model.lora=true": "model.lora: must be a section of keys, not true",
    "evals=3": "evals: must be a section of keys, not 3",
    "optim.lr=fast": "optim.lr: must be a number, not 'fast'",
    "optim.lr=-1": "optim.lr: must be above 0, not -1",
    "optim.lr=.inf": "optim.lr: must be a finite number, not inf",
    "optim.eps=.nan": "optim.eps: must be a finite number, not nan",
    "model.drop_path=2": "model.drop_path: must be 1 or less, not 2",
    "guard.window=2": "guard.window: must be 8 or more, not 2",
    "global_batch=1.5": "global_batch: must be a whole number, not 1.5",
    "compute.compile=maybe": "compute.compile: must be true or false, not 'maybe'",
    "seed=null": "seed: must be a whole number, not null",
    "model.id=3": "model.id: must be a text, not 3; put it in quotes",
    "data.sources.0.images=3": "data.sources.0.images: must be a text, not 3; put it in quotes",
    "data.meta=3": "data.meta: must be a path, not 3",
    "dtype=fp16": "dtype: must be 'float32' or 'bfloat16', not 'fp16'",
    "optim.betas=[0.9, 0.95, 1]": "optim.betas: must have 2 values, not 3",
    "data.video.sampling=all": "data.video.sampling: must be rand, middle, or fps and frames per "
    "second, such as fps2, not 'all'",
    "data.video.label=Frame": "data.video.label: must hold {}, which becomes the number of the "
    "frame, not 'Frame'",
}


def test_true_is_no_number():
    tree = {**GOOD, "optim": {"lr": True, "betas": [0.9, False], "decay_vectors": True}}
    with pytest.raises(ConfigError) as error:
        resolve(tree, ["log_every=true"])
    lines = str(error.value)
    for key, value in (("optim.lr", "true"), ("optim.betas.1", "false"), ("log_every", "true")):
        assert f"{key}: must be a number, not {value}" in lines
    assert "decay_vectors" not in lines


@pytest.mark.parametrize(("override", "line"), WRONG.items())
def test_a_wrong_value_is_told_in_words_of_a_recipe(override, line):
    assert problems(GOOD, [override]) == [line]


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    source = {**GOOD["data"]["sources"][0], "annotations": "~/a.jsonl", "images": "~/photos"}
    recipe = resolve({**GOOD, "data": {"sources": [source]}, "run": "~/runs/a"})
    (source,) = recipe.data.sources
    assert recipe.run == Path("/home/me/runs/a")
    assert (source.annotations, source.images) == (Path("/home/me/a.jsonl"), "/home/me/photos")
    kept = resolve(GOOD, ["data.sources.0.images=s3://bucket/~a", "run=a~"])
    assert (kept.data.sources[0].images, kept.run) == ("s3://bucket/~a", Path("a~"))
    (line,) = problems(GOOD, ["run=~nobody-here/a"])
    assert line.startswith("run: there is no home folder ~nobody-here; write the whole path")


def test_the_other_way_to_give_a_length_replaces_the_first():
    """`steps=5` on the command line needs no `epochs=null` next to it."""
    recipe = resolve({**GOOD, "epochs": 1.0, "steps": None}, ["steps=5"])
    assert (recipe.epochs, recipe.steps) == (None, 5)
    both = problems({**GOOD, "epochs": 1.0, "steps": None}, ["steps=5", "epochs=2"])
    assert both == ["epochs, steps: give exactly one of the two"]


def test_a_run_folder_is_its_recipe_where_it_is_now(tmp_path):
    for name, says in (
        ("nope", "there is no recipe or run "),
        (".", "is a folder and no run, for it has no recipe.yaml"),
    ):
        with pytest.raises(ConfigError) as refused:
            load_recipe(tmp_path / name)
        assert says in str(refused.value)
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(resolve(GOOD)))
    with pytest.raises(ConfigError, match="only a recipe is in it; name that: .*recipe.yaml"):
        load_recipe(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert load_recipe(tmp_path).run == tmp_path
    assert load_recipe(tmp_path, ["run=elsewhere"]).run == Path("elsewhere")


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


def test_a_key_that_was_renamed_is_read_under_both_names():
    """Runs saved by earlier versions resume."""
    section = {"type": "caption", "annotations": "a"}
    (old, new) = (
        resolve({**GOOD, "evals": {"e": {**section, key: "list.json"}}})
        for key in ("pictures", "image_list")
    )
    assert old == new
    assert old.evals["e"].image_list == Path("list.json")
    both = {**section, "pictures": "a.json", "image_list": "b.json"}
    (line,) = problems({**GOOD, "evals": {"e": both}})
    assert line.startswith("evals.e.pictures: unknown key")
    # Of a type that has neither, the one that was written is named.
    other = {"type": "loss", "annotations": "a", "pictures": "a.json"}
    (line,) = problems({**GOOD, "evals": {"e": other}})
    assert line.startswith("evals.e.pictures: ")


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
