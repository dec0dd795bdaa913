"""config.json with wrong values: one sentence with file and key, and no release is refused."""

import json
import random
import re
import shutil

import mutations
import pytest
import torch
from chat_folders import GOLDEN, IMAGE_TOKEN_ID, add_tokenizer, golden_folder, official_folder
from data_files import model_folder
from dual_folders import dual_folder, small_tokenizer
from safetensors.torch import load_file, save_file

from internvl import export, zoo
from internvl.data.tokenizers import load_tokenizer
from internvl.errors import ModelFolderError, UserError
from internvl.inference import load as loading
from internvl.models import config_checks, hub
from internvl.models.chat import model as chat_model
from internvl.models.dual import files as dual_files


def change(folder, place, value):
    """Another value at a place of config.json; a key of None is deleted."""
    file = folder / "config.json"
    file.write_text(json.dumps(mutations.set_value(json.loads(file.read_text()), place, value)))
    return folder


@pytest.mark.parametrize("name", zoo.MODELS)
def test_no_release_is_refused(name, tmp_path):
    config = zoo.official_config(zoo.find(name))
    check = config_checks.check_dual if "qllama_config" in config else config_checks.check_chat
    check(tmp_path / "config.json", config)


CHAT = [
    (("vision_config", "hidden_size"), "64", "vision_config.hidden_size is '64', a whole number"),
    (("vision_config", "patch_size"), 0, "vision_config.patch_size is 0"),
    (("vision_config", "image_size"), [84, 42], r"vision_config.image_size is \[84, 42\]"),
    (("vision_config", "num_hidden_layers"), 10**9, "from 1 to 1000 is expected"),
    (("vision_config", "norm_type"), "batch_norm", "'rms_norm' or 'layer_norm' is expected"),
    (("vision_config", "hidden_act"), "gelo", "an activation that transformers knows"),
    (("vision_config", "num_attention_heads"), 7, "a divisor of 80 is needed"),
    (("vision_config",), None, "vision_config is None, an object is expected"),
    (("vision_config",), [], r"vision_config is \[\], an object is expected"),
    (("llm_config", "num_hidden_layers"), None, "llm_config.num_hidden_layers is None"),
    (("llm_config", "hidden_size"), -64, "llm_config.hidden_size is -64"),
    (("llm_config", "hidden_size"), True, "llm_config.hidden_size is True"),
    (("llm_config", "vocab_size"), 6.5, "llm_config.vocab_size is 6.5"),
    (("llm_config", "rms_norm_eps"), float("nan"), "llm_config.rms_norm_eps is nan"),
    (("llm_config", "rope_theta"), "1e6", "llm_config.rope_theta is '1e6'"),
    (("llm_config", "rope_scaling"), 2.0, "an object or null is expected"),
    (("llm_config", "rope_scaling"), {"type": "none"}, "llm_config.rope_scaling.type is 'none'"),
    (("llm_config", "rope_scaling"), {"type": "su", "short_factor": [1.0]}, "list of 8 factors"),
    (("llm_config", "rope_scaling"), {"type": "linear", "factor": "2"}, "factor is '2', a number"),
    (("llm_config", "rope_scaling"), {"type": "longrope"}, "do not make a model"),
    (("llm_config", "use_cache"), {}, r"a model \(TypeError: Field 'use_cache' expected bool, got"),
    (("llm_config", "num_key_value_heads"), 3, "a divisor of 4 is needed"),
    (("llm_config", "architectures"), "Qwen2ForCausalLM", "a list of names is expected"),
    (("llm_config", "architectures"), ["MambaForCausalLM"], "'MambaForCausalLM' is not supported"),
    (("downsample_ratio",), 0, "downsample_ratio is 0, a number above 0 to 1"),
    (("ps_version",), "v3", "ps_version is 'v3', 'v1' or 'v2' is expected"),
    (("template",), 3, "template is 3, a text or null"),
    (("select_layer",), "-1", "select_layer is '-1'"),
    (("select_layer",), 99, "select_layer is 99, and the vision tower has 4 layers: a whole"),
    (("select_layer",), 5, "number from -4 to -1 is expected; set it as"),
    (("select_layer",), -6, "select_layer is -6, and the vision tower has 4 layers"),
    (("max_dynamic_patch",), 0, "max_dynamic_patch is 0"),
    (("min_dynamic_patch",), 13, "min_dynamic_patch is 13, and max_dynamic_patch is 6: a whole"),
    (("use_thumbnail",), "yes", "use_thumbnail is 'yes', true or false"),
]


