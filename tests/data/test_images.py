"""Images as the original reads them; what cannot be read is named."""

import base64
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from chat_folders import GOLDEN
from data_files import SHARED, picture
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.torch import load_file

from internvl.config import TilesConfig
from internvl.data import images, tiles
from internvl.data.images import FileSlice, join_inside, open_rgb, read_rgb
from internvl.errors import BadImage
from internvl.models.vision import normalize_tiles

PIXELS = load_file(GOLDEN / "dynamic_tiles" / "images.safetensors")
BROKEN = SHARED / "data" / "broken"
ONE_TILE = TilesConfig(size=56, max=1)


def golden_image():
    return Image.fromarray(PIXELS["image0.pixels"].numpy())


@pytest.mark.parametrize("kind", images.STATISTICS)
@pytest.mark.parametrize("pad", [True, False])
def test_golden_whole_transforms(kind, pad):
    mean, std = images.STATISTICS[kind]
    config = TilesConfig(size=56, max=1, pad_square=pad)
    cut = tiles.tile_images([golden_image()], config, 1, mean=mean)
    suffix = "" if kind == "imagenet" else f".{kind}"
    wanted = PIXELS[f"image0.whole_{'pad2square' if pad else 'eval'}{suffix}"]
    found = normalize_tiles(cut.pixels, torch.float32, mean, std)[0]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_golden_tiles_normalized():
    cut = tiles.tile_images([golden_image()], TilesConfig(size=56, max=6), 6)
    found = normalize_tiles(cut.pixels, torch.float32)
    torch.testing.assert_close(found, PIXELS["image0.tiles_transformed"], atol=1e-6, rtol=0)


def test_golden_degradation_and_padding():
    degraded = images.degrade(golden_image(), 80)
    difference = np.asarray(degraded).astype(int) - PIXELS["image0.jpeg80"].numpy()
    assert abs(difference).max() <= 1
    square = images.pad_square(golden_image(), images.STATISTICS["imagenet"][0])
    assert np.array_equal(np.asarray(square), PIXELS["image0.expand2square"].numpy())


