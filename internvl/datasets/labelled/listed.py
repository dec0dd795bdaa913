"""Readers of sets whose images are files: folders of classes, or lists of names and labels."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from internvl.data.json_rows import read_json
from internvl.datasets.labelled.formats import Crop, read_mat
from internvl.datasets.labelled.source import Read, Source, files_in
from internvl.errors import DataError, UserError


def read_folders(source: Source) -> Read:
    """Reads a folder of images for each class; classes are in the order of the sorted folders."""
    folders = source.folders(source.path(source.split))
    if source.names and len(folders) != len(source.names):
        raise UserError(
            f"{source.name}: {folders[0].parent} has {len(folders)} folders, and the set has "
            f"{len(source.names)} classes; fetch it again from {source.address}"
        )
    return _of_folders(folders, range(len(folders)), [folder.name for folder in folders])


def read_numbered(source: Source) -> Read:
    """Reads folders that are called by their label: 0, 1, …, 999."""
    folders = source.folders(source.path(source.split))
    wrong = [
        folder
        for folder in folders
        if not folder.name.isdecimal() or int(folder.name) >= len(source.names)
    ]
    if wrong:
        raise DataError(f"{source.name}: {wrong[0]} is called by no label of the set; remove it")
    return _of_folders(folders, [int(folder.name) for folder in folders], ())


def read_synsets(source: Source) -> Read:
    """Reads folders that are called by WordNet ids of ImageNet, all of them or some.

    With `subset` only the classes that have a folder are chosen from.
    """
    folders = source.folders(source.path(source.split))
    # By id, not by position: a folder that is missing shifts no label.
    index = {synset: label for label, synset in enumerate(source.options["synsets"].split())}
    unknown = [folder for folder in folders if folder.name not in index]
    if unknown:
        raise DataError(
            f"{source.name}: {unknown[0]} is called by no class of ImageNet; unpack the set again"
        )
    labels = [index[folder.name] for folder in folders]
    # All 1,000 classes are chosen from, whichever have a folder.
    if "subset" not in source.options:
        return _of_folders(folders, labels, ())
    if len(folders) != int(source.options["subset"]):
        raise UserError(
            f"{source.name}: {folders[0].parent} has {len(folders)} folders, and the set has "
            f"{source.options['subset']} classes; fetch it again from {source.address}"
        )
    return _of_folders(folders, range(len(folders)), [source.names[label] for label in labels])


def read_objectnet(source: Source) -> Read:
    """Reads ObjectNet: the folders whose classes ImageNet has too."""
    images = source.path("objectnet-1.0/images")
    # Beside the images in the archive; CLIP_benchmark copies them to the top.
    mappings = source.root if (source.root / _OBJECTS).exists() else None
    folder_names = read_json(source.path(_OBJECTS if mappings else f"{_MAPPINGS}/{_OBJECTS}"))
    shared = read_json(source.path(_SHARED if mappings else f"{_MAPPINGS}/{_SHARED}"))
    names = {folder: name for folder, name in folder_names.items() if name in shared}
    folders = [images / folder for folder in sorted(names)]
    lost = [folder for folder in folders if not folder.is_dir()]
    if lost:
        raise UserError(f"{source.name}: {lost[0]} is missing: from {source.address}")
    # As the original writes them into the prompts.
    lowered = [names[folder.name].lower() for folder in folders]
    return _of_folders(folders, range(len(folders)), lowered)


_MAPPINGS = "objectnet-1.0/mappings"
_OBJECTS, _SHARED = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"


def read_food(source: Source) -> Read:
    """Reads Food-101's JSON of image names by class."""
    by_class = read_json(source.path(f"food-101/meta/{source.split}.json"))
    index = {name: label for label, name in enumerate(sorted(by_class))}
    # Labels are by sorted name, images in the file's order, as torchvision has them.
    rows = [(image, index[name]) for name, images in by_class.items() for image in images]
    folder = source.path("food-101/images")
    names = [name.replace("_", " ") for name in sorted(by_class)]
    return _of_rows([(f"{folder}/{image}.jpg", label) for image, label in rows], names)


