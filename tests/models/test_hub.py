"""Folders and ids: what is found, what is missing, and what never runs."""

import itertools
import json
import pickle
import shutil

import pytest
import torch
from chat_folders import IMAGE_TOKEN_ID, golden_folder
from data_files import model_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from internvl import export
from internvl.errors import ModelFolderError
from internvl.models import hub
from internvl.models.chat import model as chat_model


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
    with pytest.raises(ModelFolderError, match="model type None .*; copy the config.json of the"):
        _ = folder({}).family


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
        chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


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
    chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


def test_bin_files_hold_tensors_only(tmp_path):
    folder = golden(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)
    assert torch.equal(model.lm_head.weight, tensors["language_model.output.weight"])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def test_a_bin_file_with_code_is_refused(tmp_path):
    folder = golden(tmp_path)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Evil()}, file)
    with pytest.raises(
        ModelFolderError, match="not a plain file of tensors .it is damaged, or holds"
    ):
        chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


def test_python_files_of_a_checkpoint_never_run(tmp_path):
    folder = golden(tmp_path)
    for name in ("modeling_internvl_chat.py", "configuration_internvl_chat.py", "__init__.py"):
        (folder / name).write_text("raise SystemExit('code from a checkpoint ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


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
    # Fetched where the guides say, and asked for by the name that recipes have.
    monkeypatch.chdir(tmp_path)
    golden(tmp_path / "pretrained").rename(tmp_path / "pretrained/InternVL2-2B")
    with pytest.raises(ModelFolderError, match=r"is here: .*model\.id=pretrained/InternVL2-2B"):
        hub.find_folder("OpenGVLab/InternVL2-2B", cache=tmp_path)


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


def stored_as(tensors, folder, form):
    """Write weights in one of the forms that folders have them in."""
    names = sorted(tensors)
    if form == "model.safetensors":
        save_file(tensors, folder / form)
    elif form == "pytorch_model.bin":
        torch.save(tensors, folder / form)
    else:
        end = "bin" if "bin" in form else "safetensors"
        stem = form.removesuffix(f".{end}.index.json")
        shards = {f"{stem}-0000{i + 1}-of-00002.{end}": names[i::2] for i in (0, 1)}
        for file, part in shards.items():
            write = torch.save if end == "bin" else save_file
            write({name: tensors[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FORMS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
NORM = "language_model.norm.weight"


def marked(tensors, value):
    """The weights, with one tensor by which they are told."""
    name = next(
        name for name in tensors if name.endswith((NORM, "language_model.model.norm.weight"))
    )
    return tensors | {name: torch.full_like(tensors[name], value)}


@pytest.mark.parametrize(
    "forms", [pair for pair in itertools.permutations(FORMS, 2) if pair[0] != FORMS[0]] + [FORMS]
)
@pytest.mark.slow
def test_of_several_forms_the_one_that_transformers_takes(forms, tmp_path):
    """In both layouts: the value of a weight tells which file was read."""
    export.run(str(model_folder(tmp_path / "official")), tmp_path / "hf", "hf")
    values = {}
    for layout in ("official", "hf"):
        folder = tmp_path / layout
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        for value, form in enumerate(forms, start=2):
            stored_as(marked(tensors, value), folder, form)
        model = chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)
        values[layout] = model.model.language_model.norm.weight[0].item()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    taken = plain.model.language_model.norm.weight[0].item()
    assert values == {"official": taken, "hf": taken}
    assert taken == 2 + min(range(len(forms)), key=lambda i: FORMS.index(forms[i]))


def test_the_file_that_config_json_names(tmp_path):
    folder = golden(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(marked(tensors, 7), folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())

    def load(named):
        text = json.dumps(config | {"transformers_weights": named})
        (folder / "config.json").write_text(text)
        return chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)

    assert load("other.safetensors").model.language_model.norm.weight[0] == 7
    for named in ("../other.safetensors", "model.bin", 3, "none.safetensors"):
        with pytest.raises(ModelFolderError, match="transformers_weights"):
            load(named)


def test_a_lone_file_and_a_whole_set_without_an_index_are_read(tmp_path):
    folder = golden(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert set(hub.open_folder(folder).tensors) == set(tensors)
    (folder / "model.fp16.safetensors").unlink()
    stored_as(tensors, folder, "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").unlink()
    assert set(hub.open_folder(folder).tensors) == set(tensors)


@pytest.mark.parametrize(
    "names",
    [
        ("model.fp16.safetensors", "model.fp32.safetensors"),
        ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"),
        ("a-00001-of-00002.safetensors", "b-00002-of-00002.safetensors"),
    ],
)
def test_files_of_which_nothing_says_which_to_take(names, tmp_path):
    folder = golden(tmp_path)
    for name in names:
        shutil.copy(folder / "model.safetensors", folder / name)
    (folder / "model.safetensors").unlink()
    says = f"{names[0]} and {names[1]} lie side by side.*keep one.*or copy"
    with pytest.raises(ModelFolderError, match=says):
        _ = hub.open_folder(folder).tensors


def test_shards_of_two_models_are_told_by_what_both_hold(tmp_path):
    folder = golden(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stored_as(tensors, folder, "model.safetensors.index.json")
    second = folder / "model-00002-of-00002.safetensors"
    name = sorted(tensors)[0]
    save_file(load_file(second) | {name: tensors[name]}, second)
    assert torch.equal(hub.open_folder(folder).tensors[name].read(), tensors[name])
    save_file(load_file(second) | {name: tensors[name] + 1}, second)
    says = f"{second.name}: holds another {name} than model-00001-of-00002.safetensors"
    with pytest.raises(ModelFolderError, match=says):
        _ = hub.open_folder(folder).tensors


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "weight_map must say .*found NoneType"),
        ({"weight_map": {}}, "found nothing in it"),
        ({"weight_map": ["a"]}, "found list"),
        ({"weight_map": {"a": 3}}, "weight_map names 3 for a"),
        ({"weight_map": {"a": ""}}, "weight_map names '' for a"),
        ({"weight_map": {"a": "../x.safetensors"}}, "which is no file of this folder"),
    ],
)
def test_an_index_that_is_none(index, says, tmp_path):
    folder = golden(tmp_path)
    (folder / "model.safetensors").unlink()
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=f"{file}: .*{says}.*copy it again"):
        hub.weight_files(folder)


@pytest.mark.parametrize("number", [None, "x", -1, 1.5, [7]])
def test_an_id_that_is_no_number(number, tmp_path):
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": number}))
    if number is None:
        assert hub.special_token_id(tmp_path, "<IMG_CONTEXT>") is None
        return
    with pytest.raises(ModelFolderError, match="added_tokens.json: the id of <IMG_CONTEXT> is"):
        hub.special_token_id(tmp_path, "<IMG_CONTEXT>")
