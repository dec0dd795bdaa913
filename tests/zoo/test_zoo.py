"""The table of released models against the models built from it at full size (meta device)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from official_keys import official_dual_keys, official_keys

from internvl import zoo
from internvl.config import LoraConfig
from internvl.errors import UnknownModel
from internvl.models import configs, keys
from internvl.models.adapters import lora
from internvl.models.chat import model as chat_model
from internvl.models.dual import configs as dual_configs
from internvl.models.dual import files as dual_files
from internvl.models.tensors import LazyTensor
from internvl.models.vision import count_parameters

ROOT = Path(__file__).parents[2]
CHAT = [model for model in zoo.MODELS.values() if model.family == "chat"]


@pytest.mark.parametrize("model", CHAT, ids=lambda model: model.name)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_sizes_and_keys_at_full_size(model):
    official = zoo.official_config(model)
    config = configs.from_official(official, image_token_id=7)
    built = chat_model.empty_model(config)
    count = count_parameters(built)[1]
    assert count == zoo.num_parameters(model)
    as_printed = f"{count / 1e9:.1f}B" == model.published
    assert as_printed or not model.published or model.note
    names = built.state_dict()
    groups = keys.groups(config, names)
    assert {name for group in groups for name in group.official} == official_keys(official)
    ours = [name for group in groups for name in group.ours]
    assert sorted(ours) == sorted(names)


DUAL = {
    "InternVL-14B-224px": 13_834_975_747,
    "InternVL-14B-Flickr30K-FT-364px": 13_836_319_747,
    "InternVL-14B-FlickrCN-FT-364px": 13_836_319_747,
}


@pytest.mark.parametrize(("name", "wanted"), DUAL.items())
@pytest.mark.filterwarnings("ignore")
def test_sizes_and_keys_of_internvl_14b_at_full_size(name, wanted):
    model = zoo.find(name)
    assert model.family == "dual"
    assert zoo.num_parameters(model) == wanted
    official = zoo.official_config(model)
    config = dual_configs.from_official(official)
    built = dual_files.empty_model(config)
    assert count_parameters(built)[1] == wanted
    names = built.state_dict()
    stored = dict(keys.ours_to_official(config, names))
    assert set(stored) == official_dual_keys(official)
    assert len(stored) == 1048
    lazy = {n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in stored.items()}
    back = keys.official_to_ours(config, names, lazy)
    assert (back.missing, back.unexpected) == ([], [])
    assert {n: t.shape for n, t in back.tensors.items()} == {
        n: tuple(t.shape) for n, t in names.items()
    }
    assert stored["text_projection"].shape == (4096, 768)
    assert stored["logit_scale"].shape == ()
    if name == "InternVL-14B-224px":
        assert 2 * wanted == 27_669_951_494  # the release's own total, in bytes


def test_parameters_of_internvl_14b_by_part():
    config = dual_configs.from_official(zoo.official_config(zoo.find("InternVL-14B-224px")))
    built = dual_files.empty_model(config)
    cross = sum(p.numel() for n, p in built.named_parameters() if ".cross_attn." in n)
    assert cross == 956_418_048
    for part, wanted in {
        "model.vision_tower": 5_902_793_600,
        "model.query_tokens": 393_216,
        "text_projection": 3_145_728,
        "image_pool": 33_207_168,
        "query_pool": 53_515_008,
        "itm_head": 8_194,
    }.items():
        assert count_parameters(built.get_submodule(part))[1] == wanted, part


def test_adapters_of_internvl_14b_are_as_many_as_the_originals():
    config = dual_configs.from_official(zoo.official_config(zoo.find("InternVL-14B-224px")))
    built = dual_files.empty_model(config)
    lora.select_trainable(built, ())
    with torch.device("meta"):
        lora.attach(built, LoraConfig(rank=16, on=("vision_tower", "language_model")))
    assert count_parameters(built)[0] == 39_321_600 + 39_976_960
    for head in (built.lm_head, built.text_projection):  # what its LoRA recipe trains beside them
        head.requires_grad_(True)
    assert count_parameters(built)[0] == 287_055_872


def test_where_the_release_prints_another_number_than_its_weights_have_the_table_says_why():
    differs = {
        model.name: round(zoo.num_parameters(model) / 1e9, 3)
        for model in CHAT
        if model.published and f"{zoo.num_parameters(model) / 1e9:.1f}B" != model.published
    }
    assert differs == {
        "InternVL-Chat-V1-1": 19.013,
        "Mini-InternVL-Chat-4B-V1-5": 4.147,
        "InternVL2-4B": 4.147,
        "InternVL2_5-4B": 3.713,
    }
    assert "4.147 B" in zoo.describe("InternVL2-4B")


def test_sums_of_the_parts():
    assert zoo.num_parameters(zoo.find("InternVL2-2B")) == 304_012_288 + 12_595_200 + 1_889_146_880
    assert zoo._tower(zoo.VISION_TOWERS["InternViT-6B-448px-V1-5"]) == 5_536_496_000


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("InternVL2-2B", "InternVL2-2B"),
        ("OpenGVLab/InternVL2-2B", "InternVL2-2B"),
        ("pretrained/internvl2-2b/", "InternVL2-2B"),
        ("OpenGVLab/InternVL3-1B-hf", "InternVL3-1B"),
    ],
)
def test_a_model_is_found(name, found):
    assert zoo.find(name).name == found


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UnknownModel, match="'InternVL2-3B'; nearest: .*InternVL2-"):
        zoo.find("InternVL2-3B")


def test_published_scores_by_task_language_and_mode():
    dual = {
        (s.task, s.language, s.mode, s.metric): s.value for s in zoo.scores("InternVL-14B-224px")
    }
    assert dual["caption-coco", "en", "g", "cider"] == 128.2
    assert dual["retrieval-flickr30k", "zh", "g", "t2i_recall@1"] == 77.7
    assert dual["retrieval-xtd", "ko", "c", "i2t_recall@10"] == 92.2
    tuned = [s for s in zoo.scores("InternVL2-2B") if s.recipe == "coco-lora-r128"]
    assert {s.metric: s.value for s in tuned}["cider"] == 1.312
    assert {s.metric: s.value for s in zoo.scores("InternVL2-Llama3-76B")}["anls"] == 82.0
    assert zoo.scores("InternVL3-8B") == ()
    # Before and after preference optimization, by the run folder of its recipe.
    model, after = zoo.training("internvl2_5_38b_mpo_full")
    scores = {(s.task, s.recipe): s.value for s in zoo.scores(model)}
    assert (scores["mathvista-testmini", ""], scores["mathvista-testmini", after]) == (72.4, 73.8)


@pytest.mark.parametrize("model", zoo.MODELS.values(), ids=lambda model: model.name)
def test_every_score_is_keyed_once(model):
    found = [(s.task, s.metric, s.language, s.mode, s.recipe) for s in zoo.scores(model.name)]
    assert len(set(found)) == len(found)


def test_memory():
    assert zoo.memory_gib(zoo.find("InternVL2-2B"), "bfloat16") == pytest.approx(4.109, abs=1e-3)
    assert zoo.memory_gib(zoo.find("InternVL2-2B"), "4bit") == pytest.approx(1.683, abs=1e-3)


def test_the_memory_of_the_document_is_that_of_the_verb():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    table = text.split("| | float32 | bfloat16 | 8 bits | 4 bits |\n")[1].split("\n\n")[0]
    lines = table.splitlines()[1:]  # past the line of dashes
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == 3
    for name, *cells in rows:
        assert cells == [f"{zoo.memory_gib(zoo.find(name), dtype):.1f}" for dtype in zoo.BYTES]
        said = ", ".join(f"{dtype} {cell}" for dtype, cell in zip(zoo.BYTES, cells, strict=True))
        assert said in zoo.describe(name)


def test_the_table_and_the_description():
    table = zoo.render_table().splitlines()
    assert len(table) == len(zoo.MODELS) + 1
    assert max(len(line) for line in table) < 160
    text = zoo.describe("InternVL2-8B")
    for part in (
        "8,075,365,376",
        "published 8.1B",
        "InternViT-300M-448px",
        "bfloat16 15.0",
        "16 GB",
    ):
        assert part in text
    assert "does not train here" in zoo.describe("InternVL3_5-GPT-OSS-20B-A4B-Preview")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("InternViT-6B-448px-V1-2", ("published 5.5B", "11.1 GB", "InternVL-Chat-V1-2-Plus")),
        (
            "OpenGVLab/Nous-Hermes-2-Yi-34B",
            ("published 34.4B", "65.0 GB", "NousResearch/Nous-Hermes-2-Yi-34B", "InternVL2-40B"),
        ),
        ("qwen2.5-7b-instruct", ("language model", "7,6", "InternVL3-8B")),
    ],
)
def test_parts_are_described_as_the_guides_print_them(name, lines):
    text = zoo.describe(name)
    for line in lines:
        assert line in text, text
    printed = {"InternViT-6B-448px-V1-2": 5_536_496_000, "Nous-Hermes-2-Yi-34B": 34_388_917_248}
    for part, count in printed.items():
        assert f"{count / 1e9:.1f}B" == zoo.PARTS[part].published
        assert f"{count:,}" in zoo.describe(part)


def test_a_download_knows_its_repository():
    assert zoo.repository("Nous-Hermes-2-Yi-34B") == "NousResearch/Nous-Hermes-2-Yi-34B"
    assert zoo.repository("internvl2-2b") == "OpenGVLab/InternVL2-2B"
    assert zoo.repository("somebody/InternVL2-2B-hf") == "somebody/InternVL2-2B-hf"
    with pytest.raises(UnknownModel, match="LLaMA2-13B: its hub id is in no table"):
        zoo.repository("LLaMA2-13B")


@pytest.mark.parametrize(
    ("name", "language", "printed"),
    [
        ("InternVL-14B-Flickr30K-FT-364px", "en", {"c": 97.2, "g": 97.6}),
        ("InternVL-14B-FlickrCN-FT-364px", "zh", {"c": 96.2, "g": 96.4}),
    ],
)
def test_the_mean_recall_of_fine_tuned_models_is_the_mean_of_its_recalls(name, language, printed):
    for mode, mean in printed.items():
        scores = {
            s.metric: s.value
            for s in zoo.scores(name)
            if (s.task, s.language, s.mode) == ("retrieval-flickr30k", language, mode)
        }
        assert scores.pop("mean_recall") == mean
        assert len(scores) == 6
        # Both are printed with one digit.
        assert sum(scores.values()) / 6 == pytest.approx(mean, abs=0.1)


@pytest.mark.parametrize(
    ("recipe", "printed"),
    [
        ("internvl_14b/internvl_14b_head_flickr30k", ("at least 32 GB", "24 of them needed")),
        ("internvl_14b/internvl_14b_head_coco", ("at least 32 GB", "24 of them needed")),
        ("internvl_14b/internvl_14b_lora_flickr30k_cn", ("at least 40 GB", "37 of them needed")),
        ("internvl_14b/internvl_14b_full_flickr30k", ("97.2 as C, 97.6 as G",)),
        ("internvl_14b/internvl_14b_full_flickr30k_cn", ("96.2 as C, 96.4 as G",)),
        (
            "internvl_chat_v1_2/internvl_chat_v1_2_sft",
            ("5.5B, 11.1 GB", "34.4B, 65.0 GB", "OpenGVLab/Nous-Hermes-2-Yi-34B", "32 GPUs do as"),
        ),
    ],
)
def test_heads_of_recipes_say_what_the_guides_print(recipe, printed):
    text = (Path(zoo.__file__).parent / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    head = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    for words in printed:
        assert words in head, head


def test_importing_it_is_light():
    code = "import sys, internvl.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