def test_augmentation_is_per_tile_and_repeats_with_its_seed():
    config = TilesConfig(size=56, max=6)

    def augmented(seed, config=config):
        draw = np.random.default_rng(seed)
        return tiles.tile_images([golden_image()], config, config.max, augment=draw).pixels

    plain = tiles.tile_images([golden_image()], config, 6).pixels
    draw = np.random.default_rng(3)
    qualities = [int(draw.integers(75, 101)) for _ in plain]
    assert len(set(qualities)) > 1
    assert torch.equal(augmented(3), tiles.degrade_tiles(plain, qualities))
    assert torch.equal(augmented(3), augmented(3))
    assert not torch.equal(augmented(3), augmented(4))
    # Without tiling: the whole image first, then the resize; padding is ignored.
    padded = TilesConfig(size=56, max=1, pad_square=True)
    assert torch.equal(augmented(3, padded), augmented(3, ONE_TILE))


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (300, 900), (900, 300), (50, 40)])
def test_torch_resize_is_near_pillow(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    config = TilesConfig(size=112, max=6)
    exact, fast = (
        tiles.tile_images([image], config, 6, resize=how).pixels for how in ("pillow", "torch")
    )
    difference = (exact.int() - fast.int()).abs()
    assert int(difference.max()) <= 2
    assert float(difference.float().mean()) <= 0.01


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_modes(tmp_path):
    gray = Image.linear_gradient("L").resize((32, 32))
    wide = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert np.array_equal(open_rgb(encoded(wide, "PNG")), open_rgb(encoded(gray, "PNG")))
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert open_rgb(encoded(red, "PNG")).getpixel((0, 0)) == (255, 0, 0)  # alpha is dropped
    with pytest.raises(BadImage, match="32 bits a channel; save it with 8"):
        open_rgb(encoded(Image.new("F", (8, 8)), "TIFF"))
    turned = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_rgb(encoded(turned, "JPEG", exif=exif)).size == (8, 4)  # as stored


def test_slices_and_missing_files(tmp_path):
    file = picture(tmp_path / "x.png", (30, 20))
    data = file.read_bytes()
    (tmp_path / "all").write_bytes(b"12345" + data + b"rest")
    part = FileSlice(str(tmp_path / "all"), 5, len(data), "0001.png")
    assert np.array_equal(open_rgb(part), open_rgb(file))
    assert np.array_equal(open_rgb(f"file://{file}"), open_rgb(file))
    for wrong, says in (
        (tmp_path / "no.png", "there is no image"),
        (tmp_path, "is a folder"),
        (b"", "is empty"),
        (b"<html>", "a web page"),
        (data[: len(data) // 2], "cannot be decoded"),
        (f"file://{tmp_path}/no.png", "there is no image file:"),
        ("memory://no.png", "there is nothing at"),
    ):
        with pytest.raises(BadImage, match=says):
            open_rgb(wrong)


@pytest.mark.parametrize(
    ("root", "path", "joined"),
    [
        ("/data", "a/b.jpg", "/data/a/b.jpg"),
        ("/data", "a/../b.jpg", "/data/b.jpg"),
        ("/data", "frames/", "/data/frames/"),
        ("/data", "/data/b.jpg", "/data/b.jpg"),
        ("s3://bucket/data", "a.jpg", "s3://bucket/data/a.jpg"),
        ("s3://bucket/data/", "s3://bucket/data/a.jpg", "s3://bucket/data/a.jpg"),
        ("/data", "../b.jpg", None),
        ("/data", "/etc/passwd", None),
        ("/data", "/database/b.jpg", None),
        ("s3://bucket/data", "../a.jpg", None),
        ("s3://bucket/data", "s3://other/a.jpg", None),
    ],
)
def test_paths_stay_inside(root, path, joined):
    if joined is None:
        with pytest.raises(BadImage, match="leaves the image folder"):
            join_inside(root, path)
    else:
        assert join_inside(root, path) == joined


def test_a_lost_image_may_be_there_in_another_spelling(tmp_path):
    for name in ("a.png", "caf\u00e9.png"):
        picture(tmp_path / name)
    for name, hint in (
        ("A.PNG", "; there is a.png in the folder, write it so"),
        ("cafe\u0301.png", "; there is caf\u00e9.png in the folder, write it so"),
        (r"sub\a.png", f"; its name has backslashes, as Windows has; write {tmp_path}/sub/a.png"),
        ("b.png", "; correct the name, or put the file there"),
        ("none/a.png", f"; there is no folder {tmp_path}/none either, correct the path"),
    ):
        with pytest.raises(BadImage) as caught:
            open_rgb(tmp_path / name)
        assert str(caught.value) == f"there is no image {tmp_path}/{name}{hint}"
    picture(tmp_path / "b.PNG")  # since the folder was listed
    with pytest.raises(BadImage, match=r"there is b\.PNG in the folder"):
        open_rgb(tmp_path / "b.png")
    picture(tmp_path / r"sub\a.png")
    assert open_rgb(tmp_path / r"sub\a.png").size


READ = (
    *("cmyk.jpg", "gray.jpg", "gray16.png", "rgb16.png", "palette_alpha.png", "rgba_gradient.png"),
    *("animated.gif", "animated.webp", "webp_named_jpg.jpg", "png_named_jpeg.jpeg"),
    *("extreme_1x4000.png", "no_extension", "name with spaces 中文 (1).jpg"),
    *("exif_orientation_3.jpg", "exif_orientation_6.jpg", "exif_orientation_8.jpg"),
    "exif_reference_upright.jpg",
)
NAMED = {
    "truncated_half.jpg": "truncated",
    "truncated_tail.jpg": "truncated",
    "truncated_header.jpg": "cannot be decoded",
    "zero_byte.jpg": "empty",
    "not_an_image.jpg": "a web page",
    "random_bytes.png": "not an image",
    "bomb_28000x28000.png": "exceeds the limit",
    "bomb_header_only.png": "exceeds the limit",
    "bad_crc.png": "cannot be decoded",
}
NO_IMAGES = 6  # annotation files and the README, which other tests read


@pytest.mark.skipif(not BROKEN.is_dir(), reason="no broken files here")
def test_every_broken_file_is_read_or_named():
    files = {file.name for file in BROKEN.iterdir()}
    assert files >= {*READ, *NAMED}
    assert len(files) == len(READ) + len(NAMED) + NO_IMAGES
    for name in READ:
        config = TilesConfig(size=28)
        cut = tiles.tile_images([open_rgb(BROKEN / name)], config, 12)
        assert np.array_equal(open_rgb(BROKEN / name), read_rgb(BROKEN / name))
        assert cut.pixels.float().std() > 0, name  # 16-bit gray is not all white
    for name, says in NAMED.items():
        for read in (open_rgb, read_rgb):
            with pytest.raises(BadImage, match=says):
                read(BROKEN / name)


@pytest.mark.skipif(not BROKEN.is_dir(), reason="no broken files here")
def test_bombs_stay_small():
    # Linux counts the process that started this one into ru_maxrss, but not into VmHWM.
    code = (
        "import re, sys; from internvl.data.images import *\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_rgb(path)\n"
        "    except BadImage: pass\n"
        "peak_kib = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "sys.exit(peak_kib > 2**20)"
    )
    bombs = [str(file) for file in BROKEN.glob("bomb*")]
    assert len(bombs) == 2
    assert subprocess.run([sys.executable, "-c", code, *bombs], check=False).returncode == 0


TILING = SHARED / "data" / "tiling"


@pytest.mark.skipif(not TILING.is_dir(), reason="no extreme images here")
@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("kitti_1242x375.jpg", (3, 1)),
        ("meadow_cube_2048x12288.jpg", (1, 6)),
        ("meadow_strip_220x3300.jpg", (1, 12)),
        ("one_pixel.png", (1, 1)),
        ("panorama_4096x2048.jpg", (4, 2)),
        ("panorama_strip_3000x600.jpg", (5, 1)),
        ("panorama_strip_4096x340.jpg", (12, 1)),
        ("tiny_37x25.png", (3, 2)),
        ("unsplash_landscape_4032x3024.jpg", (4, 3)),
        ("unsplash_portrait_1944x2592.jpg", (3, 4)),
    ],
)
def test_extreme_pictures(name, grid):
    image = open_rgb(TILING / name)
    assert tiles.choose_grids([image.size], TilesConfig(size=448), 12) == (grid,)
    columns, rows = grid
    pixels = tiles.cut(image, grid, tile_size=56, thumbnail=True)
    whole = np.asarray(image.resize((56 * columns, 56 * rows)))
    last = whole[(rows - 1) * 56 :, (columns - 1) * 56 :]
    assert np.array_equal(pixels[columns * rows - 1].permute(1, 2, 0).numpy(), last)


def test_whatever_holds_an_image_becomes_rgb(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    alpha = np.full((6, 9, 1), 7, np.uint8)
    gray = colors[:, :, :1]
    file = tmp_path / "x.png"
    Image.fromarray(colors).save(file)
    data = file.read_bytes()
    three = np.repeat(gray, 3, axis=2)
    palette = Image.fromarray(colors).quantize(4)
    wide = Image.fromarray(gray[:, :, 0].astype(np.uint16) * 257)
    for image, pixels in (
        *((file, colors), (str(file), colors), (data, colors), (bytearray(data), colors)),
        (FileSlice(str(file), 0, len(data), "x"), colors),
        (f"data:image/png;base64,{base64.b64encode(data).decode()}", colors),
        (io.BytesIO(data), colors),
        *((colors, colors), (gray, three), (gray[:, :, 0], three)),
        (np.concatenate([colors, alpha], 2), colors),
        *((colors[::-1], colors[::-1]), (np.asfortranarray(colors), colors)),
        (torch.from_numpy(colors).permute(2, 0, 1), colors),
        (torch.from_numpy(gray[:, :, 0].copy()), three),
        (Image.fromarray(colors), colors),
        (Image.fromarray(colors).convert("RGBA"), colors),
        *((palette, palette.convert("RGB")), (wide, three), (Image.open(file), colors)),
        (Image.fromarray(gray[:, :, 0]), three),
        (Image.new("1", (9, 6), 1), np.full((6, 9, 3), 255)),
    ):
        assert np.array_equal(images.as_rgb(image), pixels), type(image)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((6, 9, 3), np.float32), "holds uint8 from 0 to 255, not float32"),
        (np.zeros((6, 9, 3), bool), "not bool"),
        (torch.zeros(3, 6, 9), "as tensor holds uint8 from 0 to 255, not float32"),
        (np.zeros((2, 6, 9, 3), np.uint8), r"not \(2, 6, 9, 3\)"),
        (np.zeros((3, 6, 9), np.uint8), r"or \(H, W, C\) with C of 1, 3 or 4, not \(3, 6, 9\)"),
        (torch.zeros(6, 9, 3, dtype=torch.uint8), r"\(C, H, W\) .*, not \(6, 9, 3\)"),
        (np.zeros(5, np.uint8), r"not \(5,\)"),
        (np.zeros((0, 9, 3), np.uint8), "9 x 0 pixels is empty"),
        (Image.new("F", (3, 3)), "32 bits a channel"),
        (Image.new("RGB", (0, 3)), "is empty"),
        (None, "not NoneType"),
        ("", "^the path of the image is empty; write the file's name"),
        ("data:image/png;base64,é", "^an image is not base64"),
        ("data:image/png;base64,aGVsbG8=", "^not an image Pillow knows; replace it$"),
        (["x.png"], "not list"),
    ],
)
def test_what_is_no_image_is_refused(image, says):
    with pytest.raises(BadImage, match=says):
        images.as_rgb(image)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12\n"
