"""A small InternVL-14B, built once for this room's tests, and images with captions."""

from pathlib import Path

import pytest
from dual_folders import add_small_tokenizer, dual_folder
from photos import COLORS, photo

from internvl.inference import load as loading


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return add_small_tokenizer(dual_folder(tmp_path_factory.mktemp("model") / "InternVL-tiny"))


@pytest.fixture(scope="session")
def dual(model):
    return loading.load(model, device="cpu", dtype="float32")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten images with one to three captions each, in the form of Flickr's text."""
    lines = ["image,caption"]
    for number, color in enumerate(COLORS):
        photo(tmp_path / f"{number}.jpg", number, (60 + 9 * number, 80))
        lines += [f"{number}.jpg,Something {color}, {k}." for k in range(1 + number % 3)]
    (tmp_path / "test.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path
