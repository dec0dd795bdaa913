"""Pictures and their captions for retrieval: the published files as they lie, and one's own.

    found = read_pairs(Path("flickr30k_test_karpathy.txt"), "flickr30k/Images", "flickr")
    found.images[found.image_of_text[7]], found.texts[7]

Nothing is repaired: what is wrong is listed in `problems` by file and line, and the caller decides.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import filterfalse
from pathlib import Path
from typing import Any

from internvl.data import convert, tars
from internvl.data.images import (
    IMAGE_ENDINGS,
    BadImage,
    FileSlice,
    is_address,
    join_inside,
    open_rgb,
)
from internvl.data.records import BadSample, DataError
from internvl.log import Progress

_COCO_NAME = re.compile(r"COCO_((?:train|val|test)20\d\d)_")
_TEXT_KEYS = ("caption", "captions", "text", "texts")


@dataclass(frozen=True)
class Row:
    """What an entry of a file says: a picture and its captions, before anything is checked."""

    where: str
    """File and line, or file and entry."""
    image: str
    captions: tuple[tuple[str, str], ...]
    """(where, caption) of each."""
    repeats: bool = False
    """Whether further entries may name the same picture; otherwise that is a duplicate."""
    picture: FileSlice | None = None
    """Where it is no file below the folder of pictures."""


@dataclass(frozen=True)
class Pairs:
    """Pictures in the order of their file, captions in the order of their pictures."""

    images: tuple[str | FileSlice, ...]
    """Paths, or places in tars."""
    names: tuple[str, ...]
    """The pictures as the file names them."""
    texts: tuple[str, ...]
    image_of_text: tuple[int, ...]
    """Which picture a caption belongs to."""
    problems: tuple[BadSample, ...] = ()

    def without(self, images: set[int]) -> "Pairs":
        """The same without some pictures and their captions."""
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
    """The pictures and captions of an annotation file.

    Problems that leave the rest usable are listed: lines of another form, empty captions (before
    or after cleaning), pictures without captions, missing pictures, pictures that are named twice.

    Args:
        annotations: a file of one of FORMS, or a folder of pictures or tars.
        images: folder that the names of pictures start from; those of tars are in them.
        form: a key of FORMS; "auto" goes by the file's name and content.
        clean: applied to every caption.
        split: which pictures of a Karpathy file with a `split` field.

    Raises:
        DataError: the file is missing or not in this form, or it holds no picture with a caption.
    """
    chosen = form_of(annotations) if form == "auto" else form
    if chosen not in FORMS:
        raise DataError(f"{chosen!r} is no form of pairs; known: {', '.join(FORMS)}")
    problems: list[BadSample] = []
    try:
        rows = list(FORMS[chosen](annotations, split, problems))
    except (KeyError, TypeError, AttributeError) as error:
        what = f"key {error} missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{annotations} is not of the form {chosen!r}: {what}") from None
    found = _collect(rows, images, clean or (lambda text: text), problems)
    if not found.texts:
        first = f"; {len(problems)} problem(s), the first: {problems[0]}" if problems else ""
        raise DataError(f"{annotations} holds no picture with a caption{first}")
    return found


def _collect(
    rows: Iterable[Row], root: str | Path, clean: Callable[[str], str], problems: list[BadSample]
) -> Pairs:
    """Rows with the same picture become one picture."""
    paths: dict[str, str | FileSlice] = {}  # name -> path
    first: dict[str, str] = {}  # name -> where
    captions: dict[str, list[str]] = {}
    for row in rows:
        if row.image in first and not row.repeats:
            problems.append(
                BadSample(row.where, f"{row.image} is there already ({first[row.image]})")
            )
            continue
        if row.image not in first:
            first[row.image] = row.where
            path = row.picture or _path(row, root, problems)
            if path is not None:
                paths[row.image] = path
        for where, caption in row.captions:
            text = clean(caption)
            if text.strip():
                captions.setdefault(row.image, []).append(text)
            else:
                problems.append(BadSample(where, "the caption is empty; write it or remove it"))
    for name in paths:
        if name not in captions:
            problems.append(BadSample(first[name], f"{name} has no caption"))
    kept = [name for name in paths if name in captions]
    texts = [(number, text) for number, name in enumerate(kept) for text in captions[name]]
    return Pairs(
        tuple(paths[name] for name in kept),
        tuple(kept),
        tuple(text for _, text in texts),
        tuple(number for number, _ in texts),
        tuple(problems),
    )


def _path(row: Row, root: str | Path, problems: list[BadSample]) -> str | None:
    try:
        path = join_inside(root, row.image)
    except BadImage as bad:
        problems.append(BadSample(row.where, str(bad)))
        return None
    coco = _COCO_NAME.match(row.image)
    if coco and not os.path.exists(path):
        path = join_inside(root, f"{coco[1]}/{row.image}")
    if not is_address(path) and not os.path.isfile(path):
        problems.append(BadSample(row.where, f"there is no image {path}"))
        return None
    return path


# Forms


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of a text file."""
    lines = convert.read_text(path).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        yield f"{path} line {number}", line


