"""Labelled sets by the names of CLIP_benchmark: read from their published layout or from shards.

    entry = labelled.find("imagenet-1k")
    images = labelled.read(entry, Path("data"))

Imports nothing heavy: `internvl evaluate --help` lists the names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from internvl.errors import ConfigError, DataError, UserError
from internvl.files import read_yaml

SHARDS = "https://huggingface.co/datasets/clip-benchmark/wds_"
"""Address of every set as webdataset shards, without its name."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A labelled set: an entry of sets.yaml."""

    dataset: str
    """CLIP_benchmark's name of the set."""
    about: str
    reader: str
    """Reader of its published layout: a key of `readers`."""
    root: str
    """Folder below `--root`."""
    splits: Mapping[str, str]
    """Split -> what the reader takes for it."""
    images: int
    """Images of the test split, on which results are published."""
    classes: int
    address: str
    names: str = ""
    """Entry of the package's class names; empty: the set's files have them."""
    languages: tuple[str, ...] = ("en",)
    """Languages of class names and templates, as CLIP_benchmark writes them."""
    options: Mapping[str, str] = field(default_factory=dict)
    multilabel: bool = False

    @property
    def name(self) -> str:
        """Its name as a task of `internvl evaluate`: without a slash, which files cannot have."""
        return self.dataset.replace("/", "-")

    @property
    def shards(self) -> str:
        """Address of the set as webdataset shards."""
        return SHARDS + self.name


@dataclass(frozen=True)
class Labelled:
    """A set that was read."""

    images: Sequence[Any]
    """Paths, or FileSlices of images inside larger files."""
    labels: Sequence[tuple[int, ...]]
    """Classes of each image, as indices of `classes`; one, but for multilabel sets."""
    classes: Sequence[str]
    templates: Sequence[str]
    """Prompts with {c} for the class."""


@cache  # not when imported: only what names a set needs it
def entries() -> Mapping[str, Entry]:
    """Returns every set by its name as a task."""
    sets = [Entry(dataset=name, **_fields(row)) for name, row in _yaml("sets")["sets"].items()]
    return {entry.name: entry for entry in sets}


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}


@cache
def _by_spelling() -> Mapping[str, Entry]:
    return {_spelling(entry.name): entry for entry in entries().values()}


def _spelling(name: str) -> str:
    """Returns a name without what people write differently: imagenet-1k, wds/imagenet_1k."""
    # CLIP_benchmark itself has imagenet-a and imagenet_sketch.
    return re.sub(r"[-_/]", "", name.lower().removeprefix("wds/"))


def find(name: str) -> Entry | None:
    """Returns the set of a name, however its hyphens are written; None if there is none."""
    return _by_spelling().get(_spelling(name))


def find_evaluation(name: str) -> tuple[Entry, str] | None:
    """Returns (set, language) of an evaluation that is called as `evaluation_name` does."""
    for entry in entries().values():
        for language in entry.languages:
            if name == evaluation_name(entry, language):
                return entry, language
    return None


def evaluation_name(entry: Entry, language: str) -> str:
    """Returns the name of the evaluation of a set in a language."""
    return entry.name if language == "en" else f"{entry.name}-{language}"


def folder_of(entry: Entry, root: Path, dataset_root: str | None = None) -> Path:
    """Returns the folder of a set: its shards if they are there, else its published layout.

    Args:
        root: folder of all sets.
        dataset_root: the set's own folder, with CLIP_benchmark's placeholders.
    """
    folder = root / entry.root
    if dataset_root is not None:
        own = dataset_root.format(dataset=entry.dataset, dataset_cleaned=entry.name)
        folder = root = Path(own)
    # Shards first: who fetched them means them.
    shards = root / f"wds_{entry.name}"
    return shards if shards.is_dir() else folder


def read(entry: Entry, folder: Path, split: str = "test", language: str = "en") -> Labelled:
    """Reads a set.

    Args:
        folder: as `folder_of` returns it.

    Raises:
        ConfigError: no such split or language, or missing files, with their address.
        UserError: files that are not what the set has.
    """
    # Here: the readers need numpy and Pillow, which a list of names does not.
    from internvl.datasets.labelled.readers import READERS
    from internvl.datasets.labelled.source import Source

    if language not in entry.languages:
        languages = ", ".join(entry.languages)
        raise ConfigError(f"{entry.name} has no language {language!r}; it has {languages}")
    in_shards = (folder / split / "nshards.txt").exists()
    if split not in entry.splits and not in_shards:
        raise ConfigError(f"{entry.name} has no split {split!r}; it has {', '.join(entry.splits)}")
    names = names_of(entry, language)
    source = Source(
        entry.name,
        folder,
        split if in_shards else entry.splits[split],
        f"{entry.address}; or as shards, in a folder wds_{entry.name}, from {entry.shards}",
        names,
        _options(entry),
    )
    rows = READERS["shards" if in_shards else entry.reader](source)
    # A translation is the package's; otherwise the files' own names and prompts come first.
    translated = language != "en"
    classes = names if translated or not rows.names else rows.names
    templates = templates_of(entry, language)
    if rows.templates and not translated:
        templates = rows.templates
    _check(entry, folder, rows.images, rows.labels, classes)
    return Labelled(rows.images, rows.labels, classes, templates)


def _check(
    entry: Entry,
    folder: Path,
    images: Sequence[Any],
    labels: Sequence[tuple[int, ...]],
    classes: Sequence[str],
) -> None:
    """Raises UserError if a set has no images, or a label without a class."""
    if not images:
        raise UserError(f"{entry.name}: {folder} holds no image of the set: from {entry.address}")
    # A wrong label would be an index error in the middle of scoring.
    largest = max((max(row) for row in labels if row), default=0)
    if largest >= len(classes):
        raise DataError(
            f"{entry.name}: {folder} has the label {largest}, but there are {len(classes)} classes"
        )


def names_of(entry: Entry, language: str) -> Sequence[str]:
    """Returns the package's class names of a set; empty if its own files have them."""
    names: Sequence[str] = _yaml(language)["classes"][entry.names] if entry.names else ()
    return names


def templates_of(entry: Entry, language: str) -> Sequence[str]:
    """Returns the package's prompts of a set: those of ImageNet if it has none of its own."""
    templates = _yaml(language)["templates"]
    # As CLIP_benchmark: vtab/flowers has the prompts of flowers.
    chosen: Sequence[str] = templates.get(entry.dataset.rpartition("/")[2], templates["imagenet1k"])
    return chosen


def _options(entry: Entry) -> Mapping[str, str]:
    if entry.reader == "synsets":
        return {**entry.options, "synsets": _yaml("wnids")["imagenet"]}
    return entry.options


@cache
def _yaml(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = read_yaml(Path(__file__).with_name(f"{name}.yaml"))
    return tree