@pytest.mark.parametrize(("place", "value", "says"), CHAT)
def test_a_wrong_value_is_named(place, value, says, tmp_path):
    folder = change(golden_folder("chat_qwen2", "v2.sel-1", tmp_path), place, value)
    with pytest.raises(ModelFolderError, match=says) as caught:
        chat_model.read_config(hub.open_folder(folder), IMAGE_TOKEN_ID)
    assert str(caught.value).startswith(f"{folder}/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("vision_feature_layer",), -99, "vision_feature_layer is -99, and the vision tower has 4"),
        (("internvl", "min_dynamic_patch"), 9, "internvl.min_dynamic_patch is 9, and max_dyna"),
        (("internvl",), {"min_dynamic_patch": 13}, "max_dynamic_patch is 12: a whole number from"),
    ],
)
def test_a_wrong_value_of_an_hf_folder(place, value, says, tmp_path):
    official = add_tokenizer(golden_folder("chat_qwen2", "v2.sel-1", tmp_path / "o"), "qwen2")
    folder = change(export.run(str(official), tmp_path / "hf", "hf"), place, value)
    with pytest.raises(ModelFolderError, match=says) as caught:
        chat_model.read_config(hub.open_folder(folder))
    assert str(caught.value).startswith(f"{folder}/config.json: ")


@pytest.mark.parametrize(("place", "block"), [("select_layer", 4), ("select_layer", -5)])
def test_every_output_of_the_tower_may_be_read(place, block, tmp_path):
    folder = change(golden_folder("chat_qwen2", "v2.sel-1", tmp_path), (place,), block)
    config = chat_model.read_config(hub.open_folder(folder), IMAGE_TOKEN_ID)
    assert config.vision_feature_layer == block


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("qllama_config", "hidden_size"), "64", "qllama_config.hidden_size is '64'"),
        (("qllama_config",), 3, "qllama_config is 3, an object is expected"),
        (("vision_config", "layer_norm_eps"), 0, "vision_config.layer_norm_eps is 0"),
        (("clip_embed_dim",), None, "clip_embed_dim is None"),
        (("force_image_size",), 10**6, "force_image_size is 1000000"),
    ],
)
def test_a_wrong_value_of_internvl_14b(place, value, says, tmp_path):
    folder = change(dual_folder(tmp_path), place, value)
    with pytest.raises(ModelFolderError, match=f"{folder}/config.json: {says}"):
        dual_files.read_config(hub.open_folder(folder))


def test_sections_that_are_null_are_not_there(tmp_path):
    folder = change(golden_folder("chat_qwen2", "v2.sel-1", tmp_path), ("text_config",), None)
    assert hub.open_folder(folder).layout == "official"
    with pytest.raises(ModelFolderError, match="neither an InternVL chat model"):
        _ = hub.open_folder(change(folder, ("llm_config",), None)).family


def test_weights_of_other_shapes_are_named(tmp_path):
    """Those that come apart, position tables that are no grid, and tables of another width."""
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    stored = load_file(folder / "model.safetensors")
    wqkv = next(name for name in stored if name.endswith("wqkv.weight"))
    table = "vision_model.embeddings.position_embedding"
    embeddings = "language_model.model.tok_embeddings.weight"
    for name, tensor, says in (
        (wqkv, torch.ones(7, 64), "does not fit the weight .*wqkv.weight"),
        (table, torch.ones(1, 30, 64), "position_embeddings is .*config.json asks for"),
        (table, torch.ones(37, 64), "position_embeddings is .*config.json asks for"),
        (embeddings, torch.ones(600, 32), "embed_tokens.weight is .*config.json asks for"),
    ):
        save_file(stored | {name: tensor}, folder / "model.safetensors")
        with pytest.raises(ModelFolderError, match=says) as caught:
            chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)
        assert str(folder) in str(caught.value)


QUANTIZED = {"quant_method": "awq", "bits": 4}


