"""COCO's caption JSON: `images` by id, and `annotations` with their captions."""

from collections import Counter
from pathlib import Path
from typing import Any

from internvl.data.captions.caption_file import (
    CaptionFile,
    ImageId,
    file_key,
    name_problem,
    object_problem,
)
from internvl.data.captions.json_entries import karpathy_names
from internvl.data.json_rows import read_json
from internvl.data.texts import json_type, text_problem
from internvl.errors import DataError


def read_coco(file: CaptionFile, *, tree: Any = None, chosen: Path | None = None) -> None:
    """`images` and `annotations`, in the order of the annotations.

    An id is an integer or a text. Where two images have one id, it is unknown which of them is
    meant, and the captions of both are left out with the problem.
    """
    tree = read_json(file.path) if tree is None else tree
    listed = _list_of(file, tree, "images", needed=chosen is None)
    annotations = _list_of(file, tree, "annotations")
    file.form = "coco"
    coco = _CocoImages(file)
    if chosen is None:
        for number, row in enumerate(listed, start=1):
            coco.add(number, row)
    else:
        coco.choose(chosen, listed)
    numbers, add = coco.numbers, file.caption
    for number, row in enumerate(annotations, start=1):
        if type(row) is not dict:
            reason = object_problem(row)
            if reason:
                file.bad(f"annotations entry {number}", reason)
                continue
        mark = row.get("id", number)
        where = f"annotation {mark}"
        if type(mark) is not int:
            good = type(mark) is str and text_problem(mark) is None
            where = where if good else f"annotations entry {number}"
        image_id = row.get("image_id")
        if type(image_id) not in (int, str):
            image_id, reason = _image_id(row, "image_id")
            if reason:
                file.bad(where, reason)
                continue
        image = numbers.get(image_id)
        if image is not None:
            if "caption" in row:
                add(where, image, row["caption"])
            else:
                file.tried[image] = 1
                file.bad(where, "no `caption`; write one")
        else:
            coco.miss(where, image_id)
    coco.report()


def _list_of(file: CaptionFile, tree: Any, key: str, needed: bool = True) -> list[Any]:
    what = f"an object is expected, not {json_type(tree)}"
    if isinstance(tree, dict):
        rows = tree.get(key, None if needed else [])
        if isinstance(rows, list) and getattr(tree, "repeated", None) != key:
            return rows
        what = f"`{key}` must be a list, not {json_type(rows)}"
        if key not in tree:
            what = f"key '{key}' missing"
        elif getattr(tree, "repeated", None) == key:
            what = f"key '{key}' is there twice"
    raise DataError(f"{file.path} is not a COCO caption file ({what}); fetch it again")


def _image_id(row: dict[str, Any], key: str) -> tuple[ImageId, str | None]:
    """The id under a key, or why it is none. 7.0, as tables write whole numbers, is 7."""
    if key not in row:
        return 0, f"no `{key}`; write one"
    value = row[key]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return 0, f"its `{key}` is {json_type(value)}; write an integer or a text"
    if isinstance(value, str) and text_problem(value):
        return 0, f"its `{key}` {text_problem(value)}"
    return value, None


class _CocoImages:
    """The images of a COCO file by id while its annotations are read."""

    def __init__(self, file: CaptionFile) -> None:
        self.file = file
        self.numbers: dict[ImageId, int] = {}
        """id -> number in `file.images`, of those that can be used."""
        self.unusable: dict[ImageId, tuple[str, str]] = {}
        """id -> where and why, of those that cannot."""
        self.others: set[ImageId] = set()
        """Ids that the file lists and nobody chose."""
        self.left_out: Counter[ImageId] = Counter()
        """Captions of unusable images."""
        self.entries: dict[ImageId, tuple[int, Any]] = {}
        """id -> entry and name that had it first."""
        self.files: dict[str, tuple[ImageId, str]] = {}
        """File -> id and name that it had first."""

    def add(self, number: int, row: Any) -> None:
        """Takes an entry of `images`."""
        entry = f"images entry {number}"
        reason = object_problem(row)
        if reason:
            self.file.bad(entry, reason)
            return
        image_id, reason = _image_id(row, "id")
        if reason:
            self.file.bad(entry, reason)
            return
        name = row.get("file_name") or row.get("image")
        if image_id in self.entries:
            self._repeated(number, image_id, name)
            return
        self.entries[image_id] = number, name
        reason = name_problem(name) if name else "neither `file_name` nor `image` names it"
        reason = reason or self._same_file(image_id, name)
        if reason:
            self.unusable[image_id] = entry, reason
            return
        added = self.file.image(f"image {image_id}", name, image_id)
        if added is not None:
            self.numbers[image_id] = added

    def _same_file(self, image_id: ImageId, name: str) -> str | None:
        """What is wrong where another id has the file already: each would be a wrong image for
        the captions of the other."""
        first, first_name = self.files.setdefault(file_key(name), (image_id, name))
        if first == image_id and type(first) is type(image_id):
            return None
        also = "" if name == first_name else f" ({first_name})"
        return (
            f"{name} is the file of image {first!r}{also} too; give the captions of image "
            f"{image_id!r} the id {first!r} and remove this entry"
        )

    def _repeated(self, number: int, image_id: ImageId, name: Any) -> None:
        first, first_name = self.entries[image_id]
        reason = (
            f"the id {image_id!r} is there already: entry {first} is {first_name}, entry {number} "
            f"is {name}; give every image an id of its own"
        )
        if name == first_name:
            self.file.bad(f"images entry {number}", reason)  # either is the image
            return
        self.unusable.setdefault(image_id, (f"images entries {first} and {number}", reason))
        used = self.numbers.pop(image_id, None)
        if used is not None:
            self.file.tried[used] = 2  # named by `report`, with its captions

    def choose(self, chosen: Path, listed: list[Any]) -> None:
        """Takes the images of Karpathy's list; `listed` are those that have captions besides."""
        for row in listed:
            if isinstance(row, dict) and not _image_id(row, "id")[1]:
                self.others.add(_image_id(row, "id")[0])
        for where, name in karpathy_names(chosen):
            number = coco_number(name)
            if number is None:
                raise DataError(f"{chosen} {where}: {name} does not end in COCO's number; check it")
            if number in self.numbers:
                raise DataError(f"{chosen} {where}: the number of {name} is there already")
            added = self.file.image(f"image {number}", name, number)
            if added is not None:
                self.numbers[number] = added

    def miss(self, where: str, image_id: ImageId) -> None:
        """Takes a caption whose image is not among `numbers`."""
        if image_id in self.unusable:
            self.left_out[image_id] += 1
        elif image_id not in self.others:
            other: ImageId = int(image_id) if _is_number(image_id) else str(image_id)
            near = f"; the id there is {other!r}, write both alike" if other in self.entries else ""
            self.file.bad(where, f"there is no image {image_id!r} under `images`{near}")

    def report(self) -> None:
        """Adds the problems of images that cannot be used, with the captions that they cost."""
        for image_id, (where, reason) in self.unusable.items():
            count = self.left_out[image_id]
            self.file.bad(where, f"{reason} ({count} caption(s) of it)" if count else reason)


def _is_number(value: ImageId) -> bool:
    return isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit()


def coco_number(name: str) -> int | None:
    """The number that ends a COCO file name, None where there is none.

    >>> coco_number("val2014/COCO_val2014_000000391895.jpg")
    391895
    """
    digits = Path(name).stem.rpartition("_")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else None
