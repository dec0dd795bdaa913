"""The model of this room's tests."""

import pytest
from chat_folders import training_model


@pytest.fixture
def model(tmp_path):
    return training_model(tmp_path)