OTHER_FILES = [
    (LFS, "a Git LFS pointer instead of the file: run `git lfs pull` in its folder"),
    (b"\n<!DOCTYPE HTML>\n<html>Login</html>", "a web page, such as a login or an error: download"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "a HEIC image: convert it to JPEG or PNG"),
    (b"\0\0\0\x18ftypmif1\0\0\0\0heic", "a HEIC image: convert it to JPEG or PNG"),
    (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "a JPEG XL image: convert it to JPEG or PNG"),
    (b"\xff\x0a" + bytes(range(64)), "a JPEG XL image: convert it to JPEG or PNG"),
    (b"<?xml version='1.0'?>\n<svg/>", "an SVG drawing: save it as PNG"),
    (b"<?xml version='1.0'?>\n<Error/>", "an XML answer, such as a server's error: download it"),
    (b'{"error": "no such key"}', "JSON, such as a server's error: download it again"),
    (b"\0\0\0\x18ftypisom\0\0\0\0", "a video (MP4 or QuickTime), not an image: name it as a video"),
    (bytes(2000), "nothing but zero bytes where its content should begin: download it again"),
    (b"hello, world", "not an image Pillow knows; replace the file"),
]


@pytest.mark.parametrize(("data", "says"), OTHER_FILES)
def test_what_is_another_file_is_named_as_such(tmp_path, data, says):
    """As a file, as bytes, in a tar."""
    file = tmp_path / "a.png"
    file.write_bytes(b"before" + data)
    in_tar = FileSlice(str(file), 6, len(data), "0001.png")
    with pytest.raises(BadImage) as caught:
        open_rgb(in_tar)
    again = "" if "replace the file" in says else ", then write the tar again"
    assert str(caught.value).startswith(f"0001.png in {file}: {says}")
    assert str(caught.value).endswith(again)
    file.write_bytes(data)
    with pytest.raises(BadImage) as caught:
        open_rgb(str(file))
    assert str(caught.value).startswith(f"{file}: {says}")
    with pytest.raises(BadImage) as caught:
        images.as_rgb(data)
    assert str(caught.value).startswith(
        says.replace("the file", "it") if "Pillow" in says else says
    )


