"""What a recipe trains, adapters of any kind, and the merge verb on what came of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft_folders
import pytest
import tiny_run
import torch
from chat_folders import (
    IMAGE_TOKEN_ID,
    add_tokenizer,
    official_folder,
    official_lora_folder,
)
from command_line import call
from peft import LoraConfig as LoraSettings
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file

from internvl import export, train, zoo
from internvl.config import LoraConfig, ModelConfig, TilesConfig
from internvl.config.recipes import load_recipe, resolve
from internvl.errors import ConfigError, UserError
from internvl.inference import load as loading
from internvl.inference import opened
from internvl.inference.generate import Request
from internvl.models import configs
from internvl.models.adapters import lora
from internvl.models.chat import model as chat_model

LORA = {"rank": 4, "on": ["language_model", "vision_tower"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def recipe(project: Path, size: int = 64, **model: object):
    folder = project.parent
    tree = {"model": {"id": str(folder / "start"), **model}, "run": str(folder / "run")}
    source = {"name": "a", "annotations": "a.jsonl"}
    data = {"sources": [source], "tiles": {"size": size, "max": 1, "thumbnail": False}}
    return resolve({**tree, "data": data, "global_batch": 8, "steps": 2, "device": "cpu"})


def test_the_last_blocks_of_the_tower_train_with_a_recipe(project):
    chosen = recipe(project, train=["multi_modal_projector"], train_last_vision_blocks=1)
    model = loading.for_training(chosen).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    last = len(model.model.vision_tower.encoder.layer) - 1
    stems = ("model.multi_modal_projector.", f"model.vision_tower.encoder.layer.{last}.")
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(stems)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose widths are multiples of 64, as 4-bit kernels on a CPU want them."""
    official = zoo.official_config(zoo.find("InternVL2-2B"))
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 600}
    official["vision_config"] = official["vision_config"] | small | heads | {"image_size": 56}
    official["llm_config"] = official["llm_config"] | small | heads
    official |= {"force_image_size": 56, "dynamic_image_size": False}
    torch.manual_seed(0)
    model = chat_model.ChatModel(configs.from_official(official, 526))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    return add_tokenizer(folder, "internlm2")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_answers_adapts_and_does_not_export(kind, wide, tmp_path):
    pytest.importorskip("bitsandbytes")
    plain = loading.load(wide, device="cpu", dtype="bfloat16")
    chat = loading.load(wide, device="cpu", dtype="bfloat16", quantize=kind)
    stored = {n: p.dtype for n, p in chat.model.named_parameters()}
    packed = {n for n, dtype in stored.items() if dtype in (torch.int8, torch.uint8)}
    assert all(
        n.endswith(".weight") and ("_proj" in n or "mlp.fc" in n or "layer" in n) for n in packed
    )
    assert not any("multi_modal_projector" in n or n.startswith("lm_head") for n in packed)
    assert len(packed) == 2 * 7 + 2 * 6
    pair = torch.stack([export.probe(m.model).flatten() for m in (plain, chat)])
    assert torch.corrcoef(pair)[0, 1] > 0.9
    request = Request([{"role": "user", "content": "Hi"}], [Image.new("RGB", (90, 60))])
    assert isinstance(chat.answer([request], max_new_tokens=3)[0], str)
    with pytest.raises(UserError, match="weights are quantized, and what was rounded off is lost"):
        export.run(chat, tmp_path / "out")
    lora.attach(chat.model, LoraConfig(rank=4))
    with pytest.raises(UserError, match="its base is quantized; load the model without quantize"):
        lora.merge(chat.model)


