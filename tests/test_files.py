"""What a file really is, said in one sentence with its name and the remedy."""

import gzip
import io
import json
import pickle
import zipfile

import pytest
import torch
from mutations import HTML_PAGE, LFS_POINTER
from safetensors.torch import save

from internvl.errors import ModelFolderError
from internvl.files import describe, read_object
from internvl.models import hub


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
        read_object(file) if name.endswith(".json") else dict(hub.open_tensors(file))
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
        dict(hub.open_tensors(file))


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
        dict(hub.open_tensors(tmp_path / "pytorch_model.bin"))


def test_old_pickles_and_files_that_change_are_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    for value in (1.0, 2.0):  # not the cached content of the first
        torch.save({"a": torch.full((3,), value)}, file, _use_new_zipfile_serialization=value == 2)
        assert torch.equal(hub.load_pickled(file)["a"], torch.full((3,), value))


def test_nothing_is_known_against_a_good_file(tmp_path):
    for name, content in {"a.json": json.dumps({}).encode(), "b.safetensors": WHOLE}.items():
        (tmp_path / name).write_bytes(content)
        assert describe(tmp_path / name) is None
    with pytest.raises(ModelFolderError, match="none.json: missing"):
        describe(tmp_path / "none.json")
