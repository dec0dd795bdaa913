"""Weights that do not fit a model are named; tables of positions are resized."""

import json

import pytest
import torch
from chat_folders import GOLDEN, IMAGE_TOKEN_ID, golden_folder
from safetensors.torch import load_file, save_file

from internvl.errors import ModelFolderError
from internvl.inference import load as loading
from internvl.models import weights as model_weights
from internvl.models.chat.model import ChatModel

POSITIONS = GOLDEN / "vit_posemb_resize"


def load(folder, **options) -> ChatModel:
    chat = loading.load(
        folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32", **options
    )
    return chat.model


RESIZES = [run["key"] for run in json.loads((POSITIONS / "case.json").read_text())["runs"]]


@pytest.mark.parametrize("key", RESIZES)
def test_golden_position_embeddings_resized(key):
    old, new = map(int, key.split("to"))
    wanted = load_file(POSITIONS / "internvl_g.safetensors")[f"internvl_g.{key}.output"]
    # The inputs are drawn as the case says, not stored.
    seeded = torch.Generator().manual_seed(old * 1000 + new)
    table = torch.randn(1, (old // 14) ** 2 + 1, 32, generator=seeded)
    found = model_weights.resize_positions(table, (new // 14) ** 2)
    found = found[:, ::7] if key == "448to896" else found
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def change(folder, remove=(), add=None, reshape=None):
    tensors = load_file(folder / "model.safetensors")
    for name in remove:
        del tensors[name]
    save_file(tensors | (add or {}) | (reshape or {}), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"remove": ["mlp1.1.bias"]}, "1 missing weights .mlp1.1.bias"),
        ({"add": {"more.weight": torch.zeros(2)}}, "1 unexpected weights .more.weight"),
        (
            {"reshape": {"language_model.output.weight": torch.zeros(610, 64)}},
            "lm_head.weight has 610 rows, config.json says vocab_size 600",
        ),
        ({"reshape": {"mlp1.1.bias": torch.zeros(5)}}, "linear_1.bias is .5,., config.json asks"),
    ],
)
def test_weights_that_do_not_fit_are_named(edit, says, tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    change(folder, **edit)
    with pytest.raises(ModelFolderError, match=says):
        load(folder)
