"""A chat model from parts: names, vocabulary, projector, and that it computes what they do."""

import json
import shutil

import pytest
import torch
from part_folders import split
from safetensors.torch import load_file, save_file

from internvl import export
from internvl.config import TilesConfig
from internvl.errors import ModelFolderError
from internvl.inference import load as loading


def test_parts_keep_their_weights(tmp_path):
    vision, language, projector, tensors = split(tmp_path)
    chat = loading.build(vision, language, template_name="Hermes-2", projector=projector)
    model = chat.model
    assert len(chat.tokenizer) == 572
    assert model.config.image_token_id == 565
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, tensors["mlp1.1.weight"])
    assert torch.equal(
        model.model.vision_tower.encoder.layer[1].lambda_1,
        tensors["vision_model.encoder.layers.1.ls1"],
    )
    assert torch.equal(
        model.model.language_model.layers[0].mlp.up_proj.weight,
        tensors["language_model.model.layers.0.mlp.up_proj.weight"],
    )
    assert (chat.tiles.max, chat.tiles.size, chat.template.name) == (1, 84, "Hermes-2")


@pytest.mark.parametrize("rows", [600, 563])
def test_new_output_rows_are_the_mean_of_the_earlier(rows, tmp_path):
    """600 rows: a padded table shrinks to 572. 563: the table grows by the nine new tokens."""
    vision, language, projector, tensors = split(tmp_path, rows=rows)
    model = loading.build(vision, language, template_name="Hermes-2", projector=projector).model
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    assert head.shape == embeddings.shape == (572, 64)
    assert model.config.text_config.vocab_size == 572
    old = tensors["language_model.lm_head.weight"]
    assert torch.equal(head[:563], old[:563])
    torch.testing.assert_close(head[563:], old[:563].mean(0).expand(9, 64))
    kept = tensors["language_model.model.embed_tokens.weight"]
    assert torch.equal(embeddings[:563], kept[:563])
    assert torch.equal(embeddings[563:], kept[563:572]) == (rows == 600)


def test_a_fresh_projector_has_torchs_initialization(tmp_path):
    vision, language, _, _ = split(tmp_path)
    before = torch.get_rng_state()
    model = loading.build(vision, language, template_name="Hermes-2").model
    assert torch.equal(torch.get_rng_state(), before)
    projector = model.model.multi_modal_projector.requires_grad_(False)
    assert torch.equal(projector.layer_norm.weight, torch.ones(320))
    bound = 320**-0.5
    assert 0.9 * bound < float(projector.linear_1.weight.abs().max()) <= bound
    assert float(projector.linear_1.bias.abs().max()) > 0


def test_a_tied_language_model_gets_its_own_output_matrix(tmp_path):
    vision, language, _, tensors = split(tmp_path)
    own = load_file(language / "model.safetensors")
    del own["lm_head.weight"]
    save_file(own, language / "model.safetensors")
    config = json.loads((language / "config.json").read_text()) | {"tie_word_embeddings": True}
    (language / "config.json").write_text(json.dumps(config))
    model = loading.build(vision, language, template_name="Hermes-2").model
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    kept = tensors["language_model.model.embed_tokens.weight"][:563]
    assert torch.equal(model.lm_head.weight[:563], kept)


def test_an_internlm2_language_model(tmp_path):
    vision, language, projector, tensors = split(tmp_path, "chat_internlm2", "internlm2")
    chat = loading.build(vision, language, template_name="internlm2-chat", projector=projector)
    assert len(chat.tokenizer) == 533
    kept = tensors["language_model.output.weight"]
    assert torch.equal(chat.model.lm_head.weight, kept[:533])


def test_tiling_select_layer_and_shuffle_are_chosen(tmp_path):
    vision, language, projector, _ = split(tmp_path)
    chat = loading.build(
        vision,
        language,
        template_name="internvl2_5",
        projector=projector,
        ps_version="v1",
        select_layer=-4,
        tiles=TilesConfig(size=112, max=4),
    )
    assert chat.model.config.vision_feature_layer == -4
    assert chat.tokens_per_tile == 16
    assert chat.model.get_image_features(torch.rand(1, 3, 112, 112)).pooler_output.shape[1] == 16
    folder = export.run(chat, tmp_path / "out", "official")
    again = loading.load(folder, device="cpu")
    assert again.tiles == chat.tiles
    assert torch.equal(export.probe(again.model), export.probe(chat.model))


def test_a_folder_that_is_no_language_model(tmp_path):
    vision, language, _, _ = split(tmp_path)
    shutil.copy(vision / "model.safetensors", language / "model.safetensors")
    with pytest.raises(ModelFolderError, match="no token embeddings"):
        loading.build(vision, language, template_name="Hermes-2")


def test_a_projector_file_with_code_is_refused(tmp_path):
    vision, language, projector, _ = split(tmp_path)
    torch.save({"0.weight": shutil.rmtree}, projector)
    with pytest.raises(ModelFolderError, match="not a plain file of tensors"):
        loading.build(vision, language, template_name="Hermes-2", projector=projector)
