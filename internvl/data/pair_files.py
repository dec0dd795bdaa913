"""Resolves a caption file to image files that exist; finds leaked and broken images.

    pairs = read_pairs(Path("flickr30k_test_karpathy.txt"), "flickr30k/Images", "flickr")
    pairs.images[pairs.image_of_text[7]], pairs.texts[7]

Problems are listed in `problems` by file and line, and the caller decides.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import filterfalse
from pathlib import Path

from internvl.data import captions
from internvl.data.captions import CaptionFile, NamedImage
from internvl.data.images import FileSlice, is_address, join_inside, read_rgb, remedy_for_missing
from internvl.errors import BadImage, BadSample, DataError, counted
from internvl.log import Progress

# Only releases up to 2014 name their split in the file's name; 2017's names are bare numbers.
_COCO_NAME = re.compile(r"COCO_((?:train|val|test)20\d\d)_")


@dataclass(frozen=True)
class Pairs:
    """Images in the order of the caption file, captions in the order of their images."""

    images: tuple[str | FileSlice, ...]
    """Paths, or slices of tars."""
    names: tuple[str, ...]
    """Image names as the file has them."""
    texts: tuple[str, ...]
    image_of_text: tuple[int, ...]
    """Index in `images` of every text's image."""
    problems: tuple[BadSample, ...] = ()

    def without(self, images: set[int]) -> "Pairs":
        """Returns a copy without these images (indices) and their captions."""
        remaining = [i for i in range(len(self.images)) if i not in images]
        new_index = {old: new for new, old in enumerate(remaining)}
        texts = [t for t, image in enumerate(self.image_of_text) if image in new_index]
        return Pairs(
            tuple(self.images[i] for i in remaining),
            tuple(self.names[i] for i in remaining),
            tuple(self.texts[t] for t in texts),
            tuple(new_index[self.image_of_text[t]] for t in texts),
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
    """Reads the images and captions of an annotation file.

    `problems` lists what leaves the rest usable: problems of `captions.read`, captions that are
    empty once cleaned, missing images, images that are named twice.

    Args:
        annotations: a file of one of FORMS, or a folder of images or tars.
        images: folder that image names start from; not used for tars.
        form: a key of FORMS; "auto" goes by the file's name and content.
        clean: applied to every caption.
        split: the split to read of a Karpathy file with a `split` field.

    Raises:
        DataError: the file is missing or not in this form, or it holds no image with a caption.
    """
    file = captions.read(annotations, form, split=split)
    pairs = _pairs_of(file, images, clean or (lambda text: text))
    if not pairs.texts:
        problems = pairs.problems
        first = (
            f"; {counted(len(problems), 'problem')}, the first: {problems[0]}" if problems else ""
        )
        raise DataError(
            f"{annotations} holds no image with a caption{first}; check it and its form"
        )
    return pairs


def _pairs_of(file: CaptionFile, root: str | Path, clean: Callable[[str], str]) -> Pairs:
    """Returns the images that exist with their captions, images in the order of the file."""
    problems, paths = file.problems, _resolve_paths(file, root)
    problems += paths.problems
    # Captions of an image need not stand together in the file.
    texts: list[list[str]] = [[] for _ in file.images]
    rows = zip(file.locations, file.image_indices, file.texts, strict=True)
    for location, image_index, caption in rows:
        if image_index == captions.BAD:
            continue
        text = clean(caption)
        # The model would embed an empty text as any other, so the recall would count it.
        if text.strip():
            texts[image_index].append(text)
        else:
            problems.append(file.problem(location, "the caption is empty once it is cleaned"))
    for image, image_texts, tried in zip(file.images, texts, file.tried, strict=True):
        # 0 is named by `captions.read` already, 2 with the repeated id that made it unusable.
        if tried == 1 and not image_texts:
            problems.append(file.problem(image.where, f"{image.name} has no caption"))
    usable = [n for n, path in enumerate(paths.paths) if path is not None and texts[n]]
    return Pairs(
        tuple(path for n in usable if (path := paths.paths[n]) is not None),
        tuple(file.images[n].name for n in usable),
        tuple(text for n in usable for text in texts[n]),
        tuple(index for index, n in enumerate(usable) for _ in texts[n]),
        tuple(problems),
    )


@dataclass
class ImagePaths:
    """Paths or tar slices of a caption file's images, in its order."""

    paths: list[str | FileSlice | None]
    """None for an image that has a problem."""
    problems: list[BadSample]


def _resolve_paths(file: CaptionFile, root: str | Path) -> ImagePaths:
    """Resolves image names below `root`; a name that stands twice is a problem of the second."""
    resolved = ImagePaths([], [])
    first: dict[str, NamedImage] = {}
    for image in file.images:
        # Two images of one file would each be a wrong result for the other's captions.
        earlier = first.setdefault(captions.file_key(image.name), image)
        reason, path = None, None
        if earlier is not image:
            reason = f"{image.name} is there already ({file.path} {earlier.where})"
        else:
            path, reason = image_path(image, root)
        if reason:
            resolved.problems.append(file.problem(image.where, reason))
        resolved.paths.append(path)
    return resolved


def image_path(
    image: NamedImage, root: str | Path, *, flat: bool = False
) -> tuple[str | FileSlice | None, str | None]:
    """Resolves an image name: (path or slice, None), or (None, what is wrong).

    A file `COCO_val2014_…` may lie in the folder `val2014`.

    Args:
        flat: images lie directly in `root`; folders in their names are ignored.
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
    # Addresses are not looked up: that is a request for every image.
    if not is_address(path) and not os.path.isfile(path):
        return None, f"there is no image {path}{remedy_for_missing(path)}"
    return path, None


def leaks(test: Pairs, train: Pairs) -> dict[int, str]:
    """Finds test images that are in the training data: index in `test` -> evidence.

    Evidence is an equal file name (any folder) or equal bytes; for images in tars equal bytes only.
    """
    # Names in tars are mere numbers, equal by chance.
    by_name = {
        Path(name).stem: path
        for name, path in zip(train.names, train.images, strict=True)
        if isinstance(path, str)
    }
    # By size first, so that only files of equal size are read.
    sizes: dict[int, list[str | FileSlice]] = {}
    for path in filterfalse(_is_remote, train.images):
        sizes.setdefault(_size(path), []).append(path)
    # A training image is compared with several test images of its size.
    digests: dict[str | FileSlice, bytes] = {}

    def digest(path: str | FileSlice) -> bytes:
        if path not in digests:
            content = path.read() if isinstance(path, FileSlice) else Path(path).read_bytes()
            digests[path] = blake2b(content, digest_size=16).digest()
        return digests[path]

    leaked: dict[int, str] = {}
    for index, (name, path) in enumerate(zip(test.names, test.images, strict=True)):
        other = by_name.get(Path(name).stem) if isinstance(path, str) else None
        if other is not None:
            leaked[index] = f"the training data names it too ({other})"
            continue
        if _is_remote(path):
            continue
        same = [p for p in sizes.get(_size(path), ()) if digest(p) == digest(path)]
        if same:
            leaked[index] = f"the training data holds the same file as {same[0]}"
    return leaked


def _is_remote(path: str | FileSlice) -> bool:
    return isinstance(path, str) and is_address(path)


def _size(path: str | FileSlice) -> int:
    return path.size if isinstance(path, FileSlice) else os.path.getsize(path)


def broken(images: Sequence[str | FileSlice]) -> dict[int, str]:
    """Decodes all images; returns index -> reason of those that cannot be decoded."""
    with Progress("images opened", total=len(images)) as progress:
        reasons: dict[int, str] = {}
        for index, problem in enumerate(decode_all(images)):
            if problem is not None:
                reasons[index] = problem
            progress.update()
    return reasons


def decode_all(images: Sequence[str | FileSlice]) -> Iterator[str | None]:
    """Decodes images ahead in threads; yields for each, in order, why it cannot be, or None."""

    def reason(path: str | FileSlice) -> str | None:
        try:
            read_rgb(path)
        except BadImage as bad:
            return str(bad)
        return None

    # Threads suffice: Pillow's decoders release the GIL.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        yield from threads.map(reason, images)