UPRIGHT = np.random.default_rng(5).integers(0, 256, (40, 64, 3), dtype=np.uint8)
# Stored pixels for every orientation, by numpy alone: rows then columns of the upright image.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: UPRIGHT.swapaxes(0, 1)[::-1],
    7: UPRIGHT[::-1, ::-1].swapaxes(0, 1),
    8: UPRIGHT.swapaxes(0, 1)[:, ::-1],
}


def with_orientation(form, orientation, pixels=None):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    image = Image.fromarray(STORED[orientation] if pixels is None else pixels)
    return encoded(image, form, exif=exif, **options)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_ignored_or_applied(form, orientation):
    data = with_orientation(form, orientation)
    stored = open_rgb(data)
    assert np.array_equal(stored, read_rgb(data))
    assert stored.size == STORED[orientation].shape[1::-1]
    for upright in (open_rgb(data, "apply"), read_rgb(data, "apply"), images.as_rgb(data, "apply")):
        assert np.array_equal(upright, images.as_rgb(Image.open(io.BytesIO(data)), "apply"))
        if form == "JPEG":
            assert np.asarray(upright).shape == UPRIGHT.shape
        else:
            assert np.array_equal(upright, UPRIGHT)
    if form != "JPEG":
        assert np.array_equal(stored, STORED[orientation])


