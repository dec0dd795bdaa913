"""Settings that a recipe leaves open come from its checkpoint, key by key."""

import json
import shutil

import pytest
import tiny_run
from chat_folders import prompt_folder
from dual_folders import dual_folder
from tiny_run import losses, recipe_of

from internvl import log, train
from internvl.config import TilesConfig, recipes
from internvl.data.templates import template
from internvl.errors import UserError
from internvl.inference import load as loading


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def open_recipe(project, tmp_path, *overrides):
    """A recipe that says nothing of tiles, on a start model of its own."""
    start = tmp_path / "start"
    if not start.exists():
        shutil.copytree(project.parent / "start", start)
    return recipe_of(project, tmp_path, f"model.id={start}", "data.tiles={}", *overrides)


def test_a_recipe_without_tiles_trains_as_its_checkpoint_is(project, tmp_path, caplog):
    """And goes on so, whatever becomes of the checkpoint's config.json."""
    recipe = open_recipe(project, tmp_path, "steps=2")
    log.get_logger().propagate = True
    with caplog.at_level("INFO", logger="internvl"):
        train.run(recipe)
    source = tmp_path / "start/config.json"
    assert f"data.tiles.size        64             {source}" in caplog.text
    saved = recipes.load_recipe(recipe.run / "recipe.yaml")
    assert saved.data.tiles == TilesConfig(size=64, min=1, max=1, thumbnail=False)
    assert (saved.data.normalize, saved.data.template) == ("imagenet", "internvl2_5")
    assert saved.data.system_message == ""
    stated = train.run(recipe_of(project, tmp_path / "stated", "steps=2"))
    assert losses(stated) == losses(recipe.run)
    config = json.loads(source.read_text())
    config["internvl"] |= {"max_dynamic_patch": 9, "dynamic_image_size": True}
    source.write_text(json.dumps(config))
    again = loading.complete(recipe)
    assert again.recipe.data == saved.data
    assert {setting.source for setting in again.settings} == {str(recipe.run / "recipe.yaml")}
    other = loading.complete(open_recipe(project, tmp_path, f"run={tmp_path / 'other'}"))
    assert other.recipe.data.tiling.max == 9


def _recipe(folder, *overrides, **data):
    sources = [{"name": "a", "annotations": "a.jsonl"}]
    tree = {
        "model": {"id": str(folder)},
        "data": {"sources": sources, **data},
        "run": str(folder.parent / "run"),
        "global_batch": 1,
        "steps": 1,
    }
    return recipes.resolve(tree, overrides)


def _one_tile(folder, **changes):
    """The folder's config.json with these values; size 84, 1 to 6 tiles, thumbnail otherwise."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_a_recipe_leaves_open_is_the_checkpoints_key_by_key(tmp_path):
    folder = prompt_folder("internlm2.internlm2-chat", tmp_path / "model")
    _one_tile(folder, normalize="siglip", system_message="Be brief.", max_dynamic_patch=5)
    for data, size, most, thumbnail in (
        ({}, 84, 5, True),
        ({"tiles": {"max": 2}}, 84, 2, True),
        ({"tiles": {"size": 56, "thumbnail": False}}, 56, 5, False),
    ):
        completed = loading.complete(_recipe(folder, **data))
        found = completed.recipe.data
        assert found.tiles == TilesConfig(size=size, min=1, max=most, thumbnail=thumbnail)
        assert (found.normalize, found.template) == ("siglip", "internlm2-chat")
        assert found.system_message == "Be brief."
        sources = {setting.key: setting.source for setting in completed.settings}
        for key in ("size", "min", "max", "thumbnail", "pad_square"):
            stated = key in data.get("tiles", {})
            wanted = "recipe" if stated else str(folder / "config.json")
            assert sources[f"data.tiles.{key}"].startswith(wanted), key
        assert ("resized from 84 to 56 px" in completed.render()) is (size == 56)


def test_a_system_message_of_the_template_that_holds(tmp_path):
    folder = prompt_folder("internlm2.internlm2-chat", tmp_path / "model")
    for chosen in ("internlm2-chat", "internvl2_5"):
        data = loading.complete(_recipe(folder, template=chosen)).recipe.data
        assert (data.template, data.system_message) == (chosen, template(chosen).system_message)


def test_all_that_does_not_fit_a_checkpoint_in_one_sentence(tmp_path):
    folder = prompt_folder("qwen2.Hermes-2", tmp_path / "model")
    _one_tile(folder, dynamic_image_size=False, pad2square=True)
    with pytest.raises(UserError) as caught:
        loading.complete(_recipe(folder, tiles={"size": 60, "max": 4}))
    for part in (
        "data.tiles.size = 60 does not fit this model",
        "a multiple of 28 pixels",
        "data.tiles.pad_square = true of the checkpoint goes only with data.tiles.max: 1",
    ):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="tiles.min = 3 is larger than data.tiles.max = 1 of the"):
        loading.complete(_recipe(folder, tiles={"min": 3}))


def test_internvl_14b_takes_one_tile_of_its_own_size(tmp_path):
    folder = dual_folder(tmp_path / "model")
    objective = "objective.name=retrieval"
    completed = loading.complete(_recipe(folder, objective))
    wanted = TilesConfig(size=84, min=1, max=1, thumbnail=False)
    assert completed.recipe.data.tiles == wanted
    assert [setting.key for setting in completed.settings] == ["data.tiles.size"]
    data = {"tiles": {"max": 12}, "normalize": "clip", "template": "internvl2_5"}
    with pytest.raises(UserError) as caught:
        loading.complete(_recipe(folder, objective, **data))
    for key in ("data.tiles.max = 12", "data.normalize = clip", "data.template = internvl2_5"):
        assert f"{key} is not for InternVL-14B: leave it out" in str(caught.value)
