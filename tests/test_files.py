"""What a file really is, said in one sentence with its name and the remedy."""

import codecs
import gzip
import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from mutations import HTML_PAGE, LFS_POINTER
from safetensors.torch import save

from internvl import files
from internvl.errors import ModelFolderError
from internvl.files import FolderReader, describe, read_object
from internvl.models.tensors import load_pickled, open_tensors


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return stream.getvalue()


OTHER_FILES = {
    "a Git LFS pointer": (LFS_POINTER, "Git LFS pointer.*`git lfs pull`"),
    "a web page": (HTML_PAGE, "a web page.*download it again"),
    "nothing": (b"", r"empty \(0 bytes\).*download it again"),
    "zeros": (bytes(4096), "zero bytes.*download it again"),
    "UTF-16": ("{}".encode("utf-16"), "UTF-16: save it as UTF-8"),
    "gzip": (gzip.compress(b"{}"), "gzip: unpack it"),
    "a server's error": (b"<?xml version='1.0'?><Error/>", "an XML answer.*download it again"),
    "git-annex": (b"/annex/objects/SHA256E-s1--00", "git-annex pointer.*git annex get"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_other_files_under_a_models_names(name, kind, tmp_path):
    content, says = OTHER_FILES[kind]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ModelFolderError, match=f"{file}: .*{says}") as caught:
        read_object(file) if name.endswith(".json") else dict(open_tensors(file))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_object(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1', "not JSON .*copy it again from the release"),
        (b"\xff\x00{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected an object, found list"),
        (b"null", "expected an object, found NoneType"),
    ],
)
def test_json_that_is_none(content, says, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelFolderError, match=f"a.json: {says}"):
        read_object(tmp_path / "a.json")


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelFolderError, match=r"config.json: cannot be opened \(Is a directory\)"):
        read_object(tmp_path / "config.json")


WHOLE = save({"a": torch.arange(600.0), "b": torch.ones(3)})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (WHOLE[:-12], f"ends after {len(WHOLE) - 12} of {len(WHOLE)} bytes.*truncated"),
        (WHOLE[:40], "ends after 40 bytes, within its header.*truncated"),
        (WHOLE[:5], "ends after 5 bytes, within its header.*truncated"),
        (zipped(), "a zip archive, such as a PyTorch file"),
        (pickle.dumps({"a": 1}), "a pickle, such as an old PyTorch file"),
        (b"not tensors at all, but some text", "not a safetensors file"),
        (WHOLE.replace(b"data_offsets", b"data_offsetz"), "damaged, download it again"),
    ],
)
def test_safetensors_that_are_none(content, says, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelFolderError, match=f"{file}: .*{says}"):
        dict(open_tensors(file))


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ([torch.ones(2)], "holds a list, not tensors"),
        ({"state_dict": {"a": torch.ones(2)}, "step": 3}, "holds dict under 'state_dict'"),
        ({3: torch.ones(2)}, "holds Tensor under 3"),
    ],
)
def test_pickles_of_other_things(held, says, tmp_path):
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=f"pytorch_model.bin: {says}.*safetensors files"):
        dict(open_tensors(tmp_path / "pytorch_model.bin"))


def test_old_pickles_and_files_that_change_are_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    for value in (1.0, 2.0):  # not the cached content of the first
        torch.save({"a": torch.full((3,), value)}, file, _use_new_zipfile_serialization=value == 2)
        assert torch.equal(load_pickled(file)["a"], torch.full((3,), value))


def test_nothing_is_known_against_a_good_file(tmp_path):
    for name, content in {"a.json": json.dumps({}).encode(), "b.safetensors": WHOLE}.items():
        (tmp_path / name).write_bytes(content)
        assert describe(tmp_path / name) is None
    with pytest.raises(ModelFolderError, match="none.json: missing"):
        describe(tmp_path / "none.json")


def failing_lines():
    yield "new"
    raise RuntimeError("stopped")


def test_a_file_that_fails_halfway_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert files.write_lines(path, ["a", "b"]) == 2
    with pytest.raises(RuntimeError, match="stopped"):
        files.write_lines(path, failing_lines())
    assert path.read_text() == "a\nb\n"
    assert os.listdir(path.parent) == ["rows.jsonl"]


def test_files_and_folders_have_the_modes_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        files.write_json(tmp_path / "a.json", {"a": "\ud800"})
        with files.complete_folder(tmp_path / "b"):
            pass
        with files.complete_folder(tmp_path / "c", shared=True, mode=0o700):
            pass
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.json", "b", "c")]
    assert modes == [0o644, 0o755, 0o700]


def write_half_a_folder(path, *, shared):
    with files.complete_folder(path, shared=shared) as partial:
        (partial / "x").write_text("half")
        raise RuntimeError("stopped")


@pytest.mark.parametrize("shared", [True, False])
def test_a_folder_is_complete_or_absent(tmp_path, shared):
    with pytest.raises(RuntimeError, match="stopped"):
        write_half_a_folder(tmp_path / "a", shared=shared)
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()  # an empty one is replaced
    with files.complete_folder(tmp_path / "a", shared=shared) as partial:
        (partial / "x").write_text("whole")
    assert (tmp_path / "a" / "x").read_text() == "whole"
    assert os.listdir(tmp_path) == ["a"]


def test_of_two_that_share_a_folder_the_first_to_finish_wins(tmp_path):
    with files.complete_folder(tmp_path / "a", shared=True) as second:
        (second / "x").write_text("second")
        with files.complete_folder(tmp_path / "a", shared=True) as first:
            (first / "x").write_text("first")
    assert (tmp_path / "a" / "x").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_alone_refuses_one_with_content_and_replaces_what_a_killed_one_left(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "left").write_text("half")
    with (
        pytest.raises(OSError, match="not empty"),
        files.complete_folder(tmp_path / "a") as partial,
    ):
        assert not any(partial.iterdir())
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_partials_of_killed_writers_are_removed(tmp_path):
    (tmp_path / ".000500.partial").mkdir()
    (tmp_path / ".LATEST-ab.partial").write_text("0")
    (tmp_path / "LATEST").write_text("1")
    files.remove_partials(tmp_path)
    files.remove_partials(tmp_path / "missing")
    assert os.listdir(tmp_path) == ["LATEST"]


def test_a_folder_reader_reads_a_file_once(tmp_path):
    (tmp_path / "a.json").write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
    (tmp_path / "b.json").write_text("[1]")
    reader = FolderReader(tmp_path)
    assert reader.content("a.json") == codecs.BOM_UTF8 + b'{"a": 1}'
    (tmp_path / "a.json").unlink()
    assert reader.object("a.json") == {"a": 1}
    assert reader.content("none.json") is None
    assert reader.object("none.json") == {}
    with pytest.raises(ModelFolderError, match=r"b\.json: expected an object, found list"):
        reader.object("b.json")
