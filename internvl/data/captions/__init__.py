"""Images and their captions, read from every published form by one reader with one set of rules.

    file = read(Path("captions_val2014.json"))          # for training, conversion, evaluation
    [(file.images[number].name, text) for number, text in file.captions]

Nothing is repaired and nothing is left out in silence: what cannot be read exactly is a BadSample
with its line or entry, among the rows where it stands, and the caller decides.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internvl.data import tars
from internvl.data.captions.caption_file import BAD, CaptionFile, ImageId, NamedImage, file_key
from internvl.data.captions.coco import coco_number, read_coco
from internvl.data.captions.json_entries import (
    entry_texts,
    karpathy_names,
    read_json_lines,
    read_karpathy,
)
from internvl.data.captions.lines import (
    numbered_lines,
    read_csv,
    read_lines,
    split_any,
    split_flickr,
    split_token,
)
from internvl.data.images import IMAGE_ENDINGS, FileSlice
from internvl.data.json_rows import not_json, parse_line, read_json
from internvl.data.texts import problem_lines, read_text
from internvl.errors import DataError

__all__ = [
    "BAD",
    "FORMS",
    "CaptionFile",
    "ImageId",
    "NamedImage",
    "coco_number",
    "file_key",
    "form_of",
    "karpathy_names",
    "read",
    "read_whole",
]


def read(
    path: Path, form: str = "auto", *, split: str = "test", images: Path | None = None
) -> CaptionFile:
    """Reads a file of captions with everything that is wrong with it.

    Args:
        path: a file of one of FORMS, or a folder of images or tars.
        form: a key of FORMS; "auto" goes by the file's name and content.
        split: which images of a Karpathy file with a `split` field; "train" takes "restval" too.
        images: Karpathy's list of the images that are meant, by COCO's ids in their names, for a
            COCO file that lists more of them, or only their ids.

    Raises:
        DataError: the file is missing or not in this form at all.
    """
    if form != "auto" and form not in FORMS:
        raise DataError(f"{form!r} is no form of captions; known: {', '.join(FORMS)}")
    file = CaptionFile(path, split)
    with _collector_paused():
        chosen = form_of(path) if form == "auto" else form
        if images is not None:
            read_coco(file, tree=read_json(path), chosen=images)
        elif chosen in _BY_CONTENT:
            _BY_CONTENT[chosen](file)
        else:
            file.form = chosen
            FORMS[chosen](file)
        _name_bare_images(file)
    return file


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeps the garbage collector from walking a large JSON tree again and again while it grows:
    a third of the time of reading COCO's training captions, and nothing in it is a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_whole(
    path: Path, form: str = "auto", *, split: str = "test", images: Path | None = None
) -> CaptionFile:
    """Reads a file of captions that must be free of problems, as `read`.

    Raises:
        DataError: as `read`, or the file has problems; it lists the first ones.
    """
    file = read(path, form, split=split, images=images)
    problems = file.problems
    if problems:
        head = f"{path} has {len(problems):,} problem(s); put them right and start again"
        raise DataError("\n".join([head, *problem_lines(problems)]))
    return file


def _name_bare_images(file: CaptionFile) -> None:
    """Adds a problem for every image that no caption names, not even a bad one."""
    for image, tried in zip(file.images, file.tried, strict=True):
        if not tried:
            file.bad(image.where, f"{image.name} has no caption; write one or remove the image")


def _read_json(file: CaptionFile) -> None:
    """A `.json` or `.jsonl` file by what it holds: COCO, Karpathy, a list of entries, or lines."""
    text = read_text(file.path)
    whole, named_lines = text.strip(), file.path.suffix.lower() == ".jsonl"
    first, more, _ = whole.partition("\n")
    tree: Any = None
    lines = bool(more) and _is_object(first)
    if not lines:
        try:
            tree = parse_line(whole)
        except ValueError as error:
            if not named_lines or whole[:1] in ("", "<"):
                raise not_json(file.path, whole, error) from None
            lines = True
    if isinstance(tree, dict) and not tree.keys() & {"images", "annotations"}:
        lines = lines or named_lines or "image" in tree
    if lines:
        file.form = "jsonl"
        read_json_lines(file, text)
        return
    if isinstance(tree, dict) and "annotations" in tree:
        file.form = "coco"
        read_coco(file, tree=tree)
    else:
        file.form = "karpathy"
        read_karpathy(file, tree)


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_line(line), dict)
    except ValueError:
        return False


def _read_xtd(file: CaptionFile) -> None:
    """`test_1kcaptions_LANGUAGE.txt` with `test_image_names.txt` beside it, line by line."""
    beside = file.path.with_name("test_image_names.txt")
    names = list(numbered_lines(read_text(beside)))
    texts = list(numbered_lines(read_text(file.path)))
    if len(names) != len(texts):
        raise DataError(f"{file.path} has {len(texts)} lines and {beside} {len(names)}; fetch both")
    for (number, name), (_, text) in zip(names, texts, strict=True):
        where = f"line {number}"
        file.captions_of(where, file.image(where, name.strip()), [text])


def _read_folder(file: CaptionFile) -> None:
    """Images below a folder, with captions in a `.txt` of the same name, one a line."""
    entries = sorted(file.path.rglob("*"))
    texts = {entry for entry in entries if entry.suffix.lower() == ".txt"}
    for entry in entries:
        if entry.suffix.lower() not in IMAGE_ENDINGS:
            continue
        name = str(entry.relative_to(file.path))
        image = file.image(name, name)
        beside = entry.with_suffix(".txt")
        if beside in texts and beside.is_file():
            texts.discard(beside)
            lines = list(numbered_lines(read_text(beside)))
            for number, line in lines if image is not None else ():
                where = f"{beside.relative_to(file.path)} line {number}"
                file.captions_of(where, image, [line])
    for left in sorted(texts):
        if left.stem.lower() not in ("readme", "license"):
            file.bad(str(left.relative_to(file.path)), "there is no image of this name beside it")


def _read_webdataset(file: CaptionFile) -> None:
    """Tars with an image under each key, and its captions: those of its `.json`, or the lines of
    its `.txt`."""
    for tar in tars.shards(file.path):
        for row in tars.shard_rows(tar):
            where = row["where"]
            if "bad" in row:
                file.bad(where, row["bad"])
                continue
            if len(row["slices"]) != 1:
                file.bad(where, f"a pair has one image, not {len(row['slices'])}")
                continue
            tree, lines = row.get("row"), row.get("caption", "").removeprefix("\ufeff")
            texts = entry_texts(tree) if isinstance(tree, dict) else []
            slice = FileSlice(*row["slices"][0])
            image = file.image(where, f"{tar.name}/{slice.name}", slice=slice)
            file.captions_of(where, image, texts or lines.splitlines())


FORMS: dict[str, Callable[[CaptionFile], None]] = {
    "flickr": lambda file: read_lines(file, split_flickr),
    "token": lambda file: read_lines(file, split_token),
    "coco": read_coco,
    "karpathy": read_karpathy,
    "xtd": _read_xtd,
    "csv": lambda file: read_csv(file, read_text(file.path)),
    "jsonl": read_json_lines,
    "folder": _read_folder,
    "webdataset": _read_webdataset,
}
"""How captions are written down: `name.jpg,caption` lines; `name#0<TAB>caption` lines; COCO caption
JSON; Karpathy's JSON; XTD's two texts; CSV with a header; JSONL; images with texts beside; tars
of them."""

_BY_CONTENT: dict[str, Callable[[CaptionFile], None]] = {
    "json": _read_json,
    "lines": lambda file: read_lines(file, split_any),
}
"""What `form_of` leaves to the content."""


def form_of(path: Path) -> str:
    """The form of a file by its name: a key of FORMS, or "json" or "lines", which go by content."""
    if path.is_dir():
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    ending = path.suffix.lower()
    if ending in (".json", ".jsonl"):
        return "json"
    if path.name.startswith("test_1kcaptions"):
        return "xtd"
    return "lines"
