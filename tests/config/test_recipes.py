"""Every recipe resolves, says how to run it, and has the values of the original it names."""

import json
import re
from pathlib import Path

import pytest

from internvl import zoo
from internvl.config import Recipe, recipes
from internvl.config.recipes import load_recipe
from internvl.datasets import convert, playground, prepare
from internvl.errors import ConfigError
from internvl.zoo import recipe_table

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

PROJECTOR_AND_LANGUAGE = ("multi_modal_projector", "language_model")

# Of the original scripts: hub id without owner; full: GPUs x per device x accumulated,
# drop path; LoRA: the same, no drop path; both: learning rate, weight decay, longest sample.
SECOND_FINETUNINGS = [
    ("InternVL2-1B", (8, 4, 4), 0.1, (2, 4, 2), 4e-5, 0.01, 4096),
    ("InternVL2-2B", (8, 4, 4), 0.1, (2, 4, 2), 4e-5, 0.01, 4096),
    ("InternVL2-4B", (8, 4, 4), 0.1, (2, 4, 2), 4e-5, 0.01, 4096),
    ("InternVL2-8B", (8, 4, 4), 0.1, (2, 4, 2), 4e-5, 0.05, 4096),
    ("InternVL2-26B", (8, 2, 8), 0.4, (2, 2, 4), 2e-5, 0.05, 4096),
    ("InternVL2-40B", (16, 2, 4), 0.4, (2, 2, 4), 2e-5, 0.05, 4096),
    ("InternVL2-Llama3-76B", (32, 1, 4), 0.4, (8, 1, 2), 2e-5, 0.05, 4096),
    ("InternVL2_5-1B", (8, 4, 4), 0.1, (2, 4, 2), 4e-5, 0.01, 8192),
    ("InternVL2_5-2B", (8, 4, 4), 0.1, (2, 4, 2), 4e-5, 0.01, 8192),
    ("InternVL2_5-4B", (8, 4, 4), 0.1, (2, 4, 2), 4e-5, 0.01, 8192),
    ("InternVL2_5-8B", (8, 4, 4), 0.1, (2, 4, 2), 4e-5, 0.05, 8192),
    ("InternVL2_5-26B", (8, 2, 8), 0.4, (2, 2, 4), 2e-5, 0.05, 8192),
    ("InternVL2_5-38B", (16, 2, 4), 0.4, (2, 2, 4), 2e-5, 0.05, 8192),
    ("InternVL2_5-78B", (32, 1, 4), 0.4, (8, 1, 2), 2e-5, 0.05, 8192),
]
COCO = [("InternVL2-2B", 4096), ("InternVL2_5-2B", 8192)]


def recipe(name: str) -> Recipe:
    (path,) = (ROOT / "recipes").rglob(f"{name}.yaml")
    return load_recipe(path)