def read_sun(source: Source) -> Read:
    """Reads SUN397: classes are paths such as /a/abbey; all images are measured."""
    # The first letter's folder is no part of the name.
    classes = [line[3:] for line in source.lines("SUN397/ClassName.txt")]
    index = {name: label for label, name in enumerate(classes)}
    folder = source.path("SUN397")
    rows = []
    for file in sorted(folder.rglob("sun_*.jpg")):
        name = "/".join(file.relative_to(folder).parts[1:-1])
        rows.append((str(file), source.label(index, name, str(file), "SUN397/ClassName.txt")))
    return _of_rows(rows, [name.replace("_", " ").replace("/", " ") for name in classes])


def read_aircraft(source: Source) -> Read:
    """Reads FGVC-Aircraft's variants."""
    names = source.lines("fgvc-aircraft-2013b/data/variants.txt")
    index = {name: label for label, name in enumerate(names)}
    file = f"fgvc-aircraft-2013b/data/images_variant_{source.split}.txt"
    folder = source.path("fgvc-aircraft-2013b/data/images")
    rows = []
    for line in source.lines(file):
        image, _, name = line.partition(" ")
        rows.append((f"{folder}/{image}.jpg", source.label(index, name, line, file)))
    return _of_rows(rows, names)


def read_textures(source: Source) -> Read:
    """Reads DTD's first partition: lines such as banded/banded_0002.jpg."""
    lines = source.lines(f"dtd/dtd/labels/{source.split}1.txt")
    folder = source.path("dtd/dtd/images")
    names = sorted({line.partition("/")[0] for line in lines})
    return _of_rows([(f"{folder}/{n}", names.index(n.partition("/")[0])) for n in lines], names)


def read_pets(source: Source) -> Read:
    """Reads Oxford-IIIT Pet: lines such as "Abyssinian_201 1 1 1", the first number the class."""
    file = f"oxford-iiit-pet/annotations/{source.split}.txt"
    folder = source.path("oxford-iiit-pet/images")
    rows, names = [], dict[int, str]()
    for line in source.lines(file):
        # The lists of the release begin with a legend.
        if line.startswith("#"):
            continue
        image, label, *_ = [*line.split(), ""]
        if not label.isdecimal() or int(label) < 1:
            raise DataError(f"{source.root / file}: {line!r} has no class")
        rows.append((f"{folder}/{image}.jpg", int(label) - 1))
        # Spelled as torchvision does: American Bulldog.
        breed = image.rpartition("_")[0].replace("_", " ")
        names[int(label) - 1] = " ".join(word.title() for word in breed.split(" "))
    if sorted(names) != [*range(len(names))]:
        raise DataError(f"{source.root / file}: it lacks a class; fetch it again")
    return _of_rows(rows, [names[label] for label in sorted(names)])


def read_birds(source: Source) -> Read:
    """Reads Birdsnap: the images of test_images_valid.txt, classes of species.txt."""
    # Both files begin with a line of column names.
    species = [line.split("\t") for line in source.lines("species.txt")[1:]]
    index = {row[-1]: label for label, row in enumerate(species)}
    file = source.split
    rows = []
    for line in source.lines(file)[1:]:
        folder = line.partition("/")[0].lower()
        rows.append((str(source.root / line), source.label(index, folder, line, file)))
    return _of_rows(rows, [row[1] for row in species])


def read_signs(source: Source) -> Read:
    """Reads GTSRB: a CSV for the test images, folders for those of training."""
    if source.split == "train":
        folders = source.folders(source.path("gtsrb/GTSRB/Training"))
        return _of_folders(folders, range(len(folders)), ())
    folder = source.path("gtsrb/GTSRB/Final_Test/Images")
    # Sizes and boxes of the signs are not used, as in torchvision.
    rows = csv.DictReader(source.lines("gtsrb/GT-final_test.csv"), delimiter=";")
    images = []
    for row in rows:
        name, label = row.get("Filename"), str(row.get("ClassId"))
        if not name or not label.isdecimal():
            raise DataError(f"{source.root}/gtsrb/GT-final_test.csv: {row} has no image or class")
        images.append((f"{folder}/{name}", int(label)))
    return _of_rows(images, ())


def read_cars(source: Source) -> Read:
    """Reads Stanford Cars' MATLAB files."""
    file = {"test": "cars_test_annos_withlabels.mat", "train": "devkit/cars_train_annos.mat"}
    path = source.path(f"stanford_cars/{file[source.split]}")
    rows = _variable(path, "annotations")
    folder = source.path(f"stanford_cars/cars_{source.split}")
    names = _variable(source.path("stanford_cars/devkit/cars_meta.mat"), "class_names")
    # Labels begin at 1 in MATLAB.
    try:
        images = [(f"{folder}/{row['fname']}", int(row["class"].flat[0]) - 1) for row in rows]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: its rows have no name and class ({error})") from None
    return _of_rows(images, names)


