"""Folders and ids: what is found, what is missing, and what never runs."""

import json
import pickle

import pytest
import torch
from chat_folders import IMAGE_TOKEN_ID, golden_folder
from safetensors.torch import load_file, save_file

from internvl.models import hub, vlm
from internvl.models.hub import ModelFolderError


def golden(tmp_path):
    return golden_folder("chat_internlm2", "v2.sel-1", tmp_path / "model")


def test_family_and_layout(tmp_path):
    def folder(config):
        return hub.ModelFolder(tmp_path, config)

    assert (folder({"llm_config": {}}).family, folder({"llm_config": {}}).layout) == (
        "chat",
        "official",
    )
    assert folder({"text_config": {}}).layout == "hf"
    assert folder({"qllama_config": {}}).family == "dual"
    with pytest.raises(ModelFolderError, match="model type 'bert' is neither"):
        _ = folder({"model_type": "bert"}).family


def test_tensors_are_read_when_used(tmp_path):
    folder = golden(tmp_path)
    tensors = hub.open_folder(folder).tensors
    name = "mlp1.1.weight"
    assert tensors[name].shape == (64, 256)
    assert tensors[name].dtype == torch.float32
    assert torch.equal(tensors[name].read(), load_file(folder / "model.safetensors")[name])
    assert torch.equal(tensors[name][3:5], tensors[name].read()[3:5])


def test_a_truncated_file_is_named(tmp_path):
    folder = golden(tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelFolderError, match="model.safetensors: cannot be read .*truncated"):
        vlm.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


def test_a_missing_shard_is_named(tmp_path):
    folder = golden(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=r"not there \(model-00002-of-00002.safetensors\)"):
        hub.weight_files(folder)


def test_several_shards_are_one_model(tmp_path):
    folder = golden(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[:40], "model-2.safetensors": names[40:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(hub.open_folder(folder).tensors) == set(names)
    vlm.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


def test_bin_files_hold_tensors_only(tmp_path):
    folder = golden(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = vlm.load_model(folder, image_token_id=IMAGE_TOKEN_ID)
    assert torch.equal(model.lm_head.weight, tensors["language_model.output.weight"])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def test_a_bin_file_with_code_is_refused(tmp_path):
    folder = golden(tmp_path)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Evil()}, file)
    with pytest.raises(ModelFolderError, match="not a plain file of tensors"):
        vlm.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


def test_python_files_of_a_checkpoint_never_run(tmp_path):
    folder = golden(tmp_path)
    for name in ("modeling_internvl_chat.py", "configuration_internvl_chat.py", "__init__.py"):
        (folder / name).write_text("raise SystemExit('code from a checkpoint ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    vlm.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "config.json: missing"), ("{", "not JSON"), ("[]", "an object")]
)
def test_a_config_that_is_none(content, says, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelFolderError, match=says):
        hub.open_folder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match="no model.safetensors, no pytorch_model.bin"):
        _ = hub.open_folder(tmp_path).tensors


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "just-a-name", "a/b/c"])
def test_neither_folder_nor_id(name):
    with pytest.raises(ModelFolderError, match="no such folder, and not a hub id"):
        hub.find_folder(name)


def test_a_local_folder_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda *_, **__: pytest.fail("asked the hub"))
    assert hub.find_folder(golden(tmp_path)) == tmp_path / "model"


def test_an_id_offline_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelFolderError, match="pretrained/InternVL2-2B") as caught:
        hub.find_folder("OpenGVLab/InternVL2-2B", cache=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelFolderError, match="HF_HUB_OFFLINE is set"):
        hub.download("OpenGVLab/InternVL2-2B", to=tmp_path / "here")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<IMG_CONTEXT>": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<IMG_CONTEXT>"}}}),
        ("tokenizer.json", {"added_tokens": [{"content": "<IMG_CONTEXT>", "id": 7}]}),
    ],
)
def test_the_id_of_a_special_token(file, content, tmp_path):
    assert hub.special_token_id(tmp_path, "<IMG_CONTEXT>") is None
    (tmp_path / file).write_text(json.dumps(content))
    assert hub.special_token_id(tmp_path, "<IMG_CONTEXT>") == 7
    assert hub.special_token_id(tmp_path, "<img>") is None
