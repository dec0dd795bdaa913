"""Labelled sets drawn in their published layouts: a few tiny images each."""

import base64
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from photos import photo
from PIL import Image

from internvl.datasets import labelled

SIZE = (24, 20)
# Written by scipy.io.savemat, compressed and not: three cars, three flowers of four.
MATLAB = {
    "annos": (
        "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFN1biBOb3YgMjkgMTg6MDc6"
        "MDIgMjAyNgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAA"
        "iAAAAHic42NgYOhgYmBgA9IcQAxkggErlM8IxMxQmhuIE/Py8ksSSzLz84qh6ljg6iSAOCkpvyK+wpAhOSexGKQi"
        "LS8xNxVI8wGxAQPCHk4s9sAwA9gdjAxyZOpjgupzQNLHgkUfJ5I+ASjfAAgM9bIK0qHi9HQ3I4XuNhogdzNT6G5j"
        "JHcDAAymGBQ="
    ),
    "meta": (
        "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFN1biBOb3YgMjkgMTg6MDc6"
        "MDIgMjAyNgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0OAAAA"
        "IAEAAAYAAAAIAAAAAQAAAAAAAAAFAAAACAAAAAEAAAADAAAAAQAAAAsAAABjbGFzc19uYW1lcwAAAAAADgAAAFAA"
        "AAAGAAAACAAAAAQAAAAAAAAABQAAAAgAAAABAAAAGgAAAAEAAAAAAAAAEAAAABoAAABBTSBHZW5lcmFsIEh1bW1l"
        "ciBTVVYgMjAwMAAAAAAAAA4AAABIAAAABgAAAAgAAAAEAAAAAAAAAAUAAAAIAAAAAQAAABMAAAABAAAAAAAAABAA"
        "AAATAAAAQWN1cmEgUkwgU2VkYW4gMjAxMgAAAAAADgAAADgAAAAGAAAACAAAAAQAAAAAAAAABQAAAAgAAAABAAAA"
        "BgAAAAEAAAAAAAAAEAAAAAcAAABBdWRpIMOpAA=="
    ),
    "labels": (
        "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFN1biBOb3YgMjkgMTg6MDc6"
        "MDIgMjAyNgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0OAAAA"
        "OAAAAAYAAAAIAAAACQAAAAAAAAAFAAAACAAAAAEAAAAEAAAAAQAAAAYAAABsYWJlbHMAAAIABAACAQID"
    ),
    "setid": (
        "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFN1biBOb3YgMjkgMTg6MDc6"
        "MDIgMjAyNgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAA"
        "KQAAAHic42NgYHAAYjYg5gBiPgYIYIXyGZEwSKykKC8zBUjzIMmDAABPFwK2DwAAACoAAAB4nONjYGBwAGI2IOYA"
        "Yj4GCGCF8hmRMEisLDEnMwVI80DlmaDqAU2cAqYPAAAAMAAAAHic42NgYHAAYjYg5gBibgYIYIXyGYGYGUqDxEqK"
        "SzJTgDQLVA8LUJYJSAMATuwCug=="
    ),
}


def draw(name: str, root: Path) -> list[tuple[int, ...]]:
    """Draws a set below the folder of the sets; returns the labels of its test images."""
    entry = labelled.find(name)
    assert entry is not None
    return DRAW[entry.name](root / entry.root)


