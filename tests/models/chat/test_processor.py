"""Image settings of an -hf folder without a section of ours: those of its processor's files."""

import json

import pytest
from chat_folders import prompt_folder
from mutations import LFS_POINTER

from internvl import export
from internvl.config import TilesConfig
from internvl.data.images import STATISTICS
from internvl.errors import ModelFolderError
from internvl.inference import inherited
from internvl.inference import load as loading
from internvl.models import hub
from internvl.models.chat import model as chat_model

WHOLE, ALONE = "processor_config.json", "preprocessor_config.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export as transformers' own folders are, of a model of 84 px and 1 to 6 tiles."""
    work = tmp_path_factory.mktemp("hf")
    folder = export.run(str(prompt_folder("qwen2.Hermes-2", work / "official")), work / "hf", "hf")
    config = json.loads((folder / "config.json").read_text())
    del config["internvl"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder, {name: (folder / name).read_text() for name in (WHOLE, ALONE, "config.json")}


@pytest.fixture
def folder(exported):
    folder, contents = exported
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


def change(folder, name, **keys):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def settings(folder):
    found = loading.describe(folder)
    return found.tiles, found.config.internvl["normalize"]


def test_the_processors_file_counts_where_config_json_says_nothing(folder):
    half = [0.5] * 3
    size = {"height": 56, "width": 56}
    change(folder, ALONE, min_patches=2, max_patches=4, size=size, image_mean=half, image_std=half)
    assert settings(folder) == (TilesConfig(size=56, min=2, max=4, thumbnail=True), "siglip")
    start = inherited.read_chat_checkpoint(hub.open_folder(folder), str(folder / "config.json"))
    for key in ("size", "min", "max"):
        assert start.sources[f"data.tiles.{key}"] == str(folder / ALONE)
    assert start.sources["data.normalize"] == str(folder / ALONE)
    by_default = f"{folder / 'config.json'}, by default (use_thumbnail)"
    assert start.sources["data.tiles.thumbnail"] == by_default
    rows = loading.load(folder, device="cpu").model.model.vision_tower.embeddings
    assert rows.position_embeddings.shape[1] == 1 + (56 // 14) ** 2


@pytest.mark.parametrize("name", STATISTICS)
def test_every_mean_and_deviation_has_its_name(name, folder):
    mean, std = STATISTICS[name]
    change(folder, ALONE, image_mean=list(mean), image_std=list(std))
    assert settings(folder)[1] == name
    change(folder, ALONE, image_mean=0.5, image_std=0.5)
    assert settings(folder)[1] == "siglip"


def test_a_section_of_ours_wins_and_nothing_else_is_read(folder):
    config = json.loads((folder / "config.json").read_text()) | {"internvl": {}}
    (folder / "config.json").write_text(json.dumps(config | {"internvl": {"normalize": "clip"}}))
    (folder / ALONE).write_text(LFS_POINTER.decode())
    found = loading.describe(folder)
    assert (found.tiles.max, found.config.internvl["normalize"]) == (12, "clip")


def test_the_section_in_processor_config_json_wins_over_the_file(folder):
    images = json.loads((folder / ALONE).read_text()) | {"max_patches": 3}
    change(folder, WHOLE, image_processor=images)
    assert settings(folder)[0].max == 3
    change(folder, WHOLE, image_processor=images | {"max_patches": "3"})
    with pytest.raises(ModelFolderError, match=f"{WHOLE}: image_processor.max_patches is '3'"):
        settings(folder)


def test_crop_to_patches_has_no_effect_as_in_transformers(folder):
    """The releases hold false, and their processor sets true."""
    change(folder, ALONE, crop_to_patches=False)
    assert settings(folder)[0].max == 6


def test_a_folder_without_a_processor_is_as_the_releases(folder):
    for name in (WHOLE, ALONE):
        (folder / name).unlink()
    assert settings_of_release(folder) == (1, 12, "imagenet")
    (folder / ALONE).write_text(json.dumps({"max_patches": None}))
    assert settings_of_release(folder) == (1, 12, "imagenet")


def settings_of_release(folder):
    found = loading.describe(folder)
    return found.tiles.min, found.tiles.max, found.config.internvl["normalize"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"max_patches": 0}, "max_patches is 0, a whole number from 1 to 10000"),
        ({"min_patches": 7}, "min_patches is 7, and max_patches is 6: a whole number from 1 to 6"),
        ({"min_patches": 13, "max_patches": None}, "min_patches is 13, and max_patches is 12"),
        ({"size": {"height": 84, "width": 56}}, "a height and an equal width is expected"),
        ({"size": {"shortest_edge": 84}}, "a height and an equal width is expected"),
        ({"size": "84"}, "size is '84'"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\]"),
        ({"image_mean": [0.4, 0.4, 0.4]}, "none of imagenet, clip, siglip"),
        ({"image_std": "x"}, "image_std is 'x', a number or a list of 3"),
        ({"resample": 2}, r"resample is 2, 3 \(bicubic\) is expected"),
        ({"do_normalize": False}, "do_normalize is False, true is expected"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, 1/255 is expected"),
    ],
)
def test_a_value_that_is_not_computed_here_is_named(keys, says, folder):
    change(folder, ALONE, **keys)
    with pytest.raises(ModelFolderError, match=says) as caught:
        chat_model.read_config(hub.open_folder(folder))
    assert str(caught.value).startswith(f"{folder / ALONE}: ")


@pytest.mark.parametrize("name", [WHOLE, ALONE])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LFS_POINTER.decode(), "Git LFS"),
        ('{"a":', "not JSON"),
        ("[1]", "found list"),
        ("", "empty"),
    ],
)
def test_a_damaged_file_is_named(name, content, says, folder):
    (folder / name).write_text(content)
    with pytest.raises(ModelFolderError, match=says) as caught:
        chat_model.read_config(hub.open_folder(folder))
    assert str(caught.value).startswith(f"{folder / name}: ")
