"""Reads COCO's caption JSON: `images` by id, and `annotations` with their captions."""

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
from internvl.errors import DataError, counted


def read_coco(file: CaptionFile, *, tree: Any = None, chosen: Path | None = None) -> None:
    """Reads `images`, and captions in the order of `annotations`. An id is an integer or a text.

    Args:
        tree: the parsed file, if the caller has it.
        chosen: Karpathy's list of the images to read; None reads all.
    """
    tree = read_json(file.path) if tree is None else tree
    listed = _list_of(file, tree, "images", needed=chosen is None)
    annotations = _list_of(file, tree, "annotations")
    file.form = "coco"
    coco = _CocoImages(file)
    if chosen is None:
        for entry_number, row in enumerate(listed, start=1):
            coco.add(entry_number, row)
    else:
        coco.choose(chosen, listed)
    # Names bound and exact types tested outside of the checks below: this loop runs 600,000 times
    # for COCO's training captions.
    index_of_id, add = coco.index_of_id, file.caption
    for entry_number, row in enumerate(annotations, start=1):
        # `RepeatedKeys` is a subclass of dict, and a problem.
        if type(row) is not dict:
            reason = object_problem(row)
            if reason:
                file.bad(f"annotations entry {entry_number}", reason)
                continue
        annotation_id = row.get("id", entry_number)
        where = f"annotation {annotation_id}"
        if type(annotation_id) is not int:
            good = type(annotation_id) is str and text_problem(annotation_id) is None
            where = where if good else f"annotations entry {entry_number}"
        image_id = row.get("image_id")
        if type(image_id) not in (int, str):
            image_id, reason = _image_id(row, "image_id")
            if reason:
                file.bad(where, reason)
                continue
        image = index_of_id.get(image_id)
        if image is not None:
            if "caption" in row:
                add(where, image, row["caption"])
            else:
                file.tried[image] = 1
                file.bad(where, "no `caption`; write one")
        else:
            coco.caption_without_image(where, image_id)
    coco.report()


def _list_of(file: CaptionFile, tree: Any, key: str, needed: bool = True) -> list[Any]:
    reason = f"an object is expected, not {json_type(tree)}"
    if isinstance(tree, dict):
        rows = tree.get(key, None if needed else [])
        # Of a key that is there twice the parser keeps the last list: half of the file.
        if isinstance(rows, list) and getattr(tree, "repeated", None) != key:
            return rows
        reason = f"`{key}` must be a list, not {json_type(rows)}"
        if key not in tree:
            reason = f"key '{key}' missing"
        elif getattr(tree, "repeated", None) == key:
            reason = f"key '{key}' is there twice"
    raise DataError(f"{file.path} is not a COCO caption file ({reason}); fetch it again")


def _image_id(row: dict[str, Any], key: str) -> tuple[ImageId, str | None]:
    """Returns (id, None), or (0, what is wrong with the value under `key`)."""
    if key not in row:
        return 0, f"no `{key}`; write one"
    value = row[key]
    # Tables write whole numbers as 7.0 if one row of the column has no value.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return 0, f"its `{key}` is {json_type(value)}; write an integer or a text"
    if isinstance(value, str) and text_problem(value):
        return 0, f"its `{key}` {text_problem(value)}"
    return value, None