def test_a_model_in_float8_answers_and_does_not_export(wide, tmp_path):
    plain = loading.load(wide, device="cpu", dtype="bfloat16")
    chat = loading.load(wide, device="cpu", dtype="bfloat16", quantize="float8")
    small = [n for n, p in chat.model.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert len(small) == 2 * 7 + 2 * 6
    pair = torch.stack([export.probe(m.model).flatten().float() for m in (plain, chat)])
    assert torch.corrcoef(pair)[0, 1] > 0.98
    request = Request([{"role": "user", "content": "Hi"}], [Image.new("RGB", (90, 60))])
    assert isinstance(chat.answer([request], max_new_tokens=3)[0], str)
    with pytest.raises(UserError, match="float8"):
        export.run(chat, tmp_path / "out")
    with pytest.raises(UserError, match="load it with dtype='bfloat16'"):
        loading.load(wide, device="cpu", dtype="float32", quantize="float8")


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.filterwarnings("ignore")
def test_qlora_trains_and_merges_into_the_base_as_released(kind, wide, tmp_path):
    pytest.importorskip("bitsandbytes")
    lines = tiny_run.make(tmp_path / "p", steps=3, run=str(tmp_path / "run"), dtype="bfloat16")
    words = [f"model.id={wide}", "model.train=[]", "model.lora.rank=4", f"model.quantize={kind}"]
    chosen = load_recipe(lines, [*words, "data.tiles.size=56", "data.max_tokens=512"])
    train.run(chosen)
    merged = load_file(export.run(tmp_path / "run", tmp_path / "merged") / "model.safetensors")
    base = load_file(export.run(wide, tmp_path / "base") / "model.safetensors")
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert moved
    assert all("language_model.model.layers" in name and "_proj" in name for name in moved)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"quantize": "4bit"}, "quantized weights do not train; set model.lora"),
        ({"quantize": "8bit", "lora": LORA, "train_last_vision_blocks": 1}, "do not train"),
        ({"lora": LORA, "train_last_vision_blocks": 1}, "vision_tower is in model.train or"),
        ({"train": ["vision_tower"], "train_last_vision_blocks": 1}, "choose one"),
        ({"quantize": "2bit"}, "model.quantize"),
    ],
)
def test_contradictions_of_a_model(project, model, said):
    with pytest.raises(ConfigError, match=said):
        recipe(project, **model)


def test_blocks_alone_are_something_to_train(project):
    assert recipe(project, train=[], train_last_vision_blocks=2).model.parts == ()
    assert recipe(project, quantize="4bit", lora=LORA, train=["multi_modal_projector"])


def test_gpt_oss_does_not_train(project, tmp_path):
    folder = add_tokenizer(
        official_folder("GptOssForCausalLM", tmp_path, template="Hermes-2"), "qwen2"
    )
    with pytest.raises(UserError, match="GPT-OSS answers and exports here, but does not train"):
        loading.for_training(recipe(project, size=84, id=str(folder)))
    # Before a released one is downloaded: these tests have no network.
    for name in ("OpenGVLab/InternVL3_5-GPT-OSS-20B-A4B-Preview", "internvl3_5_gpt_oss_20b_stage0"):
        chosen = load_recipe(name) if "stage0" in name else recipe(project, size=84, id=name)
        with pytest.raises(UserError, match="GPT-OSS answers and exports here, but does not train"):
            opened.check_start(chosen, weights=True)


def test_a_run_merges_and_a_plain_model_is_refused(capsys, project, tmp_path):
    lines = tiny_run.make(tmp_path / "p", steps=2, run=str(tmp_path / "run"))
    train.run(load_recipe(lines, ["model.train=[]", "model.lora.rank=4"]))
    for number, folder in enumerate((tmp_path / "run", tmp_path / "run" / "adapter")):
        assert export.has_adapters(folder)
        words = ("merge", folder, "--to", tmp_path / f"merged{number}")
        assert call(capsys, *words)[0] == 0
        merged = loading.load(tmp_path / f"merged{number}", device="cpu").model
        adapted = loading.load(folder, device="cpu").model
        assert not lora.has_adapters(merged)
        torch.testing.assert_close(export.probe(merged), export.probe(adapted))
    code, _, err = call(capsys, "merge", project.parent / "start", "--to", tmp_path / "no")
    assert (code, "has no adapters to merge; `internvl export`" in err) == (1, True)


