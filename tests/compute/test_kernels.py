"""Attention, recomputation and compilation applied to a model: it trains the same."""

from dataclasses import replace

import pytest
import torch
from chat_folders import IMAGE_TOKEN_ID, official_folder
from packed_rows import assert_same, loss_and_gradients, row

from internvl.compute import kernels
from internvl.config import ComputeConfig, LoraConfig
from internvl.errors import UserError
from internvl.inference import load as loading
from internvl.models.adapters import lora
from internvl.models.attention.packed import packed_mask
from internvl.models.attention.per_document import DOCUMENTS
from internvl.models.chat.model import Supervision, tokens_per_tile

CPU = torch.device("cpu")


def tower_of(model):
    return model.model.vision_tower.encoder


def is_recomputed(blocks):
    return ["forward" in vars(block) for block in blocks]


def test_flash_is_refused_where_it_is_not(model):
    with pytest.raises(UserError, match=r"pip install 'internvl\[flash\]'"):
        kernels.apply_compute(model, CPU, ComputeConfig(attention="flash"))


@pytest.mark.parametrize(("kind", "every"), [("full", 1), ("selective", 2)])
@pytest.mark.parametrize("with_lora", [True, False])
def test_recomputing_changes_nothing_and_leaves_frozen_parts_alone(model, kind, every, with_lora):
    lora.select_trainable(model, [] if with_lora else ["language_model"])
    if with_lora:
        lora.attach(model, LoraConfig(rank=4, dropout=0.0))
    wanted = loss_and_gradients(model, row())
    kernels.apply_compute(model, CPU, ComputeConfig(checkpointing=kind))
    decoders = model.model.language_model.layers
    assert is_recomputed(decoders) == [i % every == 0 for i in range(len(decoders))]
    assert not any(is_recomputed(tower_of(model).layer))
    embeds = model.get_input_embeddings()(row().input_ids)
    assert embeds.requires_grad is not with_lora  # transformers' own way makes it so for LoRA
    assert_same(loss_and_gradients(model, row()), wanted)


def test_a_frozen_language_model_above_a_trained_projector_is_recomputed(model):
    lora.select_trainable(model, ["multi_modal_projector"])
    side = model.config.vision_config.image_size[0]
    ids = row().input_ids.clone()
    ids[0, : tokens_per_tile(model.config, side)] = model.config.image_token_id
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    parameter = model.model.multi_modal_projector.linear_1.weight

    def gradient():
        model.zero_grad(set_to_none=True)
        positions = torch.tensor([27, 28])
        supervision = Supervision(positions, ids[0, positions + 1], torch.ones(2))
        model(input_ids=ids, pixel_values=pixels, supervision=supervision).loss.backward()
        return parameter.grad.clone()

    expected = gradient()
    kernels.apply_compute(model, CPU, ComputeConfig(checkpointing="full"))
    assert all(is_recomputed(model.model.language_model.layers))
    assert not any(is_recomputed(tower_of(model).layer))
    torch.testing.assert_close(gradient(), expected)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_train_the_same(model):
    # One block of each sort: to compile those that follow proves nothing more, and takes as long.
    for stack, name in ((model.model.language_model, "layers"), (tower_of(model), "layer")):
        setattr(stack, name, getattr(stack, name)[-1:])
    wanted = loss_and_gradients(model, row())
    names = [*model.state_dict()]
    kernels.apply_compute(model, CPU, ComputeConfig(compile=True, loss_chunk=5))
    assert model.loss_chunk == 5
    assert [*model.state_dict()] == names
    assert_same(loss_and_gradients(model, row()), wanted)


def test_written_out_scores_train_the_same(model):
    wanted = loss_and_gradients(model, row())
    kernels.apply_compute(model, CPU, ComputeConfig(attention="eager"))
    parts = (model.config.text_config, model.config.vision_config)
    assert [part._attn_implementation for part in parts] == [DOCUMENTS, "eager"]
    assert_same(loss_and_gradients(model, row()), wanted)


def test_one_long_document_among_short_ones_is_not_taken_apart(model):
    """Twelve times 19 x 19 scores would be more than 30 x 30."""
    uneven = replace(row(), document=torch.cat([torch.zeros(19), torch.arange(1, 12)]).long())
    assert packed_mask(DOCUMENTS, row().document, row().branch, torch.float32).shape[0] == 2
    mask = packed_mask(DOCUMENTS, uneven.document, uneven.branch, torch.float32)
    assert mask.shape == (1, 1, 30, 30)
    wanted = loss_and_gradients(model, uneven)
    kernels.apply_compute(model, CPU, ComputeConfig(attention="eager"))
    assert_same(loss_and_gradients(model, uneven), wanted)


def test_attention_with_sinks_stays_its_own(tmp_path):
    folder = official_folder("GptOssForCausalLM", tmp_path)
    chat = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32")
    kernels.apply_compute(chat.model, CPU, ComputeConfig(attention="eager"))
    assert chat.model.config.text_config._attn_implementation == "eager"