class _CocoImages:
    """The images of a COCO file by id, while its annotations are read."""

    def __init__(self, file: CaptionFile) -> None:
        self.file = file
        self.index_of_id: dict[ImageId, int] = {}
        """id -> index in `file.images`, of usable images."""
        self.unusable: dict[ImageId, tuple[str, str]] = {}
        """id -> (entry, reason), of unusable images."""
        self.not_chosen: set[ImageId] = set()
        """Ids that the file lists and Karpathy's list does not name."""
        self.num_dropped: Counter[ImageId] = Counter()
        """id -> number of captions, of unusable images."""
        self.entries: dict[ImageId, tuple[int, Any]] = {}
        """id -> (number, image name) of its first entry."""
        self.files: dict[str, tuple[ImageId, str]] = {}
        """file_key -> (id, name) of its first entry."""

    def add(self, entry_number: int, row: Any) -> None:
        """Adds an entry of `images`."""
        entry = f"images entry {entry_number}"
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
            self._add_repeated(entry_number, image_id, name)
            return
        self.entries[image_id] = entry_number, name
        reason = name_problem(name) if name else "neither `file_name` nor `image` names it"
        reason = reason or self._shared_file_problem(image_id, name)
        if reason:
            self.unusable[image_id] = entry, reason
            return
        added = self.file.image(f"image {image_id}", name, image_id)
        if added is not None:
            self.index_of_id[image_id] = added

    def _shared_file_problem(self, image_id: ImageId, name: str) -> str | None:
        """Returns what is wrong if another id has this file already, else None."""
        # Each would count as a wrong image for the captions of the other.
        first, first_name = self.files.setdefault(file_key(name), (image_id, name))
        if first == image_id and type(first) is type(image_id):
            return None
        also = "" if name == first_name else f" ({first_name})"
        return (
            f"{name} is the file of image {first!r}{also} too; give the captions of image "
            f"{image_id!r} the id {first!r} and remove this entry"
        )

    def _add_repeated(self, entry_number: int, image_id: ImageId, name: Any) -> None:
        first, first_name = self.entries[image_id]
        reason = (
            f"the id {image_id!r} is there already: entry {first} is {first_name}, entry "
            f"{entry_number} is {name}; give every image an id of its own"
        )
        if name == first_name:
            self.file.bad(f"images entry {entry_number}", reason)  # either is the image
            return
        # Nobody can say which of the two a caption is of, so the captions of both are dropped.
        self.unusable.setdefault(image_id, (f"images entries {first} and {entry_number}", reason))
        used = self.index_of_id.pop(image_id, None)
        if used is not None:
            self.file.tried[used] = 2  # named by `report`, with its captions

    def choose(self, chosen: Path, listed: list[Any]) -> None:
        """Adds the images of Karpathy's list; `listed`: the file's own entries of `images`."""
        for row in listed:
            if isinstance(row, dict) and not _image_id(row, "id")[1]:
                self.not_chosen.add(_image_id(row, "id")[0])
        for where, name in karpathy_names(chosen):
            # The list has no ids; the references (`_gt.json`) have nothing else.
            image_id = coco_number(name)
            if image_id is None:
                raise DataError(f"{chosen} {where}: {name} does not end in COCO's number; check it")
            if image_id in self.index_of_id:
                raise DataError(f"{chosen} {where}: the number of {name} is there already")
            added = self.file.image(f"image {image_id}", name, image_id)
            if added is not None:
                self.index_of_id[image_id] = added

    def caption_without_image(self, where: str, image_id: ImageId) -> None:
        """Counts a caption of an unusable image; adds a problem if the file lists no such image."""
        if image_id in self.unusable:
            self.num_dropped[image_id] += 1
        elif image_id not in self.not_chosen:
            # The usual cause: 7 in one of the two lists, "7" in the other.
            other: ImageId = int(image_id) if _is_number(image_id) else str(image_id)
            near = f"; the id there is {other!r}, write both alike" if other in self.entries else ""
            self.file.bad(where, f"there is no image {image_id!r} under `images`{near}")

    def report(self) -> None:
        """Adds a problem for every unusable image, with the number of captions dropped with it."""
        for image_id, (where, reason) in self.unusable.items():
            count = self.num_dropped[image_id]
            self.file.bad(
                where, f"{reason} ({counted(count, 'caption')} of it)" if count else reason
            )


def _is_number(value: ImageId) -> bool:
    return isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit()


def coco_number(name: str) -> int | None:
    """Returns the number that ends a COCO file name, or None.

    >>> coco_number("val2014/COCO_val2014_000000391895.jpg")
    391895
    """
    digits = Path(name).stem.rpartition("_")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else None
