"""load(): what a user holds, from either layout, and answers like the original's chat."""

import json

import pytest
import torch
from chat_folders import IMAGE_TOKEN_ID, golden_folder, prompt_folder
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from internvl.data.templates import template
from internvl.errors import ConfigError, ModelFolderError
from internvl.inference import load as loading


def test_a_folder_becomes_a_chat(tmp_path):
    chat = loading.load(prompt_folder("internlm2.internlm2-chat", tmp_path / "model"), device="cpu")
    assert chat.model.config.image_token_id == 526
    assert next(chat.model.parameters()).dtype == torch.float32
    assert not chat.model.training
    assert chat.template == template("internlm2-chat")
    assert (chat.tiles.size, chat.tiles.max, chat.tiles.thumbnail) == (84, 6, True)
    assert chat.tokens_per_tile == 9
    assert chat.system_message is None


def test_a_system_message_of_the_checkpoint(tmp_path):
    folder = prompt_folder("internlm2.internlm2-chat", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for stored, wanted in (
        ("Be brief.", "Be brief."),
        (None, template("internlm2-chat").system_message),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"system_message": stored}))
        assert loading.load(folder, device="cpu").encoder.system_message == wanted


def test_a_model_of_one_tile(tmp_path):
    folder = prompt_folder("qwen2.Hermes-2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"dynamic_image_size": False}
    (folder / "config.json").write_text(json.dumps(config))
    tiles = loading.describe(folder).tiles
    assert (tiles.min, tiles.max, tiles.thumbnail) == (1, 1, False)


def test_without_tokenizer_the_model_still_loads(tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    chat = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32")
    assert chat.tokenizer is None
    with pytest.raises(ModelFolderError, match="no tokenizer files"):
        _ = chat.encoder


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), (torch.float16,) * 2])
def test_dtypes(dtype, kind, tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    chat = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype=dtype)
    assert {p.dtype for p in chat.model.parameters()} == {kind}


def test_an_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="'int3' is not one of float32, bfloat16"):
        loading.load(tmp_path, dtype="int3")


def test_a_language_models_tokenizer_is_refused(tmp_path):
    folder = prompt_folder("qwen2.Hermes-2", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<IMG_CONTEXT>", "<other>")
        (folder / name).write_text(text)
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(ModelFolderError, match="tokenizer has no <IMG_CONTEXT>"):
        loading.load(folder, device="cpu")


def test_a_template_that_is_not_known(tmp_path):
    folder = prompt_folder("qwen2.Hermes-2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"template": "vicuna"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="template 'vicuna' is not known here; known are"):
        loading.load(folder, device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_written_by_plain_transformers(tied, tmp_path):
    """No settings of ours in it: it is taken for one of the -hf releases."""
    config = loading.load(
        golden_folder("chat_qwen2", "v2.sel-1", tmp_path / "golden"),
        image_token_id=IMAGE_TOKEN_ID,
        device="cpu",
    ).model.config
    del config.internvl
    config.tie_word_embeddings = tied
    plain = InternVLForConditionalGeneration(config).eval()
    plain.save_pretrained(tmp_path / "plain")
    chat = loading.load(tmp_path / "plain", device="cpu")
    assert (chat.template.name, chat.tiles.max) == ("internvl2_5", 12)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(chat.model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_folder_written_by_our_models_own_save_pretrained(tmp_path):
    model = loading.load(
        golden_folder("chat_qwen2", "v2.sel-1", tmp_path / "golden"),
        image_token_id=IMAGE_TOKEN_ID,
        device="cpu",
    ).model
    model.save_pretrained(tmp_path / "saved")
    again = loading.load(tmp_path / "saved", device="cpu").model
    plain = InternVLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for other in (again, plain):
        assert all(
            torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
        )


def test_an_official_file_without_an_output_matrix_is_incomplete(tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match="1 missing weights .language_model.lm_head.weight"):
        loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu")


def test_devices_that_are_not_there():
    assert loading.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="'gpu' is none that torch knows; write cuda, cuda:1"):
        loading.resolve_device("gpu")
    with pytest.raises(ConfigError, match="cuda:99: this machine has"):
        loading.resolve_device("cuda:99")
    for device in ("mps", "xpu", "meta"):
        with pytest.raises(ConfigError, match=f"device {device}: torch cannot compute there"):
            loading.resolve_device(device)


def test_the_folder_of_a_job_that_has_not_begun(tmp_path):
    (tmp_path / "launch.sbatch").write_text("#!/bin/sh\n")
    with pytest.raises(ModelFolderError, match="its Slurm job has trained nothing yet; `squeue"):
        loading.load(tmp_path, device="cpu")