def read_flowers(source: Source) -> Read:
    """Reads Oxford Flowers 102's MATLAB files."""
    labels_path, ids_path = (
        source.path(f"flowers-102/{name}.mat") for name in ("imagelabels", "setid")
    )
    labels, ids = _variable(labels_path, "labels"), _variable(ids_path, source.split)
    folder = source.path("flowers-102/jpg")
    try:
        images = [
            (f"{folder}/image_{int(i):05d}.jpg", int(labels.flat[int(i) - 1]) - 1) for i in ids.flat
        ]
    except (IndexError, AttributeError) as error:
        raise DataError(f"{ids_path}: its images have no labels ({error})") from None
    return _of_rows(images, ())


def _variable(path: Path, name: str) -> Any:
    """Returns a variable of a MATLAB file. Raises DataError if it is missing."""
    variables = read_mat(path)
    if name not in variables:
        raise DataError(f"{path} has no variable {name!r}; fetch it again")
    return variables[name]


def read_voc_objects(source: Source) -> Read:
    """Reads Pascal VOC 2007: every object, cut out by its box."""
    index = {name: label for label, name in enumerate(VOC_CLASSES)}
    images, labels = [], []
    # Cut out when they are read: crops of all objects would not fit in memory.
    for path, objects in _voc(source):
        for name, box in objects:
            images.append(Crop(path, 0, 0, f"{Path(path).stem} {name} {box}", box))
            labels.append((source.label(index, name, name, path),))
    return Read(images, labels, VOC_CLASSES)


def read_voc(source: Source) -> Read:
    """Reads Pascal VOC 2007: whole images, each with the classes of its objects."""
    index = {name: label for label, name in enumerate(VOC_CLASSES)}
    rows = _voc(source)
    labels = [
        tuple(sorted({source.label(index, name, name, path) for name, _ in objects}))
        for path, objects in rows
    ]
    return Read([path for path, _ in rows], labels, VOC_CLASSES)


VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_BOX = ("xmin", "ymin", "xmax", "ymax")


def _voc(source: Source) -> list[tuple[str, list[tuple[str, tuple[int, int, int, int]]]]]:
    """Returns (image, its objects: class and box) of the split."""
    folder = source.path("VOCdevkit/VOC2007")
    # Every class's list names all images of the split.
    listing = f"VOCdevkit/VOC2007/ImageSets/Main/aeroplane_{source.split}.txt"
    rows = []
    for line in source.lines(listing):
        image = line.split()[0]
        annotation = source.path(f"VOCdevkit/VOC2007/Annotations/{image}.xml")
        try:
            tree = ElementTree.parse(annotation)
            objects = [
                (
                    node.findtext("name", ""),
                    tuple(int(float(node.findtext(f"bndbox/{side}", ""))) for side in _BOX),
                )
                for node in tree.findall("object")
            ]
        except (ElementTree.ParseError, ValueError) as error:
            raise DataError(f"{annotation}: no annotation of VOC ({error})") from None
        rows.append((str(folder / f"JPEGImages/{image}.jpg"), objects))
    return rows  # type: ignore[return-value]  # mypy sees boxes of any length


def _of_folders(
    folders: list[Path], labels: range | list[int], names: list[str] | tuple[()]
) -> Read:
    rows = [
        (file, label)
        for folder, label in zip(folders, labels, strict=True)
        for file in files_in(folder)
    ]
    return _of_rows(rows, names)


def _of_rows(rows: list[tuple[str, int]], names: list[str] | tuple[()]) -> Read:
    return Read([image for image, _ in rows], [(label,) for _, label in rows], names)


LISTED: Mapping[str, Callable[[Source], Read]] = {
    "folders": read_folders,
    "numbered": read_numbered,
    "synsets": read_synsets,
    "objectnet": read_objectnet,
    "food": read_food,
    "sun": read_sun,
    "aircraft": read_aircraft,
    "textures": read_textures,
    "pets": read_pets,
    "birds": read_birds,
    "signs": read_signs,
    "cars": read_cars,
    "flowers": read_flowers,
    "voc": read_voc,
    "voc_objects": read_voc_objects,
}
"""Reader of an entry's `reader` -> its function."""
