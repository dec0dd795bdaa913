"""Rows of a file of captions, filled by its reader: images, captions, and what is wrong."""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvl.data.images import FileSlice, is_address
from internvl.data.json_rows import RepeatedKeys
from internvl.data.texts import json_type, printable, text_problem
from internvl.errors import BadSample

ImageId = int | str
"""What COCO annotations call an image."""


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image that a file of captions lists."""

    where: str
    """Its line or entry, such as "line 3"."""
    name: str
    id: ImageId | None = None
    """In COCO form, else None."""
    slice: FileSlice | None = None
    """Where it is no file below the folder of images but lies in a tar."""


BAD = -1
"""Image of a row that is a problem."""


@dataclass
class CaptionFile:
    """What a file of captions holds, in its order, and what is wrong with it.

    Rows are columns of equal length: a large file has hundreds of thousands. Every image that is
    listed has a row of its own, good or bad.
    """

    path: Path
    split: str = "test"
    """Which images of Karpathy's file with a `split` field are read."""
    form: str = ""
    """The key of FORMS that it was read as."""
    images: list[NamedImage] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    """Line or entry of every row."""
    numbers: list[int] = field(default_factory=list)
    """Number of every row's image in `images`, or BAD."""
    texts: list[str] = field(default_factory=list)
    """Every row's caption, or what is wrong."""
    tried: bytearray = field(default_factory=bytearray)
    """Nonzero for every image that a row is about, be the row good or bad."""
    _by_name: dict[str, int] = field(default_factory=dict)  # file_key -> number of its image

    @property
    def captions(self) -> Iterator[tuple[int, str]]:
        """(number of the image, caption) of every row that can be used."""
        pairs = zip(self.numbers, self.texts, strict=True)
        return (pair for pair in pairs if pair[0] != BAD)

    @property
    def problems(self) -> list[BadSample]:
        """The rows that cannot, each with file and line or entry."""
        rows = zip(self.places, self.numbers, self.texts, strict=True)
        return [self.problem(place, text) for place, number, text in rows if number == BAD]

    def problem(self, place: str, reason: str) -> BadSample:
        """What is wrong at a line or entry, named by file and place."""
        name = f"{self.path} {place}" if place else str(self.path)
        return BadSample(printable(name), printable(reason))

    def by_image(self) -> list[int]:
        """The rows with the captions of an image together, images in their order, problems last."""
        last = len(self.images)
        keys = [last if number == BAD else number for number in self.numbers]
        return sorted(range(len(keys)), key=keys.__getitem__)

    # What the forms below fill it with.

    def bad(self, where: str, reason: str) -> None:
        """Adds a problem."""
        self._add(printable(where), BAD, printable(reason))

    def _add(self, where: str, image: int, text: str) -> None:
        self.places.append(where)
        self.numbers.append(image)
        self.texts.append(text)

    def image(
        self,
        where: str,
        name: Any,
        id: ImageId | None = None,
        *,
        slice: FileSlice | None = None,
        again: bool = False,
    ) -> int | None:
        """Adds an image and returns its number; None and a problem where the name is none.

        Args:
            again: whether the same name means the same image, as in forms of a line per caption.
        """
        number = self._by_name.get(file_key(name)) if again and isinstance(name, str) else None
        if number is not None:
            return number
        reason = name_problem(name)
        if reason:
            self.bad(where, reason)
            return None
        number = self._by_name[file_key(name)] = len(self.images)
        self.images.append(NamedImage(where, name, id, slice))
        self.tried.append(0)
        return number

    def caption(self, where: str, image: int, text: Any) -> None:
        """Adds a caption, or the problem that it is none."""
        self.tried[image] = 1
        # The usual caption costs one test: plain ASCII, neither blank nor with a NUL.
        if type(text) is str and text.isascii() and "\0" not in text and text.strip():
            self.places.append(where)
            self.numbers.append(image)
            self.texts.append(text)
            return
        reason = _caption_problem(text)
        if reason:
            self.bad(where, reason)
        else:
            self._add(where, image, text)

    def captions_of(self, where: str, image: int | None, texts: Iterable[Any]) -> None:
        """Adds the captions of an entry, if its image could be added."""
        if image is not None:
            for text in texts:
                self.caption(where, image, text)


def file_key(name: str) -> str:
    """The same text for names of the same file, such as a.png, ./a.png and b/../a.png.

    >>> file_key("./a.png")
    'a.png'
    """
    if name[:1] == "." or "/." in name or "//" in name:  # few names are spelled in several ways
        return name if is_address(name) else posixpath.normpath(name)
    return name


def name_problem(name: Any) -> str | None:
    if name is None or name == "":
        return "no image is named; write its name"
    reason = text_problem(name)
    if reason:
        return f"the image's name {reason}"
    if not name.strip():
        return "no image is named; write its name"
    if "\\" in name:
        slashes = name.replace("\\", "/")
        return f"the image's name {name} has backslashes, as Windows has; write {slashes}"
    return None


def _caption_problem(text: Any) -> str | None:
    reason = text_problem(text)
    if reason:
        return f"the caption {reason}"
    return None if text.strip() else "the caption is empty; write it or remove it"


def object_problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"a JSON object is expected, not {json_type(row)}"
    if isinstance(row, RepeatedKeys):
        return f"the key `{row.repeated}` is there twice; remove one"
    return None
