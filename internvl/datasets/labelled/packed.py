"""Readers of sets whose images lie together in larger files: batches, arrays, shards."""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from internvl.data.images import FileSlice
from internvl.datasets.labelled.formats import (
    RawImage,
    StackedImage,
    idx_shape,
    read_examples,
    read_idx_labels,
    read_pickled_lists,
)
from internvl.datasets.labelled.source import ENDINGS, Read, Source, lines_of
from internvl.errors import ConfigError, DataError

_CHANNELS_LAST = (1, 2, 0)


def read_mnist(source: Source) -> Read:
    """Reads MNIST's IDX files."""
    path = source.path(f"MNIST/raw/{source.split}-images-idx3-ubyte")
    shape, start = idx_shape(path, 3)
    count, height, width = shape
    labels = read_idx_labels(source.path(f"MNIST/raw/{source.split}-labels-idx1-ubyte"))
    images = _rows(path, start, count, (height, width), (0, 1))
    return Read(images, [(label,) for label in labels])


def read_cifar(source: Source) -> Read:
    """Reads CIFAR's pickled batches: rows of 3,072 bytes, channels first."""
    folder, _, batches = source.split.partition("/")
    images: list[str | FileSlice] = []
    labels: list[tuple[int, ...]] = []
    for batch in batches.split(","):
        path = source.path(f"{folder}/{batch}")
        # The pixels stay in the file: an image is where its row begins.
        lists, (start, size) = read_pickled_lists(path)
        batch_labels = lists.get(source.options["labels"], [])
        # Another pickle may have lists too.
        if not batch_labels or size != len(batch_labels) * 3072:
            raise DataError(f"{path} is no batch of CIFAR; fetch it again from {source.address}")
        images += _rows(path, start, len(batch_labels), (3, 32, 32), _CHANNELS_LAST)
        labels += [(label,) for label in batch_labels]
    meta = source.path(f"{folder}/{source.options['meta']}")
    lists, _ = read_pickled_lists(meta)
    if source.options["names"] not in lists:
        raise DataError(f"{meta} has no names of classes; fetch it again from {source.address}")
    return Read(images, labels, lists[source.options["names"]])


def read_stl(source: Source) -> Read:
    """Reads STL-10's arrays: columns before rows, labels from 1 on."""
    path = source.path(f"stl10_binary/{source.split}_X.bin")
    labels = [*source.path(f"stl10_binary/{source.split}_y.bin").read_bytes()]
    images = _rows(path, 0, len(labels), (3, 96, 96), (2, 1, 0))
    names = source.lines("stl10_binary/class_names.txt")
    return Read(images, [(label - 1,) for label in labels], names)


def read_pcam(source: Source) -> Read:
    """Reads PatchCamelyon's HDF5 files."""
    base = f"pcam/camelyonpatch_level_2_split_{source.split}"
    path, labels_path = source.path(f"{base}_x.h5"), source.path(f"{base}_y.h5")
    # Here: no other set needs it, and no extra installs it.
    try:
        import h5py  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError:
        raise ConfigError(
            f"{source.name}: its HDF5 files need h5py (pip install h5py); its webdataset shards "
            "need nothing"
        ) from None
    with h5py.File(labels_path) as file:
        labels = [(int(label),) for label in np.asarray(file["y"]).reshape(-1)]
    images = [StackedImage(str(path), 0, 0, f"image {i}", i) for i in range(len(labels))]
    return Read(images, labels)


