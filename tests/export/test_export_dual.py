"""InternVL-14B written as the original stores it, bit for bit, and what no format can hold."""

import json

import pytest
import torch
from dual_folders import dual_folder, dual_golden, dual_lora_folder, pth_file
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil

from internvl import export
from internvl.data.pairs import center_square
from internvl.errors import ExportError
from internvl.inference import load as loading
from internvl.models import weights as model_weights
from internvl.models.adapters import lora
from internvl.models.vision import normalize_tiles

GOLDEN = dual_golden()


def stored(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def features(folder):
    dual = loading.load(folder, device="cpu", dtype="float32")
    return dual.encode_images(GOLDEN["input.pixel_values"], "g")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("shard", [10**9, 300_000])
def test_official_files_bit_for_bit(loaded, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(model_weights, "SHARD_BYTES", shard)
    folder = dual_folder(tmp_path / "start")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    given = folder
    if loaded:
        (folder / "tokenizer_config.json").rename(tmp_path / "kept")
        given = loading.load(folder, device="cpu", dtype="float32")
        (tmp_path / "kept").rename(folder / "tokenizer_config.json")
    to = export.run(given, tmp_path / "out", "official")
    wanted, found = stored(folder), stored(to)
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert (len(list(to.glob("*.safetensors"))) > 1) == (shard < 10**6)
    config = json.loads((to / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("internvl", "float32")
    assert config["tie_word_embeddings"] is False
    assert config["cross_attention_frequency"] == 2
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert (to / name).read_bytes() == (folder / name).read_bytes()
    processor = CLIPImageProcessorPil.from_pretrained(to)
    image = Image.fromarray(torch.randint(0, 256, (90, 130, 3), dtype=torch.uint8).numpy())
    pixels = processor(image, return_tensors="pt").pixel_values
    cropped = normalize_tiles(center_square(image, 84)[None], torch.float32)
    torch.testing.assert_close(pixels, cropped, atol=1e-5, rtol=0)


def test_an_export_loads_and_computes_the_same(tmp_path):
    folder = dual_folder(tmp_path / "start", force_image_size=112)
    to = export.run(folder, tmp_path / "out", "official")
    again = export.run(to, tmp_path / "again", "official")
    before, after = stored(to), stored(again)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    pixels = torch.randn(2, 3, 112, 112)
    first, second = (loading.load(f, device="cpu", dtype="float32") for f in (folder, to))
    assert torch.equal(first.encode_images(pixels, "g"), second.encode_images(pixels, "g"))


def test_adapters_are_merged(tmp_path):
    folder, merged = dual_lora_folder(tmp_path / "lora")
    to = export.run(folder, tmp_path / "out", "official")
    found = stored(to)
    assert sorted(found) == sorted(merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    config = json.loads((to / "config.json").read_text())
    assert (config["use_backbone_lora"], config["use_qllama_lora"]) == (0, 0)
    assert export.has_adapters(folder)
    assert not export.has_adapters(to)


def test_adapters_of_ours_train_save_and_merge(tmp_path):
    """The same functions as the chat family's, on the same names."""
    from internvl.config import LoraConfig

    base = dual_folder(tmp_path / "base")
    dual = loading.load(base, device="cpu", dtype="float32")
    lora.select_trainable(dual.model, ())
    lora.attach(dual.model, LoraConfig(rank=2, on=("vision_tower", "language_model")))
    adapted = [name for name, p in dual.model.named_parameters() if p.requires_grad]
    assert adapted
    assert not any(".cross_attn." in name for name in adapted)
    torch.manual_seed(1)
    for name, parameter in dual.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wanted = dual.encode_images(GOLDEN["input.pixel_values"], "g")
    lora.save_adapter(dual.model, tmp_path / "adapter", base)
    torch.testing.assert_close(features(tmp_path / "adapter"), wanted)
    to = export.run(tmp_path / "adapter", tmp_path / "merged", "official")
    torch.testing.assert_close(features(to), wanted, atol=1e-5, rtol=1e-5)
    assert float((features(base) - wanted).abs().max()) > 1e-3


def test_bfloat16(tmp_path):
    folder = dual_folder(tmp_path / "start")
    to = export.run(folder, tmp_path / "out", "official", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in stored(to).values()} == {torch.bfloat16}
    assert json.loads((to / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = export.run(to, tmp_path / "again", "official")
    before, after = stored(to), stored(again)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_format_that_cannot_hold_it(tmp_path):
    with pytest.raises(ExportError, match="no class of transformers; .*--format official"):
        export.run(dual_folder(tmp_path / "dual"), tmp_path / "out", "hf")
    with pytest.raises(ExportError, match="InternVL-C alone"):
        export.run(pth_file(tmp_path / "pth"), tmp_path / "out", "official")
    assert not (tmp_path / "out").exists()


def test_an_export_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    folder = dual_folder(tmp_path / "start")
    dual = loading.load(folder, device="cpu", dtype="float32")
    answer, calls = export.probe, []

    def drifting(model):
        calls.append(model)
        return answer(model) * (1 + len(calls))

    monkeypatch.setattr(export, "probe", drifting)
    with pytest.raises(ExportError, match="nothing was kept"):
        export.run(dual, tmp_path / "out", "official")
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_names_and_settings(tmp_path):
    """Official names of InternVL-14B, whose q, k and v of the tower are one layer, and patterns."""
    from internvl.config import LoraConfig

    base = dual_folder(tmp_path / "base")
    dual = loading.load(base, device="cpu", dtype="float32")
    lora.select_trainable(dual.model, ())
    lora.attach(dual.model, LoraConfig(rank=2, on=("vision_tower",)))
    for name, parameter in dual.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lora.save_adapter(dual.model, tmp_path / "ours", base)
    expected = export.probe(dual.model)
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    stem = "base_model.model.model.vision_tower.encoder.layer."
    state = {}
    for name, tensor in stored.items():
        theirs = name.replace(stem, "base_model.model.vision_model.encoder.layers.")
        theirs = theirs.replace("attention.projection_layer", "attn.proj")
        if ".q_proj." in theirs:
            parts = [stored[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            whole = parts[0] if "lora_A" in name else torch.cat(parts)
            state[theirs.replace("attention.q_proj", "attn.qkv")] = whole
        elif "k_proj" not in name and "v_proj" not in name:
            state[theirs] = tensor
    save_file(state, tmp_path / "ours" / "adapter_model.safetensors")
    file = tmp_path / "ours" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"target_modules": ["qkv", "proj", "fc1", "fc2"]}
    file.write_text(json.dumps(config))
    again = loading.load(tmp_path / "ours", device="cpu", dtype="float32")
    torch.testing.assert_close(export.probe(again.model), expected, atol=1e-5, rtol=0)
    config["alpha_pattern"] = {"fc1": 40}
    file.write_text(json.dumps(config))
    other = loading.load(tmp_path / "ours", device="cpu", dtype="float32").model
    block = other.model.vision_tower.encoder.layer[0].mlp
    assert (block.fc1.scaling["default"], block.fc2.scaling["default"]) == (20, 2)
