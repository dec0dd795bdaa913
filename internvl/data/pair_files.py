"""Images and their captions for retrieval, as files that are there.

    pairs = read_pairs(Path("flickr30k_test_karpathy.txt"), "flickr30k/Images", "flickr")
    pairs.images[pairs.image_of_text[7]], pairs.texts[7]

Every form is read by data/captions/. What is wrong is listed in `problems` by file and line, and
the caller decides.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import filterfalse
from pathlib import Path

from internvl.data import captions
from internvl.data.captions import CaptionFile, NamedImage
from internvl.data.images import FileSlice, is_address, join_inside, read_rgb, spelled_otherwise
from internvl.errors import BadImage, BadSample, DataError
from internvl.log import Progress

_COCO_NAME = re.compile(r"COCO_((?:train|val|test)20\d\d)_")


@dataclass(frozen=True)
class Pairs:
    """Images in the order of their file, captions in the order of their images."""

    images: tuple[str | FileSlice, ...]
    """Paths, or places in tars."""
    names: tuple[str, ...]
    """The images as the file names them."""
    texts: tuple[str, ...]
    image_of_text: tuple[int, ...]
    """Which image a caption belongs to."""
    problems: tuple[BadSample, ...] = ()

    def without(self, images: set[int]) -> "Pairs":
        """The same without some images and their captions."""
        kept = [i for i in range(len(self.images)) if i not in images]
        number = {old: new for new, old in enumerate(kept)}
        texts = [t for t, image in enumerate(self.image_of_text) if image in number]
        return Pairs(
            tuple(self.images[i] for i in kept),
            tuple(self.names[i] for i in kept),
            tuple(self.texts[t] for t in texts),
            tuple(number[self.image_of_text[t]] for t in texts),
            self.problems,
        )


def read_pairs(
    annotations: Path,
    images: str | Path,
    form: str = "auto",
    *,
    clean: Callable[[str], str] | None = None,
    split: str = "test",
) -> Pairs:
    """The images and captions of an annotation file.

    Problems that leave the rest usable are listed: those of `read`, captions that cleaning leaves
    empty, missing images, images that are named twice.

    Args:
        annotations: a file of one of FORMS, or a folder of images or tars.
        images: folder that the names of images start from; those of tars are in them.
        form: a key of FORMS; "auto" goes by the file's name and content.
        clean: applied to every caption.
        split: which images of a Karpathy file with a `split` field.

    Raises:
        DataError: the file is missing or not in this form, or it holds no image with a caption.
    """
    file = captions.read(annotations, form, split=split)
    pairs = _pairs_of(file, images, clean or (lambda text: text))
    if not pairs.texts:
        problems = pairs.problems
        first = f"; {len(problems)} problem(s), the first: {problems[0]}" if problems else ""
        raise DataError(
            f"{annotations} holds no image with a caption{first}; check it and its form"
        )
    return pairs


def _pairs_of(file: CaptionFile, root: str | Path, clean: Callable[[str], str]) -> Pairs:
    """The images that are there with their captions, images in the order of the file."""
    problems, paths = file.problems, _paths_of(file, root)
    problems += paths.problems
    texts: list[list[str]] = [[] for _ in file.images]
    for where, number, caption in zip(file.places, file.numbers, file.texts, strict=True):
        if number == captions.BAD:
            continue
        text = clean(caption)
        if text.strip():
            texts[number].append(text)
        else:
            problems.append(file.problem(where, "the caption is empty once it is cleaned"))
    for image, own, tried in zip(file.images, texts, file.tried, strict=True):
        if tried == 1 and not own:
            problems.append(file.problem(image.where, f"{image.name} has no caption"))
    usable = [n for n, path in enumerate(paths.paths) if path is not None and texts[n]]
    return Pairs(
        tuple(path for n in usable if (path := paths.paths[n]) is not None),
        tuple(file.images[n].name for n in usable),
        tuple(text for n in usable for text in texts[n]),
        tuple(number for number, n in enumerate(usable) for _ in texts[n]),
        tuple(problems),
    )


@dataclass
class ImagePaths:
    """Where the images of a file lie: a path or slice for each, None where it has none."""

    paths: list[str | FileSlice | None]
    problems: list[BadSample]


def _paths_of(file: CaptionFile, root: str | Path) -> ImagePaths:
    """Where the images lie; a name that stands twice is a problem of the second."""
    found = ImagePaths([], [])
    first: dict[str, NamedImage] = {}
    for image in file.images:
        before = first.setdefault(captions.file_key(image.name), image)
        reason, path = None, None
        if before is not image:
            reason = f"{image.name} is there already ({file.path} {before.where})"
        else:
            path, reason = image_path(image, root)
        if reason:
            found.problems.append(file.problem(image.where, reason))
        found.paths.append(path)
    return found


def image_path(
    image: NamedImage, root: str | Path, *, flat: bool = False
) -> tuple[str | FileSlice | None, str | None]:
    """Where an image lies, or why it has no place: (path, None) or (None, reason).

    A name `COCO_val2014_…` may lie in the folder `val2014`.

    Args:
        flat: images lie directly in `root`, whatever folder their names have.
    """
    if image.slice is not None:
        return image.slice, None
    name = Path(image.name).name if flat else image.name
    try:
        path = join_inside(root, name)
        coco = _COCO_NAME.match(name)
        if coco and not os.path.exists(path):
            path = join_inside(root, f"{coco[1]}/{name}")
    except BadImage as bad:
        return None, str(bad)
    if not is_address(path) and not os.path.isfile(path):
        return None, f"there is no image {path}{spelled_otherwise(path)}"
    return path, None


# A test split that leaks into training


def leaks(test: Pairs, train: Pairs) -> dict[int, str]:
    """Images of `test` (by number) that `train` shows too, and how that was seen.

    By the file's name without its folder, or by equal bytes under another name; in tars, where
    names are mere numbers, by equal bytes alone. Only files of equal size are read.
    """
    by_name = {
        Path(name).stem: path
        for name, path in zip(train.names, train.images, strict=True)
        if isinstance(path, str)
    }
    sizes: dict[int, list[str | FileSlice]] = {}
    for path in filterfalse(_is_far, train.images):
        sizes.setdefault(_size(path), []).append(path)
    digests: dict[str | FileSlice, bytes] = {}

    def digest(path: str | FileSlice) -> bytes:
        if path not in digests:
            content = path.read() if isinstance(path, FileSlice) else Path(path).read_bytes()
            digests[path] = blake2b(content, digest_size=16).digest()
        return digests[path]

    found: dict[int, str] = {}
    for number, (name, path) in enumerate(zip(test.names, test.images, strict=True)):
        other = by_name.get(Path(name).stem) if isinstance(path, str) else None
        if other is not None:
            found[number] = f"the training data names it too ({other})"
            continue
        if _is_far(path):
            continue
        same = [p for p in sizes.get(_size(path), ()) if digest(p) == digest(path)]
        if same:
            found[number] = f"the training data holds the same file as {same[0]}"
    return found


def _is_far(path: str | FileSlice) -> bool:
    return isinstance(path, str) and is_address(path)


def _size(path: str | FileSlice) -> int:
    return path.size if isinstance(path, FileSlice) else os.path.getsize(path)


def broken(images: Sequence[str | FileSlice]) -> dict[int, str]:
    """Images (by number) that cannot be decoded, and why."""
    found: dict[int, str] = {}

    def reason(path: str | FileSlice) -> str | None:
        try:
            read_rgb(path)
        except BadImage as bad:
            return str(bad)
        return None

    with (
        Progress("images opened", total=len(images)) as progress,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        for number, why in enumerate(threads.map(reason, images)):
            if why is not None:
                found[number] = why
            progress.update()
    return found
