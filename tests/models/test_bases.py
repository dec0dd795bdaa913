"""Places of base models: written, moved, replaced, damaged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from internvl.errors import ModelFolderError, UserError
from internvl.models import bases
from internvl.models.bases import Located, Search


def model(folder: Path, value: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.full((1000,), value)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with a base and a run on it."""
    place = bases.new_place("base", model(tmp_path / "old/base"))
    bases.write(tmp_path / "old/runs/a", {"id": place})
    return tmp_path / "old"


def test_a_base_that_moved_along_is_there(tree: Path) -> None:
    moved = tree.rename(tree.parent / "new")
    assert Search().locate(moved / "runs/a", "id", "base") == Located(moved / "base")


def test_a_base_that_stayed_is_there(tree: Path) -> None:
    (tree / "runs/a").rename(tree.parent / "a")
    assert Search().locate(tree.parent / "a", "id", "base") == Located(tree / "base")


def test_a_base_is_found_through_links(tree: Path) -> None:
    (tree.parent / "link").symlink_to(tree / "runs/a")
    assert Search().locate(tree.parent / "link", "id", "base") == Located(tree / "base")


def test_of_two_bases_the_one_with_the_recorded_weights_is_taken(tree: Path, caplog) -> None:
    other = tree.parent / "other"
    model(other / "base", 1.0)
    (other / "runs").mkdir()
    moved = (tree / "runs/a").rename(other / "runs/a")
    assert Search().locate(moved, "id", "base") == Located(tree / "base")
    assert not caplog.messages
    (tree / "base").rename(tree / "hidden")
    assert Search().locate(moved, "id", "base") == Located(other / "base")
    assert "the weights in" in caplog.text
    assert "are not those of the base that it was trained on" in caplog.text


def test_a_missing_base_is_named_and_replaced(tree: Path, caplog) -> None:
    hidden = (tree / "base").rename(tree / "hidden")
    with pytest.raises(ModelFolderError) as caught:
        Search().locate(tree / "runs/a", "id", "base")
    assert str(caught.value) == (
        f"{tree}/runs/a: its base model base is not there (looked for it at {tree}/base and, from "
        "this folder, at ../../base); put it back, or name its folder with --base DIR (base=DIR in "
        "Python)"
    )
    caplog.set_level("INFO")
    search = Search(hidden)
    assert search.locate(tree / "runs/a", "id", "base") == Located(hidden)
    search.check_used("a")
    assert caplog.messages == [f"{tree}/runs/a: takes {hidden} in place of its base base"]
    Search([model(tree / "other", 1.0)]).locate(tree / "runs/a", "id", "base")
    assert "answers may be wrong" in caplog.messages[-1]


def test_a_replacement_that_nothing_needs_is_refused(tree: Path) -> None:
    search = Search(tree / "base")
    search.locate(tree / "runs/a", "id", "base")
    with pytest.raises(UserError, match=r"base .*/base: no base of runs/a is missing; leave it"):
        search.check_used("runs/a")


def test_without_a_record_a_base_is_looked_up_from_the_run(tmp_path: Path) -> None:
    base, run = model(tmp_path / "base"), tmp_path / "runs/a"
    near = [*bases.moved("base", Path("runs/a"), run)]
    assert Search().locate(run, "id", "base", near) == Located(base)
    assert not [*bases.moved("base", tmp_path / "runs/a", run)]
    assert Search().locate(run, "id", "owner/name") is None


def test_a_run_that_is_resumed_keeps_the_record_of_its_base(tree: Path, caplog) -> None:
    (tree / "base/model.safetensors").unlink()
    save_file({"a": torch.ones(1000)}, tree / "base/model.safetensors")
    bases.write(tree / "runs/a", {"id": bases.new_place("base", tree / "base")})
    Search().locate(tree / "runs/a", "id", "base")
    assert "are not those of the base" in caplog.text


@pytest.mark.parametrize(
    "content",
    [{"id": []}, {"id": {"name": "a"}}, {"id": {"name": 1, "path": "a", "relative": "b"}}],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: object) -> None:
    (tmp_path / "base.json").write_text(json.dumps(content))
    with pytest.raises(ModelFolderError, match="base.json: is damaged; remove it, and the base"):
        Search().locate(tmp_path, "id", "a")