def _flickr(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    for number, (where, line) in enumerate(_lines(path)):
        stem, mark, caption = line.partition(".jpg,")
        if number == 0 and line.strip() == "image,caption":
            continue
        if not mark or ".jpg," in caption:
            problems.append(BadSample(where, "not `name.jpg,caption`, with `.jpg,` exactly once"))
            continue
        yield Row(where, f"{stem}.jpg", ((where, caption),), repeats=True)


def _token(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    for where, line in _lines(path):
        image, tab, caption = line.partition("\t")
        if not tab:
            problems.append(BadSample(where, "not `name#0<TAB>caption`"))
            continue
        yield Row(where, image.rpartition("#")[0] or image, ((where, caption),), repeats=True)


def _table(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    """A CSV with a header line that names an image and a caption column."""
    lines = csv.reader(io.StringIO(convert.read_text(path)))
    head = [name.strip().lower() for name in next(lines, [])]
    image = next((head.index(n) for n in ("image", "image_name", "filepath") if n in head), None)
    text = next((head.index(n) for n in (*_TEXT_KEYS, "title") if n in head), None)
    if image is None or text is None:
        raise DataError(f"{path}: its first line must name a column `image` and one `caption`")
    for row in lines:
        where = f"{path} line {lines.line_num}"
        if len(row) != len(head):
            problems.append(
                BadSample(where, f"{len(row)} columns, not {len(head)}; quote captions with commas")
            )
            continue
        yield Row(where, row[image], ((where, row[text]),), repeats=True)


def _jsonl(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    for where, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(BadSample(where, f"not JSON ({error})"))
            continue
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            problems.append(BadSample(where, "no `image`"))
            continue
        yield Row(where, row["image"], _captions(where, row), repeats=True)


def _captions(where: str, row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Captions under any of their usual keys: a text or a list of texts."""
    value: Any = next((row[key] for key in _TEXT_KEYS if key in row), [])
    return tuple((where, str(text)) for text in ([value] if isinstance(value, str) else value))


def _coco(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    """`images` and `annotations`; the pictures' own order."""
    tree = convert.read_json(path)
    texts: dict[Any, list[tuple[str, str]]] = {}
    known = Counter(image["id"] for image in tree["images"])
    seen: set[Any] = set()
    for number, row in enumerate(tree["annotations"], start=1):
        where = f"{path} annotation {row.get('id', number)}"
        if row["image_id"] not in known:
            problems.append(BadSample(where, f"there is no image {row['image_id']}"))
        elif row.get("id") is not None and row["id"] in seen:
            problems.append(BadSample(where, "this id is there already"))
        else:
            texts.setdefault(row["image_id"], []).append((where, row["caption"]))
        seen.add(row.get("id"))
    done: set[Any] = set()
    for image in tree["images"]:
        where = f"{path} image {image['id']}"
        if image["id"] in done:
            problems.append(BadSample(where, "this id is there already"))
            continue
        done.add(image["id"])
        name = image["file_name"] if "file_name" in image else image["image"]
        yield Row(where, name, tuple(texts.get(image["id"], ())))


def _karpathy(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    """Karpathy's `dataset_*.json`, or a list of {image, caption} as LAVIS wrote it."""
    tree = convert.read_json(path)
    if isinstance(tree, list):
        for number, row in enumerate(tree, start=1):
            where = f"{path} entry {number}"
            yield Row(where, row["image"], _captions(where, row), repeats=True)
        return
    splits = Counter(image["split"] for image in tree["images"])
    wanted = ("train", "restval") if split == "train" else (split,)
    if not splits.keys() & {*wanted}:
        raise DataError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
    for number, image in enumerate(tree["images"], start=1):
        if image["split"] in wanted:
            where = f"{path} image {number}"
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            texts = tuple((where, sentence["raw"]) for sentence in image["sentences"])
            yield Row(where, name, texts)


def _xtd(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    """`test_1kcaptions_LANGUAGE.txt` with `test_image_names.txt` beside it, line by line."""
    beside = path.with_name("test_image_names.txt")
    names = [line for _, line in _lines(beside)]
    texts = list(_lines(path))
    if len(names) != len(texts):
        raise DataError(f"{path} has {len(texts)} lines and {beside} {len(names)}; fetch both")
    for name, (where, text) in zip(names, texts, strict=True):
        yield Row(where, name.strip(), ((where, text),))


def _folder(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    """Pictures below a folder, with captions in a `.txt` of the same name, one a line."""
    for image in sorted(path.rglob("*")):
        if image.suffix.lower() in IMAGE_ENDINGS:
            beside = image.with_suffix(".txt")
            lines = tuple(_lines(beside)) if beside.is_file() else ()
            yield Row(str(image), str(image.relative_to(path)), lines)


def _webdataset(path: Path, split: str, problems: list[BadSample]) -> Iterator[Row]:
    """Tars with a picture under each key, and its captions: those of its `.json`, or the lines of
    its `.txt`."""
    for tar in tars.shards(path):
        for row in tars.shard_rows(tar):
            where = f"{path} {row['where']}"
            if "bad" in row:
                problems.append(BadSample(where, row["bad"]))
                continue
            if len(row["slices"]) != 1:
                what = f"a pair has one picture, not {len(row['slices'])}"
                problems.append(BadSample(where, what))
                continue
            tree, lines = row.get("row"), row.get("caption", "").splitlines()
            captions = _captions(where, tree) if isinstance(tree, dict) else ()
            picture = FileSlice(*row["slices"][0])
            texts = captions or tuple((where, line) for line in lines)
            yield Row(where, f"{tar.name}/{picture.name}", texts, picture=picture)


FORMS: dict[str, Callable[[Path, str, list[BadSample]], Iterator[Row]]] = {
    "flickr": _flickr,
    "token": _token,
    "coco": _coco,
    "karpathy": _karpathy,
    "xtd": _xtd,
    "csv": _table,
    "jsonl": _jsonl,
    "folder": _folder,
    "webdataset": _webdataset,
}
"""How pairs are written down: `name.jpg,caption` lines; `name#0<TAB>caption` lines; COCO caption
JSON; Karpathy's JSON; XTD's two texts; CSV with a header; JSONL; pictures with texts beside; tars
of them."""


def form_of(path: Path) -> str:
    """The form of a file by its ending, and where several have one, by its beginning."""
    if path.is_dir():
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    ending = path.suffix.lower()
    if ending == ".json":
        tree = convert.read_json(path)
        return "coco" if isinstance(tree, dict) and "annotations" in tree else "karpathy"
    if ending in (".jsonl", ".csv"):
        return ending[1:]
    if path.name.startswith("test_1kcaptions"):
        return "xtd"
    head = convert.read_text(path)[:4096]
    return "token" if "\t" in head.partition("\n")[0] else "flickr"


# A test split that leaks into training


def leaks(test: Pairs, train: Pairs) -> dict[int, str]:
    """Pictures of `test` (by number) that `train` shows too, and how that was seen.

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
    """Pictures (by number) that cannot be decoded, and why."""
    found: dict[int, str] = {}

    def reason(path: str | FileSlice) -> str | None:
        try:
            open_rgb(path)
        except BadImage as bad:
            return str(bad)
        return None

    with (
        Progress("pictures opened", total=len(images)) as progress,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        for number, why in enumerate(threads.map(reason, images)):
            if why is not None:
                found[number] = why
            progress.update()
    return found
