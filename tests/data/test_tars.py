"""Shards as they come: made on a Mac, with names of other encodings, damaged."""

import io
import json
import tarfile

import numpy as np
import pytest
from data_files import picture

from internvl.data import tars
from internvl.data.images import FileSlice, read_rgb
from internvl.errors import DataError


@pytest.fixture
def jpeg(tmp_path):
    return picture(tmp_path / "x.jpg", (30, 20)).read_bytes()


def shard(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if form == tarfile.PAX_FORMAT:  # as a Mac's tar keeps what its files know
                info.pax_headers = {"LIBARCHIVE.xattr.com.apple.quarantine": "MDA4", "ctime": "1.5"}
            tar.addfile(info, io.BytesIO(content))
    return path


APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(100)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_what_a_mac_adds_is_no_sample(tmp_path, jpeg, form):
    text = json.dumps({"n": 1}).encode()
    plain = [("a.jpg", jpeg), ("a.json", text), ("b.jpg", jpeg), ("b.txt", b"two")]
    mac = [
        *((".DS_Store", b"\0\0\0\1Bud1"), ("._.DS_Store", APPLE_DOUBLE)),
        *(("._a.jpg", APPLE_DOUBLE), ("a.jpg", jpeg), ("._a.json", APPLE_DOUBLE)),
        *(("a.json", text), ("__MACOSX/._a.jpg", APPLE_DOUBLE), ("._b.jpg", APPLE_DOUBLE)),
        *(("b.jpg", jpeg), ("._b.txt", APPLE_DOUBLE), ("b.txt", b"two")),
        *((".fseventsd/c.txt", b"x"), ("__MACOSX/d.jpg", APPLE_DOUBLE)),
    ]
    rows = list(tars.shard_rows(shard(tmp_path / "mac.tar", [(f"./{n}", c) for n, c in mac], form)))
    wanted = list(tars.shard_rows(shard(tmp_path / "plain.tar", plain, form)))
    assert [row["where"] for row in wanted] == ["plain.tar a", "plain.tar b"]
    assert [row["where"] for row in rows] == ["mac.tar ./a", "mac.tar ./b"]
    for row, other in zip(rows, wanted, strict=True):
        assert (row.get("row"), row.get("caption")) == (other.get("row"), other.get("caption"))
        assert "bad" not in row
        (slice_,) = row["slices"]
        assert np.array_equal(read_rgb(FileSlice(*slice_)), read_rgb(jpeg))


def test_a_hidden_twin_of_a_tar_is_no_shard(tmp_path, jpeg):
    one = shard(tmp_path / "0.tar", [("a.jpg", jpeg)])
    (tmp_path / "._0.tar").write_bytes(APPLE_DOUBLE)
    assert tars.shards(tmp_path) == [one]


def test_names_of_another_encoding(tmp_path, jpeg):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="gbk") as tar:
        info = tarfile.TarInfo("图.jpg")
        info.size = len(jpeg)
        tar.addfile(info, io.BytesIO(jpeg))
    (row,) = tars.shard_rows(path)
    json.dumps(row, ensure_ascii=False).encode()
    assert np.array_equal(read_rgb(FileSlice(*row["slices"][0])), read_rgb(jpeg))


def test_a_link_is_named(tmp_path, jpeg):
    path = shard(tmp_path / "0.tar", [("a.jpg", jpeg)])
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(info)
    rows = list(tars.shard_rows(path))
    assert rows[1]["bad"] == "b.jpg is a link or sparse; write the file itself into the tar"


def test_damaged_tars_are_read_or_named(tmp_path, jpeg):
    members = [
        (f"{number}.{end}", content)
        for number in range(3)
        for end, content in (("jpg", jpeg[:600]), ("json", b'{"n": 1}'), ("txt", b"text"))
    ]
    whole = shard(tmp_path / "whole.tar", members).read_bytes()
    draw, path = np.random.default_rng(3), tmp_path / "bad.tar"
    sentences = []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(int(draw.integers(1, 6))):
            at = int(draw.integers(20)) * 512 + int(draw.integers(300))
            data[at : at + 1] = bytes(draw.integers(0, 256, 1, dtype=np.uint8))
        path.write_bytes(data[: int(draw.integers(1, len(data) * 3))])
        try:
            assert len(list(tars.shard_rows(path))) <= 30
        except DataError as error:
            sentences.append(str(error))
    assert sentences
    assert all(sentence.startswith(str(path)) for sentence in sentences)


def test_a_member_of_less_than_no_bytes_does_not_go_on_for_ever(tmp_path, jpeg):
    path = shard(tmp_path / "0.tar", [("a.jpg", jpeg)], tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" * 11 + b"\x00"  # the size of the first member: -256
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"0\.tar is damaged"):
        list(tars.shard_rows(path))
