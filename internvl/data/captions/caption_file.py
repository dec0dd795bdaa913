"""Images, captions and problems of a caption file; the readers of the forms fill it."""

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
    """An image that a caption file lists."""

    where: str
    """Its line or entry, such as "line 3"."""
    name: str
    id: ImageId | None = None
    """The id in a COCO file, else None."""
    slice: FileSlice | None = None
    """Its bytes inside a tar; None for a file below the folder of images."""


BAD = -1
"""Image index of a row that is a problem."""


@dataclass
class CaptionFile:
    """The rows of a caption file in its order: captions that can be used, and problems.

    Every image that the file lists has at least one row, good or bad.
    """

    path: Path
    split: str = "test"
    """The split that is read of a Karpathy file with a `split` field."""
    form: str = ""
    """The key of FORMS that it was read as."""
    images: list[NamedImage] = field(default_factory=list)
    # Columns, not a list of row objects: a large file has hundreds of thousands of rows.
    locations: list[str] = field(default_factory=list)
    """Line or entry of every row."""
    image_indices: list[int] = field(default_factory=list)
    """Index in `images` of every row's image, or BAD."""
    texts: list[str] = field(default_factory=list)
    """Every row's caption, or its problem."""
    tried: bytearray = field(default_factory=bytearray)
    """State of every image: 0 no row yet, 1 has a row, good or bad, 2 unusable (repeated id)."""
    _by_name: dict[str, int] = field(default_factory=dict)  # file_key -> index in `images`

    @property
    def captions(self) -> Iterator[tuple[int, str]]:
        """(index in `images`, caption) of every row that can be used."""
        pairs = zip(self.image_indices, self.texts, strict=True)
        return (pair for pair in pairs if pair[0] != BAD)

    @property
    def problems(self) -> list[BadSample]:
        """The rows that cannot be used, each named by file and line or entry."""
        rows = zip(self.locations, self.image_indices, self.texts, strict=True)
        return [self.problem(location, text) for location, index, text in rows if index == BAD]

    def problem(self, location: str, reason: str) -> BadSample:
        """Returns the BadSample for a line or entry of this file."""
        name = f"{self.path} {location}" if location else str(self.path)
        return BadSample(printable(name), printable(reason))

    def by_image(self) -> list[int]:
        """Returns row indices sorted by image, stable, with the problems last."""
        last = len(self.images)
        keys = [last if index == BAD else index for index in self.image_indices]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def bad(self, where: str, reason: str) -> None:
        """Adds a problem."""
        self._add(printable(where), BAD, printable(reason))

    def _add(self, where: str, image: int, text: str) -> None:
        self.locations.append(where)
        self.image_indices.append(image)
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
        """Adds an image and returns its index, or adds a problem and returns None.

        Args:
            again: whether the same name means the same image, as in forms of a line per caption.
        """
        known_index = self._by_name.get(file_key(name)) if again and isinstance(name, str) else None
        # Before the name is checked: most lines of such a form name an image again.
        if known_index is not None:
            return known_index
        reason = name_problem(name)
        if reason:
            self.bad(where, reason)
            return None
        index = self._by_name[file_key(name)] = len(self.images)
        self.images.append(NamedImage(where, name, id, slice))
        self.tried.append(0)
        return index

    def caption(self, where: str, image: int, text: Any) -> None:
        """Adds a caption, or a problem if it is not a text or is blank."""
        self.tried[image] = 1
        # The usual caption costs one test: plain ASCII, neither blank nor with a NUL.
        if type(text) is str and text.isascii() and "\0" not in text and text.strip():
            self.locations.append(where)
            self.image_indices.append(image)
            self.texts.append(text)
            return
        reason = _caption_problem(text)
        if reason:
            self.bad(where, reason)
        else:
            self._add(where, image, text)

    def add_captions(self, where: str, image: int | None, texts: Iterable[Any]) -> None:
        """Adds the captions of an entry; none if its image is None, for it has a problem then."""
        if image is not None:
            for text in texts:
                self.caption(where, image, text)


def file_key(name: str) -> str:
    """Normalizes a name, so that a.png, ./a.png and b/../a.png are one key.

    >>> file_key("./a.png")
    'a.png'
    """
    # Few names need `normpath`, and hundreds of thousands pass here.
    if name[:1] == "." or "/." in name or "//" in name:
        # It would make one slash of the two after "https:".
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
    # On Linux a backslash is part of a file name: the file would only be called missing.
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
