"""Thumbnails are made once, upright, and never of another file."""

import io
import os

import photo_library
import pytest
from PIL import Image

from internvl.errors import BadImage
from internvl.search.scan import read_photo
from internvl.search.store import PhotoRow, Settings, Store
from internvl.search.thumbnails import draw, thumbnail


@pytest.fixture
def store(tmp_path):
    settings = Settings(str(tmp_path), "m", None, [], ["c"], "float16", 4, 8, {})
    with Store.create(tmp_path / "index", settings) as store:
        yield store


def photo_row(store, name):
    read = read_photo(store.root, name, 8, lambda digest: False)
    values = {key: value for key, value in vars(read).items() if key in PhotoRow.__annotations__}
    return PhotoRow(row=0, **values)


def test_a_thumbnail_is_small_upright_and_made_once(store):
    Image.new("RGB", (2000, 1000)).save(store.root / "wide.png")
    photo_library.dated_jpeg(store.root / "a.jpg", "2021:07:03 09:15:00", orientation=6)
    with Image.open(io.BytesIO(thumbnail(store, photo_row(store, "wide.png")))) as image:
        assert (image.size, image.format) == ((320, 160), "JPEG")
    row = photo_row(store, "a.jpg")
    with Image.open(io.BytesIO(thumbnail(store, row))) as image:
        assert image.size == (60, 80)
        assert image.getpixel((30, 5))[0] > 200
    files = {file: file.stat().st_mtime_ns for file in store.folder.rglob("*.jpg")}
    assert len(files) == 2
    (store.root / "a.jpg").unlink()
    assert thumbnail(store, row)  # kept, and not made again
    assert {file: file.stat().st_mtime_ns for file in store.folder.rglob("*.jpg")} == files


def test_an_index_that_cannot_be_written_shows_thumbnails_too(store, monkeypatch):
    Image.new("RGB", (20, 10)).save(store.root / "a.png")
    monkeypatch.setattr("os.access", lambda folder, mode: False)  # root may write everywhere
    with Image.open(io.BytesIO(thumbnail(store, photo_row(store, "a.png")))) as image:
        assert image.size == (20, 10)
    assert not [*store.folder.rglob("*.jpg")]


def test_a_file_that_changed_or_went_is_refused(store):
    Image.new("RGB", (20, 10)).save(store.root / "a.png")
    row = photo_row(store, "a.png")
    os.utime(store.root / "a.png", (1, 1))
    with pytest.raises(BadImage, match="has changed since; run `internvl index` again"):
        thumbnail(store, row)
    (store.root / "a.png").unlink()
    with pytest.raises(BadImage, match="no longer there"):
        thumbnail(store, row)
    assert not [*store.folder.rglob("*.jpg")]


def test_a_terminal_shows_two_pixels_a_character():
    image = Image.new("RGB", (8, 8), "red")
    image.paste("blue", (0, 4, 8, 8))
    upper, lower = draw(image, 4).splitlines()
    assert upper.count("▀") == lower.count("▀") == 4
    assert upper.startswith("\x1b[38;2;255;0;0;48;2;2")
    assert upper.endswith("\x1b[0m")