def draw_shards(root: Path, labels: list[int], names: list[str]) -> None:
    """A set as CLIP_benchmark's webdataset shards: two tars."""
    (root / "test").mkdir(parents=True)
    (root / "test/nshards.txt").write_text("2")
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "zeroshot_classification_templates.txt").write_text("an image of {c}\n")
    for shard in range(2):
        with tarfile.open(root / f"test/{shard}.tar", "w") as tar:
            for index in range(shard, len(labels), 2):
                _add(tar, f"s{index:07d}.png", png(index))
                _add(tar, f"s{index:07d}.cls", str(labels[index]).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    """An encoded image, another for every seed."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _folders(root: Path, names: list[str], ending: str = ".jpg") -> list[tuple[int, ...]]:
    """An image for every class, a second one for the first class."""
    for index, name in enumerate(names):
        photo(root / name / f"a{ending}", index, SIZE)
    photo(root / names[0] / f"b{ending}", 99, SIZE)
    return [(0,), *((index,) for index in range(len(names)))]


def _numbers(count: int) -> list[str]:
    return [f"c{index:03d}" for index in range(count)]


def _synsets() -> list[str]:
    text = (Path(labelled.__file__).with_name("wnids.yaml")).read_text()
    return [word for word in text.split() if word.startswith("n") and word[1:].isdecimal()]


def _imagenet(folder: str, count: int, step: int) -> Callable[[Path], list[tuple[int, ...]]]:
    def draw_folders(root: Path) -> list[tuple[int, ...]]:
        labels = _folders(root / folder, sorted(_synsets()[::step][:count]), ".jpeg")
        # A subset has labels of its own; other folders are called by their place in ImageNet.
        return labels if count == 200 else [(label * step,) for (label,) in labels]

    return draw_folders


def _v2(root: Path) -> list[tuple[int, ...]]:
    folder = root / "ImageNetV2-matched-frequency"
    for label in (0, 7, 20, 999):
        photo(folder / f"{label}/x.jpeg", label, SIZE)
    return [(0,), (20,), (7,), (999,)]


def _objectnet(root: Path) -> list[tuple[int, ...]]:
    _folders(root / "objectnet-1.0/images", ["zebra_f", "basket_f", "unshared"], ".png")
    names = {"zebra_f": "Zebra", "basket_f": "Basket, woven", "unshared": "Bandage"}
    shared = {"Zebra": "zebra", "Basket, woven": "basket; hamper"}
    (root / "folder_to_objectnet_label.json").write_text(json.dumps(names))
    (root / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    return [(0,), (1,), (1,)]


def _cifar(folder: str, key: str, files: list[str], meta: str, names: str, count: int):
    def draw_batches(root: Path) -> list[tuple[int, ...]]:
        (root / folder).mkdir(parents=True)
        labels = [3, 1, 0, count - 1]
        for name in files:
            data = np.random.default_rng(7).integers(0, 256, (4, 3072), dtype=np.uint8)
            tree = {"batch_label": "x", key: labels, "data": data, "filenames": ["a", "b"]}
            (root / folder / name).write_bytes(pickle.dumps(tree, protocol=4))
        listed = {names: _numbers(count), "num_vis": 3072}
        (root / folder / meta).write_bytes(pickle.dumps(listed, protocol=2))
        return [(label,) for label in labels]

    return draw_batches


def _mnist(root: Path) -> list[tuple[int, ...]]:
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    head = struct.pack(">BBBBIII", 0, 0, 8, 3, 3, 28, 28)
    (folder / "t10k-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
    head = struct.pack(">BBBBI", 0, 0, 8, 1, 3)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(head + bytes([7, 0, 9]))
    return [(7,), (0,), (9,)]


def _stl(root: Path) -> list[tuple[int, ...]]:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    (folder / "test_X.bin").write_bytes(pixels.tobytes())
    (folder / "test_y.bin").write_bytes(bytes([10, 1]))
    (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in _numbers(10)))
    return [(9,), (0,)]


def _sun(root: Path) -> list[tuple[int, ...]]:
    classes = ["/a/abbey", "/b/bow_window/indoor", "/b/bow_window/outdoor"]
    (root / "SUN397").mkdir(parents=True)
    (root / "SUN397/ClassName.txt").write_text("\n".join(classes))
    for index, name in enumerate(classes):
        photo(root / f"SUN397{name}/sun_{index}.jpg", index, SIZE)
    return [(0,), (1,), (2,)]


def _aircraft(root: Path) -> list[tuple[int, ...]]:
    data = root / "fgvc-aircraft-2013b/data"
    for name in ("0001", "0002"):
        photo(data / f"images/{name}.jpg", int(name), SIZE)
    (data / "variants.txt").write_text("707-320\nA300B4\n")
    (data / "images_variant_test.txt").write_text("0001 A300B4\n0002 707-320\n")
    return [(1,), (0,)]


def _cars(root: Path) -> list[tuple[int, ...]]:
    folder = root / "stanford_cars"
    for index in range(1, 4):
        photo(folder / f"cars_test/{index:05d}.jpg", index, SIZE)
    (folder / "devkit").mkdir()
    (folder / "devkit/cars_meta.mat").write_bytes(base64.b64decode(MATLAB["meta"]))
    file = folder / "cars_test_annos_withlabels.mat"
    file.write_bytes(base64.b64decode(MATLAB["annos"]))
    return [(1,), (0,), (2,)]


def _flowers(root: Path) -> list[tuple[int, ...]]:
    folder = root / "flowers-102"
    for index in range(1, 5):
        photo(folder / f"jpg/image_{index:05d}.jpg", index, SIZE)
    (folder / "imagelabels.mat").write_bytes(base64.b64decode(MATLAB["labels"]))
    (folder / "setid.mat").write_bytes(base64.b64decode(MATLAB["setid"]))
    return [(2,), (1,), (0,)]


def _birds(root: Path) -> list[tuple[int, ...]]:
    lines = ["id\tcommon\tscientific\tdir", "1\tAcadian Flycatcher\tE. v.\tacadian_flycatcher"]
    lines += ["2\tWood Duck\tA. s.\twood_duck"]
    images = ["Wood_Duck/1.jpg", "Acadian_Flycatcher/2.jpg"]
    for index, name in enumerate(images):
        photo(root / name, index, SIZE)
    (root / "species.txt").write_text("".join(f"{line}\n" for line in lines))
    (root / "test_images_valid.txt").write_text("\n".join(["path", *images]))
    return [(1,), (0,)]


def _textures(root: Path) -> list[tuple[int, ...]]:
    folder = root / "dtd/dtd"
    images = ["banded/banded_1.jpg", "woven/woven_1.jpg", "dotted/dotted_1.jpg"]
    for index, name in enumerate(images):
        photo(folder / "images" / name, index, SIZE)
    (folder / "labels").mkdir()
    (folder / "labels/test1.txt").write_text("\n".join(images))
    return [(0,), (2,), (1,)]


def _food(root: Path) -> list[tuple[int, ...]]:
    by_class = {"waffles": ["waffles/1"], "apple_pie": ["apple_pie/2", "apple_pie/3"]}
    for names in by_class.values():
        for name in names:
            photo(root / f"food-101/images/{name}.jpg", int(name[-1]), SIZE)
    (root / "food-101/meta").mkdir()
    (root / "food-101/meta/test.json").write_text(json.dumps(by_class))
    return [(1,), (0,), (0,)]


def _signs(root: Path) -> list[tuple[int, ...]]:
    folder = root / "gtsrb/GTSRB/Final_Test/Images"
    photo(folder / "00000.ppm", 0, SIZE)
    photo(folder / "00001.ppm", 1, SIZE)
    text = "Filename;Width;Height;ClassId\n00000.ppm;24;20;16\n00001.ppm;24;20;42\n"
    (root / "gtsrb/GT-final_test.csv").write_text(text)
    return [(16,), (42,)]


def _pets(root: Path) -> list[tuple[int, ...]]:
    lines = ["# comment", "Abyssinian_2 1 1 1", "american_bulldog_1 2 2 1", "Abyssinian_1 1 1 1"]
    for index, line in enumerate(lines[1:]):
        photo(root / f"oxford-iiit-pet/images/{line.split()[0]}.jpg", index, SIZE)
    (root / "oxford-iiit-pet/annotations").mkdir()
    (root / "oxford-iiit-pet/annotations/test.txt").write_text("\n".join(lines))
    return [(0,), (1,), (0,)]


def _records(folder: str, file: str, count: int) -> Callable[[Path], list[tuple[int, ...]]]:
    def draw_records(root: Path) -> list[tuple[int, ...]]:
        (root / folder).mkdir(parents=True)
        rows = [_example(png(index), index % 3) for index in range(count)]
        half = count // 2
        for shard, part in enumerate((rows[:half], rows[half:])):
            framed = (struct.pack("<QI", len(row), 0) + row + b"\0\0\0\0" for row in part)
            (root / folder / f"{file}.tfrecord-0000{shard}-of-00002").write_bytes(b"".join(framed))
        (root / folder / "label.labels.txt").write_text("airplane\nsea_ice\nship\n")
        labels = [(index % 3,) for index in range(count)]
        return labels[8:] if file.endswith("train") else labels

    return draw_records


def _example(image: bytes, label: int) -> bytes:
    """A tf.train.Example; its label is packed in every other one."""

    def block(field: int, content: bytes) -> bytes:
        size, head = len(content), bytes([field << 3 | 2])
        while size >= 0x80:
            head += bytes([size & 0x7F | 0x80])
            size >>= 7
        return head + bytes([size]) + content

    number = block(1, bytes([label])) if label % 2 else bytes([8, label])
    entries = {b"image": block(1, block(1, image)), b"label": block(3, number)}
    features = b"".join(block(1, block(1, k) + block(2, v)) for k, v in entries.items())
    return block(1, features)


def _voc(multilabel: bool) -> Callable[[Path], list[tuple[int, ...]]]:
    def draw_voc(root: Path) -> list[tuple[int, ...]]:
        folder = root / "VOCdevkit/VOC2007"
        objects = {
            "000001": [("dog", (2, 2, 12, 14)), ("person", (5, 1, 20, 18))],
            "000002": [("cat", (1, 1, 9, 9)), ("cat", (3, 3, 24, 20))],
        }
        for name in ("Annotations", "ImageSets/Main"):
            (folder / name).mkdir(parents=True)
        for index, (name, boxes) in enumerate(objects.items()):
            photo(folder / f"JPEGImages/{name}.jpg", index, SIZE)
            nodes = "".join(
                f"<object><name>{label}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
                f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
                for label, (a, b, c, d) in boxes
            )
            (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{nodes}</annotation>")
        (folder / "ImageSets/Main/aeroplane_test.txt").write_text("000001 -1\n000002  0\n")
        return [(11, 14), (7,)] if multilabel else [(11,), (14,), (7,), (7,)]

    return draw_voc


def _below(folder: str, names: list[str]) -> Callable[[Path], list[tuple[int, ...]]]:
    return lambda root: _folders(root / folder, names)


_BATCHES = [f"data_batch_{index}" for index in range(1, 6)]
DRAW: dict[str, Callable[[Path], list[tuple[int, ...]]]] = {
    "imagenet1k": _imagenet("val", 3, 300),
    "imagenet1k-unverified": _imagenet("val", 3, 300),
    "imagenetv2": _v2,
    "imagenet_sketch": _imagenet(".", 4, 200),
    "imagenet-a": _imagenet(".", 200, 4),
    "imagenet-r": _imagenet(".", 200, 5),
    "imagenet-o": _imagenet(".", 200, 3),
    "objectnet": _objectnet,
    "cifar10": _cifar(
        "cifar-10-batches-py", "labels", ["test_batch"], "batches.meta", "label_names", 10
    ),
    "cifar100": _cifar(
        "cifar-100-python", "fine_labels", ["test"], "meta", "fine_label_names", 100
    ),
    "mnist": _mnist,
    "caltech101": _below("caltech101/101_ObjectCategories", _numbers(102)),
    "sun397": _sun,
    "fgvc_aircraft": _aircraft,
    "country211": _below("country211/test", _numbers(211)),
    "cars": _cars,
    "birdsnap": _birds,
    "dtd": _textures,
    "eurosat": _below("eurosat/2750", _numbers(10)),
    "fer2013": _below("test", _numbers(7)),
    "flowers": _flowers,
    "vtab-flowers": _records("oxford_flowers102/2.1.1", "oxford_flowers102-test", 6),
    "food101": _food,
    "gtsrb": _signs,
    "pets": _pets,
    "renderedsst2": _below("rendered-sst2/test", ["negative", "positive"]),
    "vtab-resisc45": _records("resisc45/3.0.0", "resisc45-train", 10),
    "stl10": _stl,
    "voc2007": _voc(False),
    "voc2007_multilabel": _voc(True),
}
"""Every set but pcam, whose files need h5py."""