def test_size_normalization_and_padding_of_a_recipe_reach_answers_and_exports(project, tmp_path):
    """The position embeddings are resized once, as the original does."""
    chosen = recipe(project)
    tiles = TilesConfig(size=112, min=1, max=1, thumbnail=False, pad_square=True)
    chosen = replace(chosen, data=replace(chosen.data, tiles=tiles, normalize="siglip"))
    chat = loading.for_training(chosen)
    size = chat.model.config.vision_config.image_size
    rows = chat.model.model.vision_tower.embeddings.position_embeddings.shape[1]
    assert (size, rows) == (
        (112, 112),
        1 + (112 // chat.model.config.vision_config.patch_size[0]) ** 2,
    )
    seen = []
    chat.model.eval().model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    white = Image.new("RGB", (120, 60), "white")
    chat.answer([Request([{"role": "user", "content": "x"}], [white])], max_new_tokens=2)
    assert seen[0].shape == (1, 3, 112, 112)
    assert float(seen[0].max()) == pytest.approx(1)  # (1 - 0.5) / 0.5
    for layout in ("hf", "official"):
        again = loading.load(export.run(chat, tmp_path / layout, layout), device="cpu")
        assert again.tiles == tiles
        assert configs.chat_settings(again.model.config)["normalize"] == "siglip"
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_exif_orientation_of_a_recipe_reaches_training_answers_and_exports(project, tmp_path, exif):
    chosen = recipe(project)
    chat = loading.for_training(replace(chosen, data=replace(chosen.data, exif=exif)))
    stored = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)).resize((60, 40))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    file = tmp_path / "turned.png"
    stored.save(file, exif=orientation)
    shown = stored.transpose(Image.Transpose.ROTATE_270) if exif == "apply" else stored
    folders = [export.run(chat, tmp_path / layout, layout) for layout in ("hf", "official")]
    for model in (chat, *(loading.load(folder, device="cpu") for folder in folders)):
        seen = []
        model.model.eval().model.vision_tower.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append((*args, *kwargs.values())[0]),
            with_kwargs=True,
        )
        for image in (file, shown):
            model.answer([Request([{"role": "user", "content": "x"}], [image])], max_new_tokens=2)
        assert torch.equal(seen[0], seen[-1])
        assert configs.chat_settings(model.model.config)["exif"] == exif
    official = json.loads((tmp_path / "official" / "config.json").read_text())
    assert official.get("exif") == (exif if exif == "apply" else None)


def test_training_goes_on_from_adapters_of_any_kind(project, tmp_path):
    """They are merged, so that what trains starts from what PEFT computes; and on top of those."""
    base = export.run(project.parent / "start", tmp_path / "hf")
    settings = {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"], "bias": "all"}
    with peft_folders.quiet():
        given = LoraSettings(r=4, lora_alpha=16, **settings)
        adapted = get_peft_model(peft_folders.plain(base), given)
        for number, value in enumerate(p for p in adapted.parameters() if p.requires_grad):
            value.data += 0.02 * torch.randn(value.shape, generator=torch.manual_seed(number))
        adapted.save_pretrained(tmp_path / "adapter")
    peft_folders.changed_config(tmp_path / "adapter", base_model_name_or_path=str(base))
    expected = export.probe(adapted.base_model.model)
    before = recipe(project, id=str(tmp_path / "adapter"), train=[], lora={"rank": 4})
    start = loading.for_training(before)
    torch.testing.assert_close(export.probe(start.model), expected, atol=5e-5, rtol=0)
    assert {n for n, p in start.model.named_parameters() if p.requires_grad} == {
        n for n, _ in start.model.named_parameters() if ".lora_" in n
    }
    words = ["model.train=[]", "model.lora.rank=4", f"model.id={tmp_path / 'adapter'}"]
    first, second = tmp_path / "first", tmp_path / "second"
    train.run(load_recipe(tiny_run.make(project.parent, steps=2, run=str(first)), words))
    run = loading.load(first, device="cpu").model
    assert not torch.equal(export.probe(run), export.probe(start.model))
    found = export.probe(loading.load(first / "adapter", device="cpu").model)
    torch.testing.assert_close(found, export.probe(run), atol=5e-5, rtol=0)
    merged = loading.load(export.run(first, tmp_path / "merged"), device="cpu").model
    torch.testing.assert_close(export.probe(merged), export.probe(run), atol=1e-4, rtol=0)
    words[-1] = f"model.id={first}"  # a run that has adapters, and adapters on top
    train.run(load_recipe(tiny_run.make(project.parent, steps=2, run=str(second)), words))
    run = loading.load(second, device="cpu").model
    found = export.probe(loading.load(second / "adapter", device="cpu").model)
    torch.testing.assert_close(found, export.probe(run), atol=5e-5, rtol=0)
    in_4_bits = replace(before.model, quantize="4bit")
    with pytest.raises(UserError, match=r"has adapters, which quantized weights cannot .* merge"):
        loading._choose_trainable(run, in_4_bits)


def test_adapters_on_an_official_checkpoint_that_has_some(tmp_path):
    """As the original's use_llm_lora writes them: merged, then adapters on top."""
    folder, _ = official_lora_folder(tmp_path / "official")
    model = chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)
    expected = export.probe(model)
    loading._choose_trainable(model, ModelConfig(id=str(folder), lora=LoraConfig(rank=2)))
    torch.testing.assert_close(export.probe(model), expected, atol=1e-4, rtol=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lora.save_adapter(model, tmp_path / "upper", folder)
    upper = loading.load(tmp_path / "upper", device="cpu", image_token_id=IMAGE_TOKEN_ID)
    torch.testing.assert_close(export.probe(upper.model), export.probe(model))
    assert not torch.allclose(export.probe(model), expected, atol=0.01)
