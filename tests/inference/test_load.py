"""load(): what a user holds, from either layout, and answers like the original's chat."""

import json

import pytest
import torch
from chat_folders import IMAGE_TOKEN_ID, golden_folder, prompt_folder
from dual_folders import dual_folder
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from internvl.config import TilesConfig, recipes
from internvl.data.templates import template
from internvl.errors import ModelFolderError, UserError
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


def _recipe(folder, *overrides, **data):
    sources = [{"name": "a", "annotations": "a.jsonl"}]
    tree = {
        "model": {"id": str(folder)},
        "data": {"sources": sources, **data},
        "run": str(folder.parent / "run"),
        "global_batch": 1,
        "steps": 1,
    }
    return recipes.resolve(tree, overrides)


def _one_tile(folder, **changes):
    """The folder's config.json with these values; size 84, 1 to 6 tiles, thumbnail otherwise."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_a_recipe_leaves_open_is_the_checkpoints_key_by_key(tmp_path):
    folder = prompt_folder("internlm2.internlm2-chat", tmp_path / "model")
    _one_tile(folder, normalize="siglip", system_message="Be brief.", max_dynamic_patch=5)
    for data, size, most, thumbnail in (
        ({}, 84, 5, True),
        ({"tiles": {"max": 2}}, 84, 2, True),
        ({"tiles": {"size": 56, "thumbnail": False}}, 56, 5, False),
    ):
        completed = loading.complete(_recipe(folder, **data))
        found = completed.recipe.data
        assert found.tiles == TilesConfig(size=size, min=1, max=most, thumbnail=thumbnail)
        assert (found.normalize, found.template) == ("siglip", "internlm2-chat")
        assert found.system_message == "Be brief."
        sources = {setting.key: setting.source for setting in completed.settings}
        for key in ("size", "min", "max", "thumbnail", "pad_square"):
            stated = key in data.get("tiles", {})
            wanted = "recipe" if stated else str(folder / "config.json")
            assert sources[f"data.tiles.{key}"].startswith(wanted), key
        assert ("resized from 84 to 56 px" in completed.render()) is (size == 56)


def test_a_system_message_of_the_template_that_holds(tmp_path):
    folder = prompt_folder("internlm2.internlm2-chat", tmp_path / "model")
    for chosen in ("internlm2-chat", "internvl2_5"):
        data = loading.complete(_recipe(folder, template=chosen)).recipe.data
        assert (data.template, data.system_message) == (chosen, template(chosen).system_message)


def test_all_that_does_not_fit_a_checkpoint_in_one_sentence(tmp_path):
    folder = prompt_folder("qwen2.Hermes-2", tmp_path / "model")
    _one_tile(folder, dynamic_image_size=False, pad2square=True)
    with pytest.raises(UserError) as caught:
        loading.complete(_recipe(folder, tiles={"size": 60, "max": 4}))
    for part in (
        "data.tiles.size = 60 does not fit this model",
        "a multiple of 28 pixels",
        "data.tiles.pad_square = true of the checkpoint goes only with data.tiles.max: 1",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="tiles.min = 3 is larger than data.tiles.max = 1 of the"):
        loading.complete(_recipe(folder, tiles={"min": 3}))


def test_internvl_14b_takes_one_tile_of_its_own_size(tmp_path):
    folder = dual_folder(tmp_path / "model")
    objective = "objective.name=retrieval"
    completed = loading.complete(_recipe(folder, objective))
    wanted = TilesConfig(size=84, min=1, max=1, thumbnail=False)
    assert completed.recipe.data.tiles == wanted
    assert [setting.key for setting in completed.settings] == ["data.tiles.size"]
    data = {"tiles": {"max": 12}, "normalize": "clip", "template": "internvl2_5"}
    with pytest.raises(UserError) as caught:
        loading.complete(_recipe(folder, objective, **data))
    for key in ("data.tiles.max = 12", "data.normalize = clip", "data.template = internvl2_5"):
        assert f"{key} is not for InternVL-14B: leave it out" in str(caught.value)
