"""Which files are photos, and what is read from them."""

import os
from datetime import datetime

import photo_library
import pytest
from photos import photo

from internvl.search.scan import Scan, read_photo


def scanned(folder, skip="index"):
    scan = Scan(folder, folder / skip)
    return [entry.path for entry in scan.entries()], scan


def test_photos_of_all_subfolders_without_hidden_ones_and_the_index(tmp_path):
    names = ["b/c/a.JPG", "a.png", ".hidden.png", ".trash/x.png", "index/t.jpg", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    paths, scan = scanned(tmp_path)
    assert sorted(paths) == ["a.png", "b/c/a.JPG"]
    assert [line for line in scan.problems if "gone.png" in line]


def test_another_index_is_not_entered(tmp_path):
    """Its thumbnails would be photos."""
    for name in ("a.png", "old/index.json", "old/photos.db", "old/thumbnails/t.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert scanned(tmp_path)[0] == ["a.png"]


def test_names_that_are_no_text_cost_a_line(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    paths, scan = scanned(tmp_path)
    assert paths == []
    assert scan.problems == ["\\udcff.png: the name is not UTF-8; rename it"]


@pytest.mark.parametrize(
    ("written", "taken"),
    [
        ("2021:07:03 09:15:00", "2021-07-03T09:15:00"),
        ("0000:00:00 00:00:00", ""),
        ("yesterday", ""),
    ],
)
def test_dates_are_of_exif_else_of_the_file(tmp_path, written, taken):
    photo_library.dated_jpeg(tmp_path / "a.jpg", written)
    os.utime(tmp_path / "a.jpg", (1_000_000_000, 1_000_000_000))
    read = read_photo(tmp_path, "a.jpg", 16, lambda digest: False)
    expected = taken or datetime.fromtimestamp(1_000_000_000).isoformat()
    assert (read.taken, read.has_exif) == (expected, int(bool(taken)))


def test_photos_are_seen_upright(tmp_path):
    photo_library.dated_jpeg(tmp_path / "a.jpg", "2021:07:03 09:15:00", orientation=6)
    read = read_photo(tmp_path, "a.jpg", 16, lambda digest: False)
    assert (read.width, read.height) == (60, 80)
    top, bottom = read.pixels[:, 2, 8].tolist(), read.pixels[:, 13, 8].tolist()
    assert top[0] > 200 > 60 > top[2]  # red, which was on the left
    assert bottom[2] > 200 > 60 > bottom[0]


def test_a_known_content_is_not_decoded(tmp_path):
    photo(tmp_path / "a.png", 1)
    first = read_photo(tmp_path, "a.png", 16, lambda digest: False)
    second = read_photo(tmp_path, "a.png", 16, {first.digest}.__contains__)
    assert first.pixels.shape == (3, 16, 16)
    assert (second.pixels, second.digest, second.problem) == (None, first.digest, "")


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<html>")
    assert "a.png: " in read_photo(tmp_path, "a.png", 16, lambda digest: False).problem
    assert "gone.png" in read_photo(tmp_path, "gone.png", 16, lambda digest: False).problem