def test_jpeg_is_turned_as_pillow_turns_it():
    smooth = Image.fromarray(UPRIGHT[:5, :8]).resize((64, 40))
    for orientation in STORED:
        data = with_orientation("JPEG", orientation, np.asarray(smooth))
        with Image.open(io.BytesIO(data)) as image:
            theirs = ImageOps.exif_transpose(image)
        assert np.array_equal(read_rgb(data, "apply"), theirs)


def test_tiff_is_turned_once():
    # Pillow turns a TIFF when it loads it, so that both ways give the upright image.
    data = with_orientation("TIFF", 6)
    for exif in ("ignore", "apply"):
        assert np.array_equal(open_rgb(data, exif), UPRIGHT)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40, b"x"]
)
def test_a_damaged_exif_block_turns_nothing(block):
    plain = Image.fromarray(UPRIGHT)
    data = encoded(plain, "JPEG", exif=block, quality=95)
    assert np.array_equal(read_rgb(data, "apply"), read_rgb(encoded(plain, "JPEG", quality=95)))
    for orientation in (0, 9, 300, 65535):
        odd = with_orientation("PNG", orientation, UPRIGHT)
        assert np.array_equal(read_rgb(odd, "apply"), UPRIGHT)


def raising(error):
    def load(*args, **options):
        raise error

    return load