@pytest.mark.parametrize("layout", ["official", "hf"])
def test_a_quantization_config_that_is_left_over(layout, tmp_path):
    """The weights are plain: transformers would quantize them or ask for a package."""
    folder = model_folder(tmp_path / "official")
    if layout == "hf":
        export.run(str(folder), tmp_path / "hf", "hf")
        folder = tmp_path / "hf"
    change(folder, ("quantization_config",), QUANTIZED)
    says = r"config.json: quantization_config \(awq\) is left over.*remove this key"
    with pytest.raises(ModelFolderError, match=says):
        loading.load(folder, device="cpu")
    loading.load(change(folder, ("quantization_config",), None), device="cpu")


@pytest.mark.parametrize(
    "ends", [("qweight", "qzeros", "scales"), ("weight.absmax",), ("SCB",), ("weight_scale_inv",)]
)
def test_quantized_weights_are_named(ends, tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    change(folder, ("llm_config", "quantization_config"), QUANTIZED)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("q_proj.weight")).removesuffix("weight")
    save_file(stored | {name + end: torch.ones(2) for end in ends}, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"its weights are quantized \(awq\) .*q_proj"):
        chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integers_are_no_weights(dtype, tmp_path):
    """Of the same shape, as int8 weights whose scales and config were lost."""
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("q_proj.weight"))
    save_file(stored | {name: stored[name].to(dtype)}, folder / "model.safetensors")
    word = str(dtype).removeprefix("torch.")
    says = f"q_proj.weight is {word}, as quantized weights are"
    with pytest.raises(ModelFolderError, match=says):
        chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


def test_what_an_original_says_of_quantization_in_its_language_model_does_not_count(tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    change(folder, ("llm_config", "quantization_config"), QUANTIZED)
    chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


def folders(to):
    """Model folders of every form: layouts, families, shards, pickles, tokenizers."""
    made = {
        "qwen": model_folder(to / "qwen"),
        "intern": model_folder(to / "intern", name="internlm2"),
    }
    export.run(str(made["qwen"]), to / "hf", "hf")
    made["hf"] = to / "hf"
    made["dual"] = small_tokenizer(dual_folder(to / "dual"))
    made["phi"] = official_folder("Phi3ForCausalLM", to / "phi", template="phi3-chat")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizer_phi3" / file, to / "phi")
    for name, end in (("safetensors", "safetensors"), ("bin", "bin")):
        stem = "pytorch_model" if end == "bin" else "model"
        made[name] = to / name
        shutil.copytree(made["intern"], to / name)
        stored = load_file(to / name / "model.safetensors")
        (to / name / "model.safetensors").unlink()
        (to / name / "tokenizer.json").unlink()
        shards = {f"{stem}-0000{i + 1}-of-00002.{end}": sorted(stored)[i::2] for i in (0, 1)}
        for file, names in shards.items():
            write = torch.save if end == "bin" else save_file
            write({n: stored[n] for n in names}, to / name / file)
        weight_map = {n: file for file, names in shards.items() for n in names}
        index = to / name / f"{stem}.{end}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return made


def open_whole(folder):
    """All that loading reads and judges of a folder, short of filling a model."""
    source = hub.open_folder(folder)
    if source.family == "dual":
        load_tokenizer(folder)
        dual_files.fit_tensors(dual_files.read_config(source), source)
    else:
        chat_model.fit_tensors(loading.describe(folder).config, source)


def test_damaged_folders_are_read_or_named(tmp_path):
    """60 seeded mutations of any file of nine folders; the file and a remedy, on one line."""
    made = folders(tmp_path)
    remedies = "run|copy|download|take|set |use|save|pass|install|get|unpack|give|keep|remove"
    said = []
    for number in range(60):
        draw = random.Random(f"damaged folder {number}")
        name = draw.choice(sorted(made))
        file = draw.choice(sorted(f for f in made[name].iterdir() if f.suffix != ".jinja"))
        before = file.read_bytes()
        mutations.mutate_file(file, draw)
        try:
            open_whole(made[name])
        except UserError as error:
            said.append((number, file, str(error)))
        finally:
            file.write_bytes(before)
    for number, file, sentence in said:
        assert str(file.parent) in sentence, number
        assert "\n" not in sentence, number
        assert re.search(remedies, sentence), (number, sentence)
    assert len(said) > 25
