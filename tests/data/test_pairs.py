"""Captions and images of InternVL-14B: cleaning, ids and pixels as the original makes them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_folders import GOLDEN, shared
from dual_folders import small_tokenizer
from PIL import Image
from safetensors.torch import load_file

from internvl.data import pairs
from internvl.data.tokenizers import load_tokenizer
from internvl.models.vision import normalize_tiles

CASE = GOLDEN / "internvl_g_data"
IDS = {
    "summarize:": [1, 19138, 675, 29901, 2],
    "summarize:a photo of a red panda": [
        *(1, 19138, 675, 29901, 29874, 15373, 310, 263, 2654, 282, 5863, 2),
    ],
    "a photo of a red panda": [1, 263, 15373, 310, 263, 2654, 282, 5863, 2],
    "summarize:一张熊猫的照片": [1, 19138, 675, 29901, 33823, 40351, 36580, 2],
    "summarize:二匹の猫の写真": [
        *(1, 19138, 675, 29901, 30685, 37015, 30199, 33155, 30199, 41971, 2),
    ],
    "": [1, 2],
}
"""The original's ids."""
PROMPTS = {
    "English caption:": [1, 4223, 5777, 683, 29901],
    "Chinese caption:": [1, 10013, 5777, 683, 29901],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return pairs.CaptionEncoder(load_tokenizer(folder))


def test_golden_captions_are_cleaned():
    captions = json.loads((CASE / "captions.json").read_text())
    assert [pairs.clean_caption(text) for text in captions["raw"]] == captions["processed"]


def test_cleaned_as_the_original() -> None:
    file = Path(__file__).parents[1] / "golden/internvl_g_data/captions.json"
    captions = json.loads(file.read_text(encoding="utf-8"))
    assert list(map(pairs.clean_caption, captions["raw"])) == captions["processed"]


def test_full_width_marks_commas_and_line_ends() -> None:
    assert pairs.clean_caption("A、B,c'd -e? \n") == "a、b,c'd -e?"
    assert pairs.clean_caption("...") == ""


def test_golden_ids_of_the_released_tokenizer(tmp_path):
    file = shared("data/tokenizers/chinese_alpaca_tokenizer.model")
    shutil.copy(file, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 49954
    assert tokenizer.convert_tokens_to_ids("[PAD]") == 49953
    encoder = pairs.CaptionEncoder(tokenizer)
    assert {text: encoder.matching(text) for text in IDS} == IDS
    assert {text: encoder.prompt(text) for text in PROMPTS} == PROMPTS
    for text, ids in IDS.items():
        if text.startswith("summarize:"):
            assert encoder.embedding(text.removeprefix("summarize:")) == ids
    long = encoder.embedding("一张熊猫的照片 and a red panda " * 20)
    assert (len(long), long[0], long[-1]) == (80, 1, 2)


def test_a_release_names_its_tokenizer_with_an_end(tmp_path):
    """The release's own setting, add_eos_token, changes nothing here."""
    file = shared("data/tokenizers/chinese_alpaca_tokenizer.model")
    shutil.copy(file, tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    encoder = pairs.CaptionEncoder(load_tokenizer(tmp_path))
    assert {text: encoder.matching(text) for text in IDS} == IDS
    assert {text: encoder.prompt(text) for text in PROMPTS} == PROMPTS


def test_what_stands_before_a_caption(small):
    space = small.embedding(" two cats")
    assert small.embedding("two cats") != space
    assert small.embedding("two cats") == small.matching("summarize:two cats")
    assert small.prompt("two cats") == small.matching("two cats")[:-1]


def test_a_long_caption_keeps_its_end(small):
    ids = small.matching("two cats " * 60)
    assert (len(ids), ids[0], ids[-1]) == (80, 1, 2)
    assert ids[:-1] == small.prompt("two cats " * 60)[:79]


def test_padding_is_zero_and_on_the_right():
    found = pairs.pad_right([[1, 5, 2], [1, 2]])
    assert found.tolist() == [[1, 5, 2], [1, 2, 0]]
    assert pairs.pad_right([[1, 2]], 4).tolist() == [[1, 2, 0, 0]]


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("retrieval", pairs.square), ("zeroshot_classification", pairs.center_square)],
)
def test_golden_pixels(number, name, shape):
    golden = load_file(CASE / "transforms.safetensors")
    image = Image.fromarray(golden[f"image{number}.pixels"].numpy())
    found = normalize_tiles(shape(image, 28)[None], torch.float32)[0]
    torch.testing.assert_close(found, golden[f"image{number}.{name}"], atol=1e-6, rtol=0)


def gradient(width, height):
    """An image whose red says the column and green the row, blue the part."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8))


def test_a_random_part_is_within_its_bounds():
    areas, ratios, mirrored = [], [], 0
    for seed in range(300):
        found = pairs.random_square(gradient(240, 200), 16, np.random.default_rng(seed)).float()
        assert found.shape == (3, 16, 16)
        width = float((found[0, 0, -1] - found[0, 0, 0]) * 16 / 15)
        height = float((found[1, -1, 0] - found[1, 0, 0]) * 16 / 15)
        mirrored += width < 0
        areas.append(abs(width) * height / (240 * 200))
        ratios.append(abs(width) / height)
    assert 0.45 < min(areas) < 0.55
    assert 0.9 < max(areas) < 1.05
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    assert 110 < mirrored < 190


def test_the_same_draw_is_the_same_part():
    image = gradient(90, 60)
    one, two, other = (
        pairs.random_square(image, 16, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_picture_too_long_for_a_part_gives_its_middle():
    found = pairs.random_square(gradient(250, 20), 20, np.random.default_rng(0)).float()
    columns = found[0, 0].sort().values
    assert 108 < float(columns[0]) < 115
    assert 135 < float(columns[-1]) < 142
