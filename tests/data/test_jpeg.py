"""JPEG files decoded by simplejpeg are Pillow's pixels; what it does not take, Pillow reads."""

import functools
import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from internvl.data import jpeg
from internvl.data.images import FileSlice, open_rgb, read_rgb
from internvl.errors import BadImage


@pytest.fixture
def simplejpeg():
    found = pytest.importorskip("simplejpeg")
    assert jpeg._checked_module() is found, "it decodes in another way than this Pillow"
    return found


@pytest.fixture
def checked_anew():
    jpeg._checked_module.cache_clear()
    yield
    jpeg._checked_module.cache_clear()


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(width, height, mode="RGB"):
    """Neither flat nor mere noise."""
    draw = np.random.default_rng(width * height)
    coarse = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height))).astype(np.int16)
    noisy = smooth + draw.integers(-9, 10, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_colour_equals_pillow(simplejpeg, sampling, progressive):
    for width, height in ((1, 1), (3, 2), (8, 8), (16, 33), (101, 57), (640, 427)):
        for quality in (30, 95):
            options = {"subsampling": sampling, "progressive": progressive, "quality": quality}
            data = encoded(photo(width, height), **options)
            found = jpeg.decode(data)
            assert found.shape == (height, width, 3)
            assert np.array_equal(found, open_rgb(data)), (width, height, quality)


def test_gray_and_what_surrounds_a_picture(simplejpeg, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo(50, 20), exif=exif, comment=b"hello", dpi=(72, 72))
    assert jpeg.decode(data).shape == (20, 50, 3)  # as stored
    assert np.array_equal(jpeg.decode(data + b"something behind it"), open_rgb(data))
    gray = encoded(photo(33, 21, "L"))
    assert np.array_equal(jpeg.decode(gray), open_rgb(gray))
    (tmp_path / "all").write_bytes(b"12345" + data + gray)
    part = FileSlice(str(tmp_path / "all"), 5 + len(data), len(gray), "0001.jpg")
    assert np.array_equal(read_rgb(part), open_rgb(gray))
    (tmp_path / "x.jpg").write_bytes(data)
    assert np.array_equal(read_rgb(tmp_path / "x.jpg"), open_rgb(data))


def test_the_rest_is_left_to_pillow(simplejpeg):
    data = encoded(photo(64, 48))
    for other in (
        encoded(photo(64, 48, "CMYK")),
        encoded(photo(64, 48), keep_rgb=True),  # marked as RGB by Adobe's marker
        encoded(photo(64, 48), "PNG"),
    ):
        assert jpeg.decode(other) is None
        assert np.array_equal(read_rgb(other), open_rgb(other))
    middle = data[: len(data) // 2]
    for bad in (middle, data[:-2], data[:30], b"", b"<html>", b"\xff\xd8\xff\xe0"):
        assert jpeg.decode(bad) is None
        sentences = []
        for read in (open_rgb, read_rgb):
            with pytest.raises(BadImage) as caught:
                read(bad)
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1]
    # Flawed data that Pillow puts up with.
    flawed = bytearray(data)
    flawed[len(flawed) // 2 : len(flawed) // 2 + 4] = b"\x12\x34\x56\x78"
    assert np.array_equal(read_rgb(bytes(flawed)), open_rgb(bytes(flawed)))


def test_without_simplejpeg(monkeypatch, checked_anew):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    data = encoded(photo(64, 48))
    assert jpeg.decode(data) is None
    assert np.array_equal(read_rgb(data), open_rgb(data))


def test_a_decoder_that_differs_is_not_used(simplejpeg, monkeypatch, checked_anew):
    other = types.ModuleType("simplejpeg")
    other.decode_jpeg_header = simplejpeg.decode_jpeg_header
    other.decode_jpeg = functools.partial(simplejpeg.decode_jpeg, fastdct=True)
    monkeypatch.setitem(sys.modules, "simplejpeg", other)
    assert jpeg.decode(encoded(photo(64, 48))) is None
