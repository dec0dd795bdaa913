"""What a reader of labelled images is handed, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from internvl.data.images import FileSlice
from internvl.errors import ConfigError, DataError, UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of image files, those of torchvision's ImageFolder."""


@dataclass(frozen=True)
class Read:
    """Images with their labels, as a reader returns them."""

    images: Sequence[str | FileSlice]
    labels: Sequence[tuple[int, ...]]
    """Classes of each image: one, or any number in a multilabel set."""
    names: Sequence[str] = ()
    """Class names that the files have; empty: those of the package."""
    templates: Sequence[str] = ()
    """Prompts that the files have; empty: those of the package."""


@dataclass(frozen=True)
class Source:
    """Files of a set: its folder and the split that is read."""

    name: str
    """Of the set, for messages."""
    root: Path
    split: str
    """What the reader takes for the split, such as the name of a folder."""
    address: str
    """Where the set is published."""
    names: Sequence[str] = ()
    """The package's class names of the set; empty: the files have them."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Further values of the set's entry."""

    def path(self, name: str) -> Path:
        """Returns the path of a file or folder of the set. Raises ConfigError if it is missing."""
        path = self.root / name
        # With the address: nothing is fetched unasked.
        if not path.exists():
            raise ConfigError(f"{self.name}: {path} is missing: from {self.address}")
        return path

    def lines(self, name: str) -> list[str]:
        """Reads the lines of a text file of the set, without those that are empty."""
        return lines_of(self.path(name))

    def folders(self, path: Path) -> list[Path]:
        """Lists the folders in a folder, sorted by name. Raises UserError if it has none."""
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
        if not folders:
            raise UserError(f"{self.name}: {path} has no folders; each class has one")
        return folders

    def label(self, index: Mapping[str, int], name: str, line: str, file: str) -> int:
        """Returns the label of a class by name. Raises DataError with the line if there is none."""
        if name not in index:
            raise DataError(f"{self.root / file}: {line!r} is of no class of {self.name}")
        return index[name]


def lines_of(path: Path) -> list[str]:
    """Reads the lines of a text file, without those that are empty. Raises DataError."""
    # Read whole: the largest list has some 50,000 lines.
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); fetch it again") from None
    return [line.strip() for line in lines if line.strip()]


def files_in(folder: Path) -> list[str]:
    """Lists the image files in a folder at any depth, sorted as ImageFolder does."""
    # At any depth and in any case, as torchvision walks a class's folder.
    return [str(file) for file in sorted(folder.rglob("*")) if file.suffix.lower() in ENDINGS]
