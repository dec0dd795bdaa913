"""InternVL-14B's files: names, positions, adapters, InternVL-C's own file, and what is missing."""

import json
import logging
import pickle

import pytest
import torch
from chat_folders import golden_folder
from dual_folders import dual_folder, dual_golden, dual_lora_folder, pth_file
from safetensors.torch import load_file, save_file

from internvl.errors import ModelFolderError, UserError
from internvl.inference import load as loading
from internvl.models import hub, keys
from internvl.models import weights as model_weights
from internvl.models.dual import configs as dual_configs
from internvl.models.dual import files as dual_files


def load(folder, **arguments):
    return loading.load(folder, device="cpu", dtype="float32", **arguments)


def official(model):
    return dict(keys.ours_to_official(model.config, model.state_dict()))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_names_there_and_back_bit_for_bit(tmp_path):
    folder = dual_folder(tmp_path)
    stored, found = load_file(folder / "model.safetensors"), official(load(folder).model)
    assert sorted(found) == sorted(stored)
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor), name


def test_the_output_matrix_is_not_tied(tmp_path):
    """Also where config.json does not say so: the original's own default would tie them."""
    folder = dual_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert "tie_word_embeddings" not in config
    model = load(folder).model
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(
        model.get_input_embeddings().weight, stored["qllama.model.embed_tokens.weight"]
    )
    assert torch.equal(model.lm_head.weight, stored["qllama.lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_bfloat16_files_are_kept(tmp_path):
    folder = dual_folder(tmp_path)
    rewrite(folder, lambda t: t.update({name: x.bfloat16() for name, x in t.items()}))
    model = loading.load(folder, device="cpu", dtype="bfloat16").model
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in official(model).items())


@pytest.mark.parametrize(
    "name",
    ["query_tokens", "qllama.lm_head.weight", "vision_model.encoder.layers.1.attn.qkv.weight"],
)
def test_a_missing_weight_is_an_error(name, tmp_path):
    folder = rewrite(dual_folder(tmp_path), lambda tensors: tensors.pop(name))
    with pytest.raises(ModelFolderError, match=f"1 missing weights .{name}"):
        load(folder)


def test_an_unexpected_weight_is_named_in_the_log(tmp_path, caplog):
    extra = {"logit_scale_2": torch.zeros(1), "visual.extra.weight": torch.zeros(2, 2)}
    folder = rewrite(dual_folder(tmp_path), lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "2 weights are not read: logit_scale_2, visual.extra.weight" in caplog.text


def test_a_weight_of_another_shape_is_an_error(tmp_path):
    folder = dual_folder(tmp_path, clip_embed_dim=24)
    with pytest.raises(ModelFolderError, match=r"o_proj.\w+ is .*config.json asks for"):
        load(folder)


@pytest.mark.parametrize("stored_side", [84, 112])
def test_another_size_of_pictures(stored_side, tmp_path):
    """From the original's force_image_size, whose file may hold either table, or when loading."""
    folder = dual_folder(tmp_path, force_image_size=112)
    table = load_file(folder / "model.safetensors")["vision_model.embeddings.position_embedding"]
    wide = model_weights.resize_positions(table, 64)
    if stored_side == 112:
        rewrite(
            folder, lambda t: t.update({"vision_model.embeddings.position_embedding": wide.clone()})
        )
    dual = load(folder)
    assert dual.image_size == 112
    assert torch.equal(dual.model.model.vision_tower.embeddings.position_embeddings, wide)
    assert dual.encode_images(torch.randn(2, 3, 112, 112), "g").shape == (2, 48)
    again = load(dual_folder(tmp_path / "again"), image_size=112)
    assert torch.equal(again.model.model.vision_tower.embeddings.position_embeddings, wide)
    assert dual_configs.to_official(again.model.config)["force_image_size"] == 112


@pytest.mark.parametrize("base_layer", [True, False])
def test_adapters_of_an_official_run_are_merged(base_layer, tmp_path):
    folder, merged = dual_lora_folder(tmp_path / "lora", base_layer=base_layer)
    plain = dual_folder(tmp_path / "merged")
    save_file(merged, plain / "model.safetensors")
    adapted, wanted, base = (load(f) for f in (folder, plain, dual_folder(tmp_path / "base")))
    assert sorted(official(adapted.model)) == sorted(merged)
    for name, tensor in official(adapted.model).items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-5)
    golden = dual_golden()
    for mode in "cg":
        given = golden["input.pixel_values"], mode
        found = adapted.encode_images(*given)
        torch.testing.assert_close(found, wanted.encode_images(*given), atol=1e-5, rtol=1e-5)
        assert float((found - base.encode_images(*given)).abs().max()) > 1e-3


def test_internvl_c_alone(tmp_path):
    file = pth_file(tmp_path / "pth")
    dual, whole = load(file), load(dual_folder(tmp_path / "whole"))
    golden = dual_golden()
    pixels, ids = golden["input.pixel_values"], golden["input.input_ids"]
    assert torch.equal(dual.encode_images(pixels), whole.encode_images(pixels))
    found, wanted = (d.encode_texts(input_ids=ids) for d in (dual, whole))
    assert torch.equal(found, wanted)
    assert torch.equal(dual.similarity(pixels, ids), whole.similarity(pixels, ids))
    for refused in (
        lambda: dual.encode_images(pixels, "g"),
        lambda: dual.caption(pixels),
        lambda: dual.match(pixels, ids[:4]),
    ):
        with pytest.raises(UserError, match="holds InternVL-C alone; load OpenGVLab/InternVL-14B"):
            refused()


def test_internvl_c_by_default_has_the_sizes_of_the_release(tmp_path):
    file = pth_file(tmp_path)
    (file.parent / "config.json").unlink()
    with pytest.raises(ModelFolderError, match="missing weights"):
        load(file)
    with pytest.raises(ModelFolderError, match="no such file"):
        load(tmp_path / "other.pth")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def test_a_pth_with_code_is_refused(tmp_path):
    file = pth_file(tmp_path)
    with file.open("wb") as opened:
        pickle.dump({"pos_embed": Evil()}, opened)
    with pytest.raises(ModelFolderError, match="not a plain file of tensors"):
        load(file)


def test_the_families_are_told_apart(tmp_path):
    chat = golden_folder("chat_qwen2", "v2.sel-1", tmp_path / "chat")
    with pytest.raises(ModelFolderError, match="a chat model, not InternVL-14B"):
        dual_files.read_config(hub.open_folder(chat))
    with pytest.raises(ModelFolderError, match="InternVL-14B, not a chat model"):
        loading.describe(dual_folder(tmp_path / "dual"), image_token_id=5)
    with pytest.raises(UserError, match="quantize='8bit'"):
        load(tmp_path / "dual", quantize="8bit")


def test_without_a_tokenizer_ids_are_embedded_and_strings_are_not(tmp_path):
    dual = load(dual_folder(tmp_path))
    assert dual.tokenizer is None
    assert dual.encode_texts(input_ids=dual_golden()["input.input_ids"]).shape == (5, 48)
    with pytest.raises(ModelFolderError, match="no tokenizer files"):
        dual.encode_texts(["a dog"])


@pytest.mark.gpu
def test_spread_over_all_gpus(tmp_path):
    folder, golden = dual_folder(tmp_path), dual_golden()
    dual = loading.load(folder, device_map="auto", dtype="float32")
    found = dual.encode_images(golden["input.pixel_values"], "g", normalize=False)
    wanted = golden["output.encode_image.InternVL-G"]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
