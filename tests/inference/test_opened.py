"""A folder is opened once: an audit hook counts what Python really opens.

Weights and what `tokenizers` reads are opened by libraries in Rust, which no hook sees.
"""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pair_runs
import pytest
import tiny_run
from chat_folders import large_vocabulary

from internvl import check, export, plan, train
from internvl.config.recipes import load_recipe
from internvl.data.tokenizers import load_tokenizer
from internvl.inference import load as loading
from internvl.zoo import gpus

GOLDEN = Path(__file__).parents[1] / "golden" / "label_masks"

FAMILIES = ("chat", "dual")

VERBS = {
    "tokenizer": load_tokenizer,
    "load": lambda folder: loading.load(folder, device="cpu"),
    "check": lambda recipe: check.run(load_recipe(recipe)),
    "plan": lambda recipe: plan.make(load_recipe(recipe), gpus.find("H200")),
    "train": lambda recipe: train.run(load_recipe(recipe)),
}

REOPENED = {
    # Once here, checked so that an error can name the file and the key. Then by transformers, which
    # takes a folder and no contents: for the names of versioned files, and for its settings.
    "tokenizer_config.json": 3,
    # Once here, once by transformers, which takes the added tokens of older folders from it.
    "tokenizer.json": 2,
    # Once here, checked, and once by transformers if no settings list the added tokens.
    "special_tokens_map.json": 2,
    "added_tokens.json": 2,
}
"""Most opens of a file that is opened more than once, and why."""


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Name of a job -> how often it opened each file of the folder below it."""
    root = tmp_path_factory.mktemp("once")
    jobs = {name: job for make in (chats, tokenizers, recipes) for name, job in make(root).items()}
    opened: list[str] = []
    counting = True

    def note(event, args):
        if counting and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(note)  # no hook can be removed; this one does nothing afterwards
    counts = {}
    for name, (verb, argument, folder) in jobs.items():
        opened.clear()
        VERBS[verb](argument)
        paths = [Path(file) for file in opened]
        counts[name] = Counter(path.name for path in paths if path.parent == folder)
    counting = False
    return counts


def chats(root: Path) -> dict[str, tuple]:
    """Folders to load: (verb, argument, folder of the model below)."""
    start = tiny_run.make(root, steps=1, run=str(root / "run")).parent / "start"
    words = ["model.train=[]", "model.lora.rank=4"]
    train.run(load_recipe(tiny_run.make(root, steps=1, run=str(root / "run")), words))
    folders = {
        "official": (start, start),
        "hf": (export.run(start, root / "hf"), root / "hf"),
        "of transformers alone": (root / "plain", root / "plain"),
        "shards": (root / "shards", root / "shards"),
        "dual": (pair_runs.model_folder(root / "dual"), root / "dual"),
        "adapter": (root / "run" / "adapter", start),
        "run": (root / "run", start),
    }
    shutil.copytree(root / "hf", root / "plain")
    config = json.loads((root / "plain" / "config.json").read_text())
    del config["internvl"]
    (root / "plain" / "config.json").write_text(json.dumps(config))
    shutil.copytree(root / "hf", root / "shards")
    index_shards(root / "shards")
    return {name: ("load", *folder) for name, folder in folders.items()}


def index_shards(folder: Path) -> None:
    """Renames the weights to one shard with an index."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizers(root: Path) -> dict[str, tuple]:
    """Tokenizers in other files than the small models have."""
    vocabulary = root / "vocabulary"
    shutil.copytree(GOLDEN / "tokenizer_qwen2", vocabulary)
    (vocabulary / "tokenizer.json").unlink()
    folders = {
        "vocabulary": vocabulary,
        "sentencepiece": GOLDEN / "tokenizer_internlm2",
        "large vocabulary": large_vocabulary(root / "large", "PreTrainedTokenizerFast"),
    }
    return {name: ("tokenizer", folder, folder) for name, folder in folders.items()}


def recipes(root: Path) -> dict[str, tuple]:
    """Recipes to check, plan and train."""
    plain = tiny_run.make(root / "a", steps=1, run=str(root / "new"))
    pairs = pair_runs.make(root / "b", steps=1, run=str(root / "pairs"))
    jobs = {
        f"{verb} {family}": (verb, recipe, recipe.parent / "start")
        for verb in ("check", "plan", "train")
        for family, recipe in zip(FAMILIES, (plain, pairs), strict=True)
    }
    return jobs | {"train a finished run": ("train", plain, plain.parent / "start")}


RECIPES = [f"{verb} {family}" for verb in ("check", "plan", "train") for family in FAMILIES]


@pytest.mark.parametrize(
    "job",
    [
        *("official", "hf", "of transformers alone", "shards", "dual", "adapter", "run"),
        *("vocabulary", "sentencepiece"),
        *RECIPES,
    ],
)
def test_a_file_is_opened_once(counts, job):
    opened = counts[job]
    assert opened
    assert {n: times for n, times in opened.items() if times > REOPENED.get(n, 1)} == {}
    is_model = job not in ("vocabulary", "sentencepiece")
    assert opened["config.json"] == is_model


def test_small_files_are_among_those_counted(counts):
    """Otherwise a count of one would prove nothing."""
    assert counts["of transformers alone"]["processor_config.json"] == 1
    assert counts["shards"]["model.safetensors.index.json"] == 1
    assert counts["dual"]["tokenizer.model"] == 1
    assert counts["sentencepiece"]["tokenizer.model"] == 1
    assert counts["vocabulary"]["merges.txt"] == 1
    assert counts["vocabulary"]["vocab.json"] == 1
    assert counts["official"]["tokenizer.json"] == REOPENED["tokenizer.json"]
    assert counts["official"]["generation_config.json"] == 0
    assert not counts["plan chat"].keys() - {"config.json"}


def test_a_finished_run_opens_no_model(counts):
    assert not counts["train a finished run"]


def test_transformers_asks_for_the_version_behind_a_large_vocabulary(counts):
    """Above 100,000 tokens it reads config.json itself, to tell Mistral's tokenizers."""
    assert counts["large vocabulary"]["config.json"] == 1
