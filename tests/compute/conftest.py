"""The model of this room's tests."""

import pytest
from chat_folders import IMAGE_TOKEN_ID, golden_folder

from internvl.inference import load as loading


@pytest.fixture
def model(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    return loading.load(
        folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32"
    ).model.train()
