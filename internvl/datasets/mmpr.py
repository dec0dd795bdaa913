"""MMPR, the preference pairs of mixed preference optimization, as its repository lays it out.

    MMPR-v1.2/meta.json          data set -> root, annotation, length, repeat_time, …
    MMPR-v1.2/annotations.zip    the annotation files
    MMPR-v1.2/images.zip_*       the images in volumes; older releases have one archive

Paths in the meta file start at the folder that holds MMPR-v1.2, where training is started.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.data.json_rows import read_json
from internvl.datasets import download as fetch
from internvl.datasets.checklist import Missing, Tree, filled
from internvl.errors import DataError

RELEASES = ("MMPR-v1.2", "MMPR-v1.1", "MMPR")
"""Names of the folders and repositories, the newest first."""
_HUB = "https://huggingface.co/datasets/OpenGVLab/{}/resolve/main/"


def prepare(tree: Tree) -> Iterator[Path]:
    """Unpacks and checks the newest release below the root; yields its meta file.

    Raises:
        DataError: an annotation file does not hold as many lines as the meta file says.
    """
    # One of them: each is a data set of its own, with other pairs.
    present = [name for name in RELEASES if (tree.root / name).is_dir()]
    release = present[0] if present else RELEASES[0]
    folder, address = tree.root / release, _HUB.format(release)
    meta = folder / "meta.json"
    has_meta = tree.has_file(meta, f"{address}meta.json")
    tree.has_images(folder / "annotations", f"{address}annotations.zip")
    _images(tree, folder, address)
    if not has_meta:
        return
    entries = read_json(meta)
    if not isinstance(entries, dict):
        raise DataError(f"{meta} is no meta file; fetch it again from {address}meta.json")
    for name, entry in entries.items():
        _check(tree, name, entry, address)
    yield meta


def _images(tree: Tree, folder: Path, address: str) -> None:
    images = folder / "images"
    if filled(images):
        return
    volumes = sorted(folder.glob("images.zip_*"))
    archive = folder / "images.zip"
    if archive.is_file() and fetch.unpack(archive, images):
        return
    # Not joined here: that takes tens of gigabytes more, which is for the user to decide.
    note = (
        f"cat {folder}/images.zip_* > {archive}, and start this again" if volumes else "all volumes"
    )
    tree.missing.append(Missing(images, f"{address}images.zip_*", note))


def _check(tree: Tree, name: str, entry: Any, address: str) -> None:
    """Counts the lines of a data set and looks for its folder of images."""
    annotation = tree.root / str(entry["annotation"])
    if not annotation.is_file():
        # Without any, the folder of annotations is listed already.
        if filled(annotation.parent):
            tree.missing.append(Missing(annotation, f"{address}annotations.zip"))
        return
    # Counted, not parsed: `internvl check` reads every pair.
    with annotation.open("rb") as file:
        lines = sum(1 for line in file if line.strip())
    length = entry.get("length", lines)
    if lines != length:
        raise DataError(
            f"{annotation} holds {lines:,} pairs, but {name} of the meta file has {length:,}: it "
            f"was cut off or is another version; unpack it again from {address}annotations.zip"
        )
    tree.counts[f"{name} pairs"] = lines
    root = entry.get("root")
    if (
        root
        and not (tree.root / root).is_dir()
        and filled(tree.root / root.split("/")[0] / "images")
    ):
        tree.missing.append(
            Missing(tree.root / root, f"{address}images.zip_*", f"images of {name}")
        )
