"""The compiled resizes equal Pillow's and torch's, pixel by pixel."""

import itertools
import math
import multiprocessing
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from internvl.config import TilesConfig
from internvl.data import resample, tiles


@pytest.fixture(scope="module", autouse=True)
def _compile_at_once():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resample, "_COMPILE_AFTER", 0)
        yield


@pytest.fixture(scope="module", params=["pillow", "torch"])
def how(request):
    return request.param


@pytest.fixture(scope="module")
def resize(how):
    pytest.importorskip("numba")
    found = compiled(how)
    assert found is not None, f"this {how} resizes in another way"
    return found


def compiled(how):
    """What `compiled_resize` returns once its thread has ended."""
    resample.compiled_resize(448, 448, how)
    resample._compilations[how].join()
    return resample.compiled_resize(448, 448, how)


def slow(picture, width, height, how):
    """The same by Pillow or torch itself, uint8 (height, width, 3)."""
    if how == "pillow":
        return np.asarray(Image.fromarray(picture).resize((width, height)))
    return resample.resize_by_torch(picture, width, height).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((640, 480), (3, 2)),
        ((480, 640), (1, 1)),
        ((480, 640), (2, 3)),
        ((37, 25), (3, 2)),
        ((4000, 300), (12, 1)),
        ((220, 3300), (1, 12)),
        ((112, 112), (2, 1)),
        ((1, 1), (2, 1)),
        ((1, 900), (1, 6)),
        ((449, 900), (2, 1)),
    ],
)
def test_it_equals_the_slow_one(resize, how, size, grid):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    (columns, rows), side = grid, 56
    found = np.empty((rows, columns, 3, side, side), dtype=np.uint8)
    resize(noise, found)
    whole = slow(noise, columns * side, rows * side, how)
    wanted = whole.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    assert np.array_equal(found, wanted)


def test_random_sizes(resize, how):
    draw = np.random.default_rng(1)
    for width, height, to_width, to_height in draw.integers(10, 200, (60, 4)).tolist():
        noise = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        side = math.gcd(to_width, to_height)
        found = np.empty((to_height // side, to_width // side, 3, side, side), dtype=np.uint8)
        resize(noise, found)
        wanted = slow(noise, to_width, to_height, how)
        joined = found.transpose(0, 3, 1, 4, 2).reshape(to_height, to_width, 3)
        assert np.array_equal(joined, wanted), (width, height, to_width, to_height)


def test_the_order_of_passes():
    draw = np.random.default_rng(2)
    height_first = 0
    for width, height, to_width, to_height in draw.integers(10, 200, (60, 4)).tolist():
        noise = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture, size = Image.fromarray(noise), (to_width, to_height)
        first = resample.height_first(picture.size, size)
        between = (width, to_height) if first else (to_width, height)
        in_two = picture.resize(between).resize(size)
        assert np.array_equal(picture.resize(size), in_two), (picture.size, size)
        height_first += first
    assert (height_first > 0) == resample._may_begin_with_height()


def test_another_order_of_passes_is_noticed(monkeypatch):
    pytest.importorskip("numba")
    found = resample._may_begin_with_height()
    monkeypatch.setattr(resample, "_may_begin_with_height", lambda: not found)
    assert resample._checked_resize("pillow") is None


def test_tiles_are_the_same_with_and_without(resize, how, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    config = TilesConfig(size=224, max=6)
    with_numba = tiles.tile_images([image], config, 6, resize=how)
    monkeypatch.setattr(resample, "compiled_resize", lambda width, height, how: None)
    without = tiles.tile_images([image], config, 6, resize=how)
    assert torch.equal(with_numba.pixels, without.pixels)


def test_a_few_pictures_are_not_worth_compiling_for(resize, how, monkeypatch):
    monkeypatch.setattr(resample, "_num_resizes", itertools.count())
    monkeypatch.setattr(resample, "_COMPILE_AFTER", 2)
    found = [resample.compiled_resize(448, 448, how) is not None for _ in range(3)]
    assert found == [False, False, True]


def test_nobody_waits_for_the_compilation(monkeypatch):
    may_end, begun = threading.Event(), []

    def checked_resize(how):
        begun.append(how)
        may_end.wait()
        return "a resize"

    monkeypatch.setattr(resample, "_compilations", {})
    monkeypatch.setattr(resample, "_checked_resize", checked_resize)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: resample.compiled_resize(448, 448, "pillow"), range(8))
        assert [*found] == [None] * 8
    may_end.set()
    assert compiled("pillow") == "a resize"
    assert begun == ["pillow"]


def test_a_fork_waits_for_the_compilation(monkeypatch):
    def checked_resize(how):
        time.sleep(0.2)
        return "a resize"

    monkeypatch.setattr(resample, "_compilations", {})
    monkeypatch.setattr(resample, "_checked_resize", checked_resize)
    assert resample.compiled_resize(448, 448, "pillow") is None
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=lambda: theirs.send(resample.compiled_resize(448, 448, "pillow"))
    )
    process.start()
    assert ours.recv() == "a resize"
    process.join()


def test_without_numba_or_for_small_pictures_the_slow_one_does_it(monkeypatch):
    assert resample.compiled_resize(64, 64, "pillow") is None
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(resample, "_compilations", {})
    assert compiled("pillow") is None


def test_a_broken_numba_is_one_sentence_and_the_slow_one_does_it(monkeypatch, caplog):
    def njit(**options):
        raise OSError("libllvmlite.so: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "numba", types.SimpleNamespace(njit=njit))
    monkeypatch.setattr(resample, "_compilations", {})
    with caplog.at_level("WARNING"):
        assert compiled("pillow") is None
    (record,) = caplog.records
    assert "numba cannot compile the resize (OSError: libllvmlite.so" in record.getMessage()