def read_records(source: Source) -> Read:
    """Reads the TFRecord files that tensorflow_datasets prepares."""
    name, _, split = source.split.partition("/")
    split, _, share = split.partition("[")
    # At any version: a folder holds the one that was prepared.
    files = sorted(source.path(name).glob(f"*/{name}-{split}.tfrecord*"))
    if not files:
        raise ConfigError(
            f"{source.name}: {source.root / name} has no {name}-{split}.tfrecord files: from "
            f"{source.address}"
        )
    images: list[str | FileSlice] = []
    labels: list[tuple[int, ...]] = []
    for file in files:
        for example in read_examples(file):
            if not {"image", "label"} <= example.keys():
                raise DataError(f"{file}: a record lacks an image or a label; fetch it again")
            offset, size = example["image"]
            images.append(FileSlice(str(file), offset, size, f"image {len(images)}"))
            labels.append((example["label"],))
    # VTAB cuts its test split of RESISC45 out of the only one.
    start, end = _percent(share, len(images))
    # Class names beside the records; the package has those of flowers.
    names = files[0].with_name("label.labels.txt")
    classes = lines_of(names) if names.exists() else []
    return Read(images[start:end], labels[start:end], classes)


def _percent(share: str, count: int) -> tuple[int, int]:
    """Returns the rows of "80%:]" or ":80%]", as tensorflow_datasets rounds them."""
    first, _, last = share.rstrip("]").partition(":")
    bounds = [
        int(text.rstrip("%")) if text else default for text, default in ((first, 0), (last, 100))
    ]
    return round(count * bounds[0] / 100), round(count * bounds[1] / 100)


def read_shards(source: Source) -> Read:
    """Reads webdataset shards as CLIP_benchmark exports them: SPLIT/0.tar, SPLIT/1.tar, …"""
    text = source.path(f"{source.split}/nshards.txt").read_text(encoding="utf-8").strip()
    if not text.isdecimal():
        raise DataError(f"{source.root / source.split}/nshards.txt: no number of shards")
    images: list[str | FileSlice] = []
    labels: list[tuple[int, ...]] = []
    for shard in range(int(text)):
        path = source.path(f"{source.split}/{shard}.tar")
        for image, label in _samples(path):
            images.append(image)
            labels.append(label)
    names, templates = (
        source.lines(file) if (source.root / file).exists() else ()
        for file in ("classnames.txt", "zeroshot_classification_templates.txt")
    )
    return Read(images, labels, names, templates)


def _samples(path: Path) -> list[tuple[FileSlice, tuple[int, ...]]]:
    """Returns the images of a shard with their labels, from .cls or, of several classes, .npy."""
    slices: dict[str, FileSlice] = {}
    labels: dict[str, tuple[int, ...]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # The stem ends at the first dot, as in webdataset.
                key, _, ending = member.name.partition(".")
                if f".{ending.lower()}" in ENDINGS:
                    slices[key] = FileSlice(str(path), member.offset_data, member.size, member.name)
                elif ending in ("cls", "npy"):
                    content = tar.extractfile(member)
                    assert content is not None  # a member with these endings is a file
                    labels[key] = _label(content.read(), ending)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path}: no shard of labelled images ({error}); fetch it again") from None
    unlabelled = [key for key in slices if key not in labels]
    if unlabelled:
        raise DataError(f"{path}: {unlabelled[0]} has no label (.cls); fetch it again")
    return [(image, labels[key]) for key, image in slices.items()]


def _label(content: bytes, ending: str) -> tuple[int, ...]:
    if ending == "cls":
        return (int(content),)
    # One flag for each class.
    flags = np.load(io.BytesIO(content), allow_pickle=False)
    return tuple(int(index) for index in np.flatnonzero(flags))


def _rows(
    path: Path, start: int, count: int, shape: tuple[int, ...], axes: tuple[int, ...]
) -> list[str | FileSlice]:
    """Returns images that lie one after another."""
    size = int(np.prod(shape))
    return [
        RawImage(str(path), start + index * size, size, f"image {index}", shape, axes)
        for index in range(count)
    ]


PACKED: Mapping[str, Callable[[Source], Read]] = {
    "mnist": read_mnist,
    "cifar": read_cifar,
    "stl": read_stl,
    "pcam": read_pcam,
    "records": read_records,
    "shards": read_shards,
}
"""Reader of an entry's `reader` -> its function."""