def head(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def common(found: Recipe) -> None:
    """What all of the originals' scripts share."""
    assert found.optim.warmup_ratio == 0.03
    assert found.optim.min_lr_ratio == 0
    assert found.optim.betas == (0.9, 0.999)
    assert found.optim.eps == 1e-8
    assert found.optim.max_grad_norm == 1.0
    assert found.optim.decay_vectors
    assert found.epochs == 1
    assert found.seed == 42
    assert found.dtype == "bfloat16"
    assert found.data.tiles.size == 448
    assert found.data.tiles.min == 1
    assert found.objective.weighting == "token"
    assert all(source.insert_image_mark for source in found.data.sources)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_and_says_how_it_is_run(path: Path) -> None:
    found = load_recipe(path)
    said = head(path)
    if path.stem.startswith("demo"):
        return
    assert re.search(rf"internvl train (recipes/\S+/)?{re.escape(path.stem)}\b", said)
    assert "# hardware:" in said
    assert found.run.parent == Path("runs")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 100


def test_the_table_writes_the_files_of_the_recipe_table() -> None:
    for path, text in recipe_table.render():
        written = (recipe_table.FOLDER / path).read_text(encoding="utf-8")
        assert written == text, f"run `python -m internvl.zoo.recipe_table`: {path}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_by_name_anywhere(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_recipe(path)
    assert load_recipe(path.stem) == expected
    assert load_recipe(f"{path.stem}.yaml") == expected
    assert load_recipe(path.relative_to(ROOT)) == expected


def test_a_file_in_the_working_directory_goes_before_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path("internvl2_2b_lora.yaml")
    own.write_text(path_of("internvl2_1b_lora").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_recipe(own).model.id == "OpenGVLab/InternVL2-1B"


def test_a_misspelled_name_gets_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no recipe or run intervl2_2b_lora; did you mean internvl2_2b"
    ):
        load_recipe("intervl2_2b_lora")


def test_run_folders_and_file_names_differ() -> None:
    runs = [load_recipe(path).run for path in RECIPES]
    assert len(set(runs)) == len(runs)
    assert len({path.stem for path in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_models_are_released_ones(path: Path) -> None:
    start = load_recipe(path).model
    model = start.id
    if model is None:
        assert zoo.find_tower(start.vision)
        assert zoo.find_language_model(start.language)
    elif model.startswith("OpenGVLab/"):
        stage = re.compile("-(Instruct|Pretrained)$")
        assert zoo.find(model).repository == stage.sub("", model)
    else:
        assert f'"{model}"' in head(path) or path.stem.startswith("demo")  # made as the head says


@pytest.mark.parametrize("row", SECOND_FINETUNINGS, ids=lambda row: row[0])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_recipe_table(row: tuple, method: str) -> None:
    model, full, drop_path, lora, lr, weight_decay, max_tokens = row
    found = recipe(f"{model.lower().replace('-', '_')}_{method}")
    common(found)
    devices, per_device, accumulated = full if method == "full" else lora
    assert found.global_batch == devices * per_device * accumulated
    assert found.model.id == f"OpenGVLab/{model}"
    assert found.model.drop_path == (drop_path if method == "full" else 0.0)
    assert found.optim.lr == lr
    assert found.optim.weight_decay == weight_decay
    assert found.data.max_tokens == max_tokens
    assert (found.data.tiles.max, found.data.tiles.thumbnail) == (6, True)
    if method == "full":
        assert found.model.lora is None
        assert found.model.parts == PROJECTOR_AND_LANGUAGE
    else:
        only_adapters(found, 16)


# Of the original scripts: learning rate, global batch, longest sample, drop path, DeepSpeed stage.
MPO = {
    "internvl2_8b": (5e-6, 256, 6144, 0.1, "zero1"),
    **{f"internvl2_5_{n}b": (1e-6, 256, 8192, 0.1, "zero1") for n in (1, 2, 4, 8)},
    "internvl2_5_26b": (1e-6, 256, 8192, 0.4, "zero3"),
    **{f"internvl2_5_{n}b": (1e-6, 512, 8192, 0.4, "zero3") for n in (38, 78)},
    **{f"internvl3_{n}b": (2e-7, 256, 12288, 0.1, "zero1") for n in (1, 2)},
    **{f"internvl3_{n}b": (2e-7, 256, 12288, 0.1, "zero3") for n in (8, 9, 14)},
    **{f"internvl3_{n}b": (2e-7, 512, 8192, 0.4, "zero3") for n in (38, 78)},
    **{f"internvl3_5_{n}b": (2e-7, 256, 16384, 0.0, "zero3") for n in (1, 2, 4)},
    **{f"internvl3_5_{n}": (2e-7, 256, 16384, 0.1, "zero3") for n in ("8b", "14b", "30b_a3b")},
    **{f"internvl3_5_{n}": (2e-7, 256, 16384, 0.4, "zero3") for n in ("38b", "241b_a28b")},
}


@pytest.mark.parametrize("size", MPO)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_preference_recipes(size: str, method: str) -> None:
    lr, batch, max_tokens, drop_path, shard = MPO[size]
    chosen = recipe(f"{size}_mpo_{method}")
    assert (chosen.global_batch, chosen.data.max_tokens) == (batch, max_tokens)
    assert chosen.objective.term_weights == {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
    assert (chosen.objective.beta, chosen.objective.delta) == (0.1, "exact")
    assert (chosen.optim.weight_decay, chosen.optim.warmup_ratio) == (0.05, 0.03)
    assert (chosen.data.tiles.max, chosen.data.tiles.thumbnail) == (12, True)
    assert "instruct" in str(chosen.model.id).lower() or not size.startswith("internvl3")
    if method == "full":
        assert chosen.model.parts == ("vision_tower", *PROJECTOR_AND_LANGUAGE)
        assert (chosen.optim.lr, chosen.model.drop_path) == (lr, drop_path)
        assert chosen.parallel.shard == shard
        assert chosen.objective.reference_of(chosen) == "precomputed"
    else:
        only_adapters(chosen, 16)
        assert chosen.objective.reference_of(chosen) == "adapters"
    # With exact delta all rows of a GPU but one run forward beforehand; adapters off once more.
    assert chosen.objective.forwards(chosen, 4) == 0.75 + (method == "lora")
    assert chosen.objective.forwards(chosen, 1) == (method == "lora")


def only_adapters(found: Recipe, rank: int) -> None:
    """Adapters on the language model with alpha = 2 * rank, dropout 0.05, and nothing else."""
    adapters = found.model.lora
    assert adapters is not None
    assert (adapters.rank, adapters.dropout, adapters.on) == (rank, 0.05, ("language_model",))
    assert adapters.alpha in (None, 2 * rank)
    assert found.model.parts == ()


@pytest.mark.parametrize(("model", "max_tokens"), COCO)
def test_coco_lora(model: str, max_tokens: int) -> None:
    found = recipe(f"{model.lower().replace('-', '_')}_lora_coco")
    common(found)
    only_adapters(found, 128)
    assert found.model.id == f"OpenGVLab/{model}"
    assert found.model.drop_path == 0
    assert (found.optim.lr, found.optim.weight_decay) == (4e-5, 0.01)
    assert found.global_batch == 512
    assert found.num_steps(566_747) == 1_106
    assert found.data.max_tokens == max_tokens
    # What the rate was measured with: nine images of seven tiles, their questions and captions.
    assert (found.data.row_tokens, found.data.max_tiles) == (16640, 64)
    assert (found.data.tiles.max, found.data.tiles.thumbnail) == (6, True)
    (evaluation,) = found.evals.values()
    assert evaluation.prompt == "Provide a one-sentence caption for the provided image."
    assert evaluation.max_new_tokens == 30


def test_qlora_is_lora_on_a_base_in_4_bits() -> None:
    rounded, plain = recipe("internvl2_8b_qlora"), recipe("internvl2_8b_lora")
    changed = {text.partition(" was ")[0] for text in recipes.differences(plain, rounded)}
    assert changed == {"model.quantize"}
    assert (rounded.model.quantize, rounded.compute.checkpointing) == ("4bit", "full")


def test_habitat_is_coco_with_other_data() -> None:
    habitat, coco = recipe("internvl2_2b_lora_habitat"), recipe("internvl2_2b_lora_coco")
    assert (habitat.model, habitat.optim) == (coco.model, coco.optim)
    assert habitat.data.tiles == coco.data.tiles
    assert habitat.data.max_tokens == coco.data.max_tokens
    assert (habitat.global_batch, habitat.epochs) == (coco.global_batch, coco.epochs)


def test_chat_1_2_from_its_parts() -> None:
    found = recipe("internvl_chat_v1_2_sft")
    common(found)
    assert found.model.lora is None
    assert set(found.model.parts) == {"vision_tower", *PROJECTOR_AND_LANGUAGE}
    assert found.model.drop_path == 0.4
    assert (found.optim.lr, found.optim.weight_decay) == (1e-5, 0.05)
    assert found.data.max_tokens == 2048
    assert (found.data.tiles.max, found.data.tiles.thumbnail) == (1, False)
    assert found.global_batch == 512
    assert found.num_steps(1_267_819) == 1_267_819 // 512


# Of the original scripts: data set in their table, its files, epochs.
RETRIEVAL = {
    "flickr30k": ("flickr30k_en_train", "flickr30k/flickr30k_train_karpathy.txt", 10),
    "flickr30k_cn": ("flickr30k_cn_train", "flickr30k/flickr30k_cn_train.txt", 10),
    "coco": ("coco_karpathy_train", "coco/annotations/coco_karpathy_train.json", 5),
}


@pytest.mark.parametrize("data", RETRIEVAL)
@pytest.mark.parametrize("method", ["full", "head", "lora"])
def test_retrieval_finetunings(data: str, method: str) -> None:
    found = recipe(f"internvl_14b_{method}_{data}")
    name, annotations, epochs = RETRIEVAL[data]
    (source,) = found.data.sources
    assert (source.name, source.annotations) == (name, Path("data") / annotations)
    assert source.type == ("coco_format" if data == "coco" else "flickr_format")
    assert str(source.images) == ("data/coco" if data == "coco" else "data/flickr30k/Images")
    assert found.epochs == epochs
    assert not found.drop_last
    assert found.model.id == "OpenGVLab/InternVL-14B-224px"
    assert found.objective.name == "retrieval"
    # Frozen towers keep nothing for a backward pass, so all pairs fit at once.
    assert found.objective.micro_batch == (128 if method == "head" else 32)
    assert found.objective.term_weights == {"itc": 1.0, "itm": 1.0}
    optim = found.optim
    assert (optim.lr, optim.weight_decay, optim.warmup_steps) == (1e-6, 0.05, 100)
    assert (optim.betas, optim.eps, optim.max_grad_norm) == ((0.9, 0.999), 1e-8, 1.0)
    assert (optim.schedule, optim.min_lr_ratio) == ("cosine", 0.0)
    assert (found.dtype, found.seed) == ("bfloat16", 42)
    (evaluation,) = found.evals.values()
    assert evaluation.modes == ("c", "g")
    assert evaluation.clean
    assert evaluation.train == source.annotations
    full = method == "full"
    assert found.data.tiles.size == (364 if full else 224)
    assert found.global_batch == (32 * 32 if full else 4 * 32)
    assert found.model.drop_path == (0.3 if full else 0.0)
    decay = optim.layer_decay
    assert (decay is not None) is optim.decay_scalars is full
    if decay is not None:
        assert (decay.vision, decay.qllama) == (0.9, 0.9)
        assert found.model.parts == ("vision_tower", "language_model", "heads")
    adapters = found.model.lora
    assert (adapters is not None) is (method == "lora")
    if adapters is not None:
        assert (adapters.rank, adapters.alpha, adapters.dropout) == (16, None, 0.05)
        assert adapters.on == ("vision_tower", "language_model")
        assert found.model.parts == ("text_projection", "lm_head")
    if method == "head":
        assert found.model.parts == ("heads",)
        assert "model.train=[text_projection,lm_head]" in head(path_of(found.run.name))
    assert "optim.schedule=as_shipped" in " ".join(head(path_of(found.run.name)).split("#"))


def path_of(name: str) -> Path:
    (path,) = (ROOT / "recipes").rglob(f"{name}.yaml")
    return path


def test_the_sft_mixture_is_what_prepare_finds() -> None:
    sources = recipe("internvl_chat_v1_2_sft").data.sources
    assert {source.name: Path(source.images) for source in sources} == {
        name: Path("playground/data") / folder for name, folder in playground.SFT_FOLDERS.items()
    }
    for source in sources:
        assert source.annotations == Path(f"playground/opensource/{source.name}.jsonl")
        assert source.repeat == 1
    assert recipe("sft-v1.2").data.meta == Path("playground/internvl_1_2_finetune.json")


def test_every_prepared_set_has_a_recipe_that_names_its_command() -> None:
    folder = ROOT / "recipes/data"
    assert {path.stem for path in folder.glob("*.yaml")} == set(prepare.NAMES)
    for path in folder.glob("*.yaml"):
        assert f"internvl data prepare {path.stem} " in head(path)


def test_commands_in_heads_name_files_that_exist() -> None:
    for path in RECIPES:
        for name in re.findall(r"recipes/\S+\.yaml", head(path)):
            assert (ROOT / name).exists(), f"{path}: {name}"


def test_the_data_guide_names_what_exists() -> None:
    guide = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for name in re.findall(r"recipes/\S+\.yaml", guide):
        assert (ROOT / name).exists(), name
    assert set(re.findall(r"data convert (\S+)", guide)) == set(convert.KINDS)
    table = guide.partition("## Published data sets")[2]
    assert set(re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE)) == set(prepare.NAMES)
    for block in re.findall(r"```json\n(.*?)```", guide, re.DOTALL):
        for text in [block] if block.startswith("{\n") else block.splitlines():
            json.loads(text)


def test_exif_orientation_is_for_chat_models() -> None:
    sources = [{"name": "a", "annotations": "a.jsonl"}]
    data = {"exif": "apply", "sources": sources}
    tree = {"model": {"id": "x"}, "data": data, "run": "r", "global_batch": 1}
    assert recipes.resolve(tree, ["epochs=1"]).data.exif == "apply"
    with pytest.raises(ConfigError, match=r"data\.exif: apply is for chat models; turn the images"):
        recipes.resolve(tree, ["epochs=1", "objective.name=retrieval"])
