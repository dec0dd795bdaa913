"""Labelled sets, drawn in every published layout and as shards."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from labelled_trees import DRAW, draw, draw_shards, png
from PIL import Image

from internvl.data.images import read_rgb
from internvl.datasets import labelled
from internvl.datasets.labelled.readers import READERS
from internvl.errors import BadImage, ConfigError, UserError

CLASSES = {"objectnet": 2, "sun397": 3, "fgvc_aircraft": 2, "cars": 3, "birdsnap": 2, "dtd": 3}
CLASSES |= {"food101": 2, "pets": 2, "vtab-resisc45": 3, "vtab-flowers": 3}
"""Classes of drawn sets that say themselves which they have, and have fewer."""


def read(name: str, root: Path, **options: str) -> labelled.Labelled:
    entry = labelled.find(name)
    assert entry is not None
    return labelled.read(entry, labelled.folder_of(entry, root), **options)


@pytest.mark.parametrize("name", DRAW)
def test_every_layout(name: str, tmp_path: Path) -> None:
    labels = draw(name, tmp_path)
    rows = read(name, tmp_path)
    assert list(rows.labels) == labels
    entry = labelled.entries()[name]
    assert len(rows.classes) == CLASSES.get(name, entry.classes)
    assert len({read_rgb(image).tobytes() for image in rows.images[:5]}) == len(rows.images[:5])
    assert all("{c}" in template for template in rows.templates)


def test_every_reader_and_set_is_drawn() -> None:
    assert {*DRAW} == {*labelled.entries()} - {"pcam"}
    drawn = {labelled.entries()[name].reader for name in DRAW}
    assert drawn | {"shards", "pcam"} == {*READERS}


def test_pcam_needs_h5py(tmp_path: Path) -> None:
    (tmp_path / "pcam").mkdir()
    base = tmp_path / "pcam/camelyonpatch_level_2_split_test"
    try:
        import h5py
    except ModuleNotFoundError:
        for name in "xy":
            Path(f"{base}_{name}.h5").touch()
        with pytest.raises(ConfigError, match="pip install h5py"):
            read("pcam", tmp_path)
        return
    pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    for name, values in {"x": pixels, "y": np.array([1, 0]).reshape(2, 1, 1, 1)}.items():
        with h5py.File(f"{base}_{name}.h5", "w") as file:
            file[name] = values
    rows = read("pcam", tmp_path)
    assert (list(rows.labels), len(rows.classes)) == ([(1,), (0,)], 2)
    assert np.array_equal(read_rgb(rows.images[1]), pixels[1])


def test_names_as_the_original_has_them(tmp_path: Path) -> None:
    expected = {
        "pets": ["Abyssinian", "American Bulldog"],
        "food101": ["apple pie", "waffles"],
        "sun397": ["abbey", "bow window indoor", "bow window outdoor"],
        "objectnet": ["basket, woven", "zebra"],
        "birdsnap": ["Acadian Flycatcher", "Wood Duck"],
        "renderedsst2": ["negative", "positive"],
        "cars": ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi é"],
        "vtab-resisc45": ["airplane", "sea_ice", "ship"],
    }
    for name, classes in expected.items():
        draw(name, tmp_path / name)
        assert list(read(name, tmp_path / name).classes) == classes


@pytest.mark.parametrize(
    ("language", "count", "first"),
    [
        ("en", 80, "tench"),
        ("cn", 80, "丁鲷"),
        ("jp", 37, "テンチ"),
        ("it", 49, "una tinca"),
        ("ar", 55, None),
    ],
)
def test_imagenet_in_five_languages(
    language: str, count: int, first: str | None, tmp_path: Path
) -> None:
    draw("imagenet1k", tmp_path)
    rows = read("imagenet-1k", tmp_path, language=language)
    assert (len(rows.classes), len(rows.templates)) == (1000, count)
    assert first in (None, rows.classes[0])


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("imagenet-1k", "imagenet1k"),
        ("imagenet_a", "imagenet-a"),
        ("ImageNet-Sketch", "imagenet_sketch"),
        ("vtab/flowers", "vtab-flowers"),
        ("wds/vtab/resisc45", "vtab-resisc45"),
    ],
)
def test_spellings(typed: str, name: str) -> None:
    entry = labelled.find(typed)
    assert entry is not None
    assert entry.name == name


def test_no_two_sets_share_a_spelling() -> None:
    assert all(labelled.find(name) is entry for name, entry in labelled.entries().items())
    assert labelled.find("imagenet") is None


def test_shards(tmp_path: Path) -> None:
    draw_shards(tmp_path / "wds_cifar10", [2, 0, 1, 2], ["a", "b", "c"])
    rows = read("cifar10", tmp_path)
    assert (list(rows.classes), list(rows.templates)) == (["a", "b", "c"], ["an image of {c}"])
    # Shard by shard: images 0 and 2, then 1 and 3.
    assert list(rows.labels) == [(2,), (1,), (0,), (2,)]
    pixels = np.asarray(Image.open(io.BytesIO(png(2))))
    assert np.array_equal(read_rgb(rows.images[1]), pixels)


def test_raw_pixels_are_exact(tmp_path: Path) -> None:
    draw("cifar10", tmp_path)
    file = tmp_path / "cifar-10-batches-py/test_batch"
    data = pickle.loads(file.read_bytes())["data"]
    images = read("cifar10", tmp_path).images
    for row, image in zip(data, images, strict=True):
        assert np.array_equal(read_rgb(image), row.reshape(3, 32, 32).transpose(1, 2, 0))
    draw("voc2007", tmp_path)
    crop = read_rgb(read("voc2007", tmp_path).images[1])
    whole = np.asarray(Image.open(tmp_path / "VOCdevkit/VOC2007/JPEGImages/000001.jpg"))
    assert np.array_equal(crop, whole[1:18, 5:20])


def test_a_batch_that_python_2_pickled(tmp_path: Path) -> None:
    draw("cifar10", tmp_path)
    data = bytes(range(256)) * 24
    text = b"\x80\x02}q\x01(U\x04dataq\x02T" + len(data).to_bytes(4, "little") + data
    text += b"q\x03U\x06labelsq\x04]q\x05(K\x06K\x09eu."
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(text)
    rows = read("cifar10", tmp_path)
    assert list(rows.labels) == [(6,), (9,)]
    expected = np.frombuffer(data, np.uint8).reshape(2, 3, 32, 32)[1].transpose(1, 2, 0)
    assert np.array_equal(read_rgb(rows.images[1]), expected)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("mnist", "MNIST/raw/t10k-images-idx3-ubyte", b"\x1f\x8b gz", "no IDX file"),
        ("cifar10", "cifar-10-batches-py/test_batch", b"zip", "no pickle"),
        ("cifar10", "cifar-10-batches-py/test_batch", b"\x80\x02}.", "no batch of CIFAR"),
        ("cars", "stanford_cars/devkit/cars_meta.mat", b"x" * 200, "no MATLAB 5 file"),
        ("vtab-flowers", "oxford_flowers102/2.1.1/oxford_flowers102-test.tfrecord-00000-of-00002",
         b"\x05" * 8, "ends within a record"),
        ("gtsrb", "gtsrb/GT-final_test.csv", b"Filename;ClassId\n00000.ppm;43\n", "the label 43"),
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt", b"1 x\n", "'1 x'"),
        ("gtsrb", "gtsrb/GT-final_test.csv", b"Filename\n00000.ppm\n", "has no image or class"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte", b"\0\0\x08\x03abcd", "no IDX file"),
        ("mnist", "MNIST/raw/t10k-images-idx3-ubyte", b"\0\0\x08\x03ab", "within its head"),
        ("vtab-resisc45", "resisc45/3.0.0/label.labels.txt", b"\xff", "is not UTF-8"),
        ("pets", "oxford-iiit-pet/annotations/test.txt", b"a_1\n", "'a_1' has no class"),
        ("voc2007", "VOCdevkit/VOC2007/Annotations/000001.xml", b"<a", "no annotation of VOC"),
        ("dtd", "dtd/dtd/labels/test1.txt", b"\xff\xfe", "is not UTF-8"),
    ],
)  # fmt: skip
def test_damaged_files(name: str, file: str, content: bytes, message: str, tmp_path: Path) -> None:
    draw(name, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(name, tmp_path)


def test_missing_files_name_their_address(tmp_path: Path) -> None:
    for name, entry in labelled.entries().items():
        with pytest.raises(ConfigError) as caught:
            read(name, tmp_path)
        assert f"wds_{name}" in str(caught.value)
        assert entry.address in str(caught.value)


def test_what_a_set_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no language 'cn'; it has en"):
        read("cifar10", tmp_path, language="cn")
    with pytest.raises(ConfigError, match="has no split 'val'; it has test, train"):
        read("cifar10", tmp_path, split="val")
    draw("imagenet-a", tmp_path)
    (tmp_path / "imagenet-a/n01440764").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="has 199 folders, and the set has 200 classes"):
        read("imagenet-a", tmp_path)


def test_a_truncated_batch_costs_its_images(tmp_path: Path) -> None:
    draw("stl10", tmp_path)
    file = tmp_path / "stl10_binary/test_X.bin"
    file.write_bytes(file.read_bytes()[:-5])
    images = read("stl10", tmp_path).images
    assert read_rgb(images[0]).shape == (96, 96, 3)
    with pytest.raises(BadImage, match="truncated"):
        read_rgb(images[1])
