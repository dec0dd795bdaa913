"""Stochastic depth and parameter counts, for both families."""

import pytest
import torch
from chat_folders import IMAGE_TOKEN_ID, golden_folder
from torch._dynamo.utils import counters

from internvl.inference import load as loading
from internvl.models.chat.model import ChatModel
from internvl.models.vision import DropPath, count_parameters


def load(folder, **options) -> ChatModel:
    chat = loading.load(
        folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32", **options
    )
    return chat.model


def test_drop_path_only_acts_in_training(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    plain = load(folder)
    dropping = load(folder, drop_path=0.5)
    pixels = torch.rand(2, 3, 84, 84)
    assert set(plain.state_dict()) == set(dropping.state_dict())
    wanted = plain.get_image_features(pixels).pooler_output
    torch.testing.assert_close(dropping.get_image_features(pixels).pooler_output, wanted)
    blocks = dropping.model.vision_tower.encoder.layer
    assert [block.dropout.rate for block in blocks] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    dropping.train()
    torch.manual_seed(0)
    assert not torch.allclose(dropping.get_image_features(pixels).pooler_output, wanted, atol=1e-3)


def test_drop_path_keeps_the_mean_and_whole_samples():
    torch.manual_seed(0)
    dropped = DropPath(0.25, torch.device("cpu"))(torch.ones(4000, 3, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped.amin((1, 2)) == dropped.amax((1, 2))).all()
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)


def test_drop_path_keeps_the_mean_in_bfloat16_and_its_rate_on_the_meta_device():
    torch.manual_seed(0)
    layer = DropPath(0.4, torch.device("meta")).to(torch.bfloat16)
    dropped = layer(torch.full((200, 2, 2), 1.5, dtype=torch.bfloat16))
    assert dropped.dtype == torch.bfloat16
    assert dropped.float().unique().tolist() == pytest.approx([0, 2.5], abs=5e-3)
    assert 60 < int((dropped[:, 0, 0] == 0).sum()) < 100


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_blocks_of_all_rates_are_compiled_once(tmp_path):
    model = load(golden_folder("chat_internlm2", "v2.sel-1", tmp_path), drop_path=0.5).train()
    for block in model.model.vision_tower.encoder.layer:
        block.compile(dynamic=True, backend="eager")
    counters.clear()
    for num_tiles in (2, 3):
        model.get_image_features(torch.rand(num_tiles, 3, 84, 84))
    assert counters["stats"]["unique_graphs"] == 1


def test_parameters_shared_by_modules_count_once(tmp_path):
    model = load(golden_folder("chat_internlm2", "v2.sel-1", tmp_path))
    model.lm_head.requires_grad_(False)
    trained, everything = count_parameters(model)
    assert everything - trained == 600 * 64
