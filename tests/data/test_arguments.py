"""Arguments: one is a list of one, collections keep their order, numbers are in range."""

import io
import mmap
import types

import numpy as np
import pytest
import torch
from PIL import Image

from internvl import evaluate
from internvl.config import eval_config, recipes
from internvl.data.arguments import (
    check_number,
    check_whole,
    list_images,
    list_texts,
    nearest,
)
from internvl.data.images import FileSlice
from internvl.errors import BadImage, ConfigError, UserError
from internvl.evals import metrics
from internvl.models.adapters import lora


class Series:
    """As pandas': neither a list nor a sequence."""

    def __iter__(self):
        return iter(["a", "b"])


@pytest.mark.parametrize(
    ("texts", "listed"),
    [
        ("ab", ["ab"]),
        ("", [""]),
        (["ab", "c"], ["ab", "c"]),
        (("ab",), ["ab"]),
        (iter(["a", "b"]), ["a", "b"]),
        ({"a": 1, "b": 2}.values(), None),
        ({"a": "x", "b": "y"}.values(), ["x", "y"]),
        (dict.fromkeys("ab").keys(), ["a", "b"]),
        (Series(), ["a", "b"]),
        (np.array(["ab", "c"]), ["ab", "c"]),
        (np.array("ab"), ["ab"]),
        (np.array(["ab", "c"], dtype=object), ["ab", "c"]),
        (np.str_("ab"), ["ab"]),
        ([], []),
        (frozenset("ab"), None),
        (b"ab", None),
        (None, None),
        (np.array([1.5]), None),
        (torch.ones(2), None),
    ],
)
def test_texts(texts, listed):
    if listed is None:
        with pytest.raises(UserError, match="^(name|names)( 0 is a|:| must be a list)"):
            list_texts(texts, "name")
    else:
        assert list_texts(texts, "name") == listed


IMAGE = Image.new("RGB", (4, 3))
ARRAY = np.zeros((3, 4, 3), np.uint8)


@pytest.mark.parametrize(
    "image",
    ["a.png", b"x", bytearray(b"x"), IMAGE, ARRAY, ARRAY[..., 0], FileSlice("a", 0, 1, "b")],
)
def test_one_image_is_a_list_of_one(image):
    (found,) = list_images(image)
    assert found is image
    assert list_images([image, image])[1] is image
    assert len(list_images(iter([image] * 3))) == 3


def test_a_file_object_is_one_image(tmp_path):
    """Not its lines; read at once, so that a closed file or a second reading changes nothing."""
    data = b"\x89PNG\n\x00\n"
    (tmp_path / "a.png").write_bytes(data)
    behind = io.BytesIO(data)
    behind.seek(0, 2)  # as after `image.save(buffer)`
    with open(tmp_path / "a.png", "rb") as file, open(tmp_path / "a.png", "rb", 0) as raw:
        for given in (file, raw, behind):
            assert list_images(given) == [data]
            assert list_images([given, given]) == [data] * 2
    (mapped,) = list_images(mmap.mmap(-1, 3))
    assert mapped == bytes(3)
    for given, says in (
        (file, "a.png: the file object cannot be read .*closed file.*; open it again"),
        (io.StringIO("x"), 'gives text, not bytes; open it with mode "rb"'),
        (io.TextIOWrapper(io.BytesIO(data)), 'gives text, not bytes; open it with mode "rb"'),
        (types.SimpleNamespace(read=lambda: 3), "gives int, not bytes"),
    ):
        with pytest.raises(BadImage, match=says):
            list_images(given)


def test_several_images():
    assert [image.shape for image in list_images(np.stack([ARRAY] * 2))] == [(3, 4, 3)] * 2
    (path,) = list_images(np.array(["a.png"]))
    assert type(path) is str
    assert type(list_images(np.str_("a.png"))[0]) is str
    assert len(list_images(torch.zeros(2, 3, 4, 4))) == 1  # the tiles of one image
    assert list_images([]) == []


def test_numbers():
    for good in (1, np.int64(1), True + 1):
        check_whole("n", good, 1)
    for bad in (0, True, 1.0, "1", None, np.float32(1)):
        with pytest.raises(UserError, match="^n must be a whole number of at least 1, not "):
            check_whole("n", bad, 1)
    for fine in (0.5, 1, np.float32(0.1)):
        check_number("x", fine, above=0, most=1)
    for bad in (0, -0.0, 1.5, float("nan"), float("inf"), "1", None, True, 1j):
        with pytest.raises(UserError, match="^x must be a number above 0 and at most 1, not "):
            check_number("x", bad, above=0, most=1)
    check_number("x", -5.0)
    assert nearest("temprature", ["top_p", "temperature"]) == "did you mean temperature?"


def recipe(**keys):
    return {
        "run": "x",
        "steps": 1,
        "global_batch": 1,
        "model": {"id": "x"},
        "data": {"meta": "m"},
    } | keys


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"model": {"id": "x", "train": "language_model"}},
            r"model.train: must be a list, not 'language_model'; write \[language_model\]",
        ),
        (
            {"model": {"id": "x", "lora": {"rank": 1, "on": "vision_tower"}}},
            "model.lora.on: must be",
        ),
        (
            {"data": {"sources": {"name": "x"}}},
            r"data.sources: must be a list, .* begin with - or \[",
        ),
        (
            {"evals": {"a": {"type": "retrieval", "annotations": "a", "modes": "c"}}},
            r"evals.a.modes: .* write \[c\]",
        ),
        (
            {"evals": {"a": {"type": "retrieval", "annotations": "a", "recall_k": 5}}},
            r"evals.a.recall_k: .* write \[5\]",
        ),
        (
            {"evals": {"a": {"annotations": "a", "min_new_tokens": 31}}},
            "evals.a.min_new_tokens: 31, larger than max_new_tokens, 30",
        ),
    ],
)
def test_a_recipe_with_one_value_where_a_list_is_meant(keys, says):
    with pytest.raises(ConfigError, match=says):
        recipes.resolve(recipe(**keys))


def test_one_override_is_a_list_of_one():
    assert recipes.resolve(recipe(), "steps=7").steps == 7


def test_one_task_and_one_language(tmp_path):
    for tasks in ("retrieval-xtd", ["retrieval-xtd"]):
        with pytest.raises(ConfigError, match=r"retrieval-xtd: 2 .*\n.*test_1kcaptions_ko.txt"):
            evaluate.run("no/model", tasks, languages="ko", root=str(tmp_path), modes="c")
    with pytest.raises(ConfigError, match="has no language 'xx'"):
        evaluate.run("no/model", "retrieval-xtd", languages="xx", root=tmp_path)
    with pytest.raises(UserError, match="tasks must be a list, not int"):
        evaluate.run("no/model", 5)
    with pytest.raises(UserError, match="there is no annotation file|cannot read"):
        evaluate.run("no/model", "caption-file", annotations=str(tmp_path / "a.json"))
    with pytest.raises(ConfigError, match="min_new_tokens: 9, larger than max_new_tokens, 8"):
        eval_config(annotations="a", min_new_tokens=9, max_new_tokens=8)


def test_one_part_and_one_reference():
    model = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"multi_modal_projector": torch.nn.Linear(1, 1)})}
    )
    lora.select_trainable(model, "multi_modal_projector")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="no list of references"):
        metrics.exact_match({1: "a"}, {1: "a cat"})