@pytest.mark.parametrize(
    "error",
    [
        *(RuntimeError("x"), NotImplementedError("x"), AttributeError("x"), KeyError(7)),
        *(IndexError(), EOFError("x"), OverflowError("x"), AssertionError(), MemoryError()),
        *(struct.error("x"), zlib.error("x"), RecursionError("x"), TypeError("x"), OSError("x")),
        *(SyntaxError("x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), Warning("x")),
    ],
)
def test_whatever_a_decoder_raises_names_the_file(monkeypatch, tmp_path, error):
    file = picture(tmp_path / "x.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", raising(error))
    for read in (open_rgb, read_rgb, images.as_rgb):
        with pytest.raises(BadImage, match=r"x\.png: the image cannot be decoded \(.+\); replace"):
            read(file)
    with pytest.raises(BadImage, match=r"^the image cannot be decoded \(.+\); replace it$"):
        images.as_rgb(Image.open(file))


@pytest.mark.parametrize("name", ["check_size", "_file", "_upright", "name_of", "check_file"])
def test_a_mistake_of_our_own_is_seen(monkeypatch, tmp_path, name):
    file = picture(tmp_path / "x.png")
    monkeypatch.setattr(images, name, raising(KeyError("planted")))
    with pytest.raises(KeyError, match="planted"):
        open_rgb(file)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    picture(tmp_path / "file.png")
    for path, says in (
        (tmp_path / "pipe.png", r"the image .*pipe\.png is a pipe or a device, not a file"),
        ("/dev/zero", "the image /dev/zero is a pipe or a device"),
        ("file:///dev/zero", "the image file:///dev/zero is a pipe or a device"),
        (tmp_path / "file.png" / "x", "there is no image"),
        (str(tmp_path / "x\0y"), "cannot be read"),
        (str(tmp_path / "\ud83d"), r"cannot be read|there is no image .*\\ud83d"),
        ("n" * 5000, "nn…: the image cannot be read"),
        (
            FileSlice(str(tmp_path / "no.tar"), 0, 5, "1.jpg"),
            r"there is no image 1\.jpg in .*no\.tar",
        ),
        (FileSlice(str(tmp_path / "file.png"), 9, 10**6, "1.jpg"), "ends within this image"),
    ):
        with pytest.raises(BadImage, match=says) as caught:
            open_rgb(path)
        str(caught.value).encode()  # can be printed


def test_a_program_is_not_run(monkeypatch):
    data = encoded(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(BadImage, match="EPS is not read; save the image as PNG"):
        open_rgb(data)


def damaged(data, draw):
    """A few bytes of a file changed, taken out or put in; by chance its end cut off."""
    data = bytearray(data)
    for _ in range(int(draw.integers(1, 5))):
        at = int(draw.integers(len(data))) if draw.random() < 0.5 else int(draw.integers(64))
        how = int(draw.integers(5))
        if how < 2:
            data[at : at + 1] = bytes(draw.integers(0, 256, 1, dtype=np.uint8))
        elif how == 2:
            data[at : at + 4] = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff")[draw.integers(3)]
        elif how == 3:
            del data[at : at + int(draw.integers(1, 40))]
        elif draw.random() < 0.3:
            del data[max(at, 1) :]
    return bytes(data) or b"\0"


def files_of_every_format():
    small = Image.fromarray(UPRIGHT[:24, :20])
    Image.init()
    for form in sorted(Image.SAVE.keys() - {"PDF", "EPS", "IM"}):  # IM is deprecated
        for mode in ("RGB", "L", "P"):
            try:
                yield form, encoded(small.convert(mode), form)
            except (OSError, ValueError, RuntimeError):  # not every format takes every mode
                continue


def test_damaged_files_of_every_format_are_read_or_named(tmp_path):
    draw, file = np.random.default_rng(14), tmp_path / "x"
    files = list(files_of_every_format())
    assert {"PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "TGA", "DDS"} <= dict(files).keys()
    num_read, sentences = 0, []
    for _form, data in files * 3:
        bad = damaged(data, draw)
        file.write_bytes(bad)
        for read, source in ((read_rgb, file), (open_rgb, bad)):
            try:
                num_read += np.asarray(read(source, "apply")).shape[2] == 3
            except BadImage as error:
                sentences.append((source is file, str(error)))
    assert num_read > 20
    assert len(sentences) > 20
    assert all(sentence.startswith(f"{file}: ") for named, sentence in sentences if named)


CASES = SHARED / "cases" / "damaged-avif"


@pytest.mark.skipif(not CASES.is_dir(), reason="no damaged AVIF here")
def test_damaged_avif_and_dds_are_named():
    files = [file for file in CASES.iterdir() if file.name != "README"]
    assert len(files) > 10
    for file in files:
        for read in (open_rgb, read_rgb):
            with pytest.raises(BadImage, match=file.name):
                read(file)
