"""load(): what a user holds, from either layout, and answers like the original's chat."""

import json

import pytest
import torch
from chat_folders import GOLDEN, IMAGE_TOKEN_ID, add_tokenizer, golden_folder, golden_tensors
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from internvl import generate, handles
from internvl.data.records import Message
from internvl.data.templates import template
from internvl.models.hub import ModelFolderError

RUNS = json.loads((GOLDEN / "chat_prompts" / "runs.json").read_text())


def folder_of(key, tmp_path):
    """A golden chat_prompts case: model, tokenizer and template; unused output rows are zero."""
    name, _, template_name = key.partition(".")
    folder = golden_folder(f"chat_{name}", "v2.sel-1", tmp_path / "model")
    add_tokenizer(folder, name)
    config = json.loads((folder / "config.json").read_text()) | {"template": template_name}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    head = next(n for n in tensors if n.endswith(("output.weight", "lm_head.weight")))
    tensors[head][RUNS[key]["lm_head_rows_zeroed_from"] :] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_folder_becomes_a_chat(tmp_path):
    chat = handles.load(folder_of("internlm2.internlm2-chat", tmp_path), device="cpu")
    assert chat.model.config.image_token_id == 526
    assert next(chat.model.parameters()).dtype == torch.float32
    assert not chat.model.training
    assert chat.template == template("internlm2-chat")
    assert (chat.tiles.size, chat.tiles.max, chat.tiles.thumbnail) == (84, 6, True)
    assert chat.tokens_per_tile == 9
    assert chat.system_message is None


def test_a_system_message_of_the_checkpoint(tmp_path):
    folder = folder_of("internlm2.internlm2-chat", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for stored, wanted in (
        ("Be brief.", "Be brief."),
        (None, template("internlm2-chat").system_message),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"system_message": stored}))
        assert handles.load(folder, device="cpu").encoder.system_message == wanted


def test_a_model_of_one_tile(tmp_path):
    folder = folder_of("qwen2.Hermes-2", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"dynamic_image_size": False}
    (folder / "config.json").write_text(json.dumps(config))
    tiles = handles.describe(folder).tiles
    assert (tiles.min, tiles.max, tiles.thumbnail) == (1, 1, False)


def test_without_tokenizer_the_model_still_loads(tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    chat = handles.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32")
    assert chat.tokenizer is None
    with pytest.raises(ModelFolderError, match="no tokenizer files"):
        _ = chat.encoder


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), (torch.float16,) * 2])
def test_dtypes(dtype, kind, tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    chat = handles.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype=dtype)
    assert {p.dtype for p in chat.model.parameters()} == {kind}


def test_an_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="'int3' is not one of float32, bfloat16"):
        handles.load(tmp_path, dtype="int3")


def test_a_language_models_tokenizer_is_refused(tmp_path):
    folder = folder_of("qwen2.Hermes-2", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<IMG_CONTEXT>", "<other>")
        (folder / name).write_text(text)
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(ModelFolderError, match="tokenizer has no <IMG_CONTEXT>"):
        handles.load(folder, device="cpu")


def test_a_template_that_is_not_known(tmp_path):
    folder = folder_of("qwen2.Hermes-2", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"template": "vicuna"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="template 'vicuna' is not known here; known are"):
        handles.load(folder, device="cpu")


QUESTIONS = {
    "single_image_2tiles_no_placeholder": (["<image>\nWhat is it?"], [2]),
    "single_image_placeholder_in_question": (["Look: <image>\nDescribe."], [1]),
    "two_images_num_patches_list": (["Image-1: <image>\nImage-2: <image>\nCompare."], [2, 1]),
    "text_only": (["Hello"], []),
    "system_message_override": (["<image>\nHi"], [1]),
    "return_history": (["<image>\nWhat is it?"], [1]),
    "second_turn_history": (["<image>\nWhat is it?", "A dog.", "And then?"], [1]),
}


@pytest.mark.parametrize("key", RUNS)
@pytest.mark.parametrize("name", QUESTIONS)
def test_golden_prompts_and_answers(key, name, tmp_path):
    """The prompt's ids and the generated ids of the original's chat()."""
    chat = handles.load(folder_of(key, tmp_path), device="cpu")
    run = RUNS[key]["runs"][name]
    texts, tiles = QUESTIONS[name]
    roles = ["user", "assistant"] * 2
    messages = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
    if name == "system_message_override":
        messages.insert(0, Message("system", "You are tiny."))
    ids = chat.encoder.prompt(messages, tiles)
    assert ids.tolist() == run["input_ids"][0]
    golden = golden_tensors(f"chat_{key.partition('.')[0]}")
    rows = run["pixel_value_rows"]
    pixels = None if rows is None else golden["input.pixel_values"][rows]
    found = chat.model.generate(
        input_ids=torch.from_numpy(ids)[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=pixels,
        generation_config=generate.Settings(max_new_tokens=8).config(
            run["generate_kwargs"]["eos_token_id"], 0
        ),
    )
    wanted = run["generated_ids"][0][1:]  # without the BOS the original's library puts first
    assert found[0, len(ids) :].tolist() == wanted


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_written_by_plain_transformers(tied, tmp_path):
    """No settings of ours in it: it is taken for one of the -hf releases."""
    config = handles.load(
        golden_folder("chat_qwen2", "v2.sel-1", tmp_path / "golden"),
        image_token_id=IMAGE_TOKEN_ID,
        device="cpu",
    ).model.config
    del config.internvl
    config.tie_word_embeddings = tied
    plain = InternVLForConditionalGeneration(config).eval()
    plain.save_pretrained(tmp_path / "plain")
    chat = handles.load(tmp_path / "plain", device="cpu")
    assert (chat.template.name, chat.tiles.max) == ("internvl2_5", 12)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(chat.model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_an_official_file_without_an_output_matrix_is_incomplete(tmp_path):
    folder = golden_folder("chat_qwen2", "v2.sel-1", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match="1 missing weights .language_model.lm_head.weight"):
        handles.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu")
