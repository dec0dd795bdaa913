"""Reads images and captions from every published form, by one set of rules.

    file = read(Path("captions_val2014.json"))          # for training, conversion, evaluation
    [(file.images[index].name, text) for index, text in file.captions]

Nothing is repaired and nothing is dropped silently: a row that cannot be read exactly becomes a
BadSample with its line or entry, and the caller decides.
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
from internvl.errors import DataError, counted

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
    """Reads a caption file; its problems are among its rows.

    Args:
        path: a file of one of FORMS, or a folder of images or tars.
        form: a key of FORMS; "auto" goes by the file's name and content.
        split: the split to read of a Karpathy file; "train" includes "restval".
        images: Karpathy's list of images to read of a COCO file, matched by the COCO ids in their
            names; the file may list more images, or only ids.

    Raises:
        DataError: the file is missing or not in this form at all.
    """
    if form != "auto" and form not in FORMS:
        raise DataError(f"{form!r} is no form of captions; known: {', '.join(FORMS)}")
    file = CaptionFile(path, split)
    with _collector_paused():
        chosen = form_of(path) if form == "auto" else form
        # A list of images belongs to a COCO file, whatever `form` says.
        if images is not None:
            read_coco(file, tree=read_json(path), chosen=images)
        elif chosen in _BY_CONTENT:
            _BY_CONTENT[chosen](file)
        else:
            file.form = chosen
            FORMS[chosen](file)
        _report_bare_images(file)
    return file


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Disables the cyclic garbage collector while a JSON tree grows."""
    enabled = gc.isenabled()
    # It would walk the growing tree again and again: a third of the time of reading COCO's
    # training captions, and no node of a JSON tree is part of a cycle.
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_whole(
    path: Path, form: str = "auto", *, split: str = "test", images: Path | None = None
) -> CaptionFile:
    """Reads a caption file that must have no problems; arguments as of `read`.

    Raises:
        DataError: as `read`, or the file has problems; it lists the first ones.
    """
    file = read(path, form, split=split, images=images)
    problems = file.problems
    if problems:
        head = f"{path} has {counted(len(problems), 'problem')}; put them right and start again"
        raise DataError("\n".join([head, *problem_lines(problems)]))
    return file


def _report_bare_images(file: CaptionFile) -> None:
    """Adds a problem for every image without a caption row, good or bad."""
    for image, tried in zip(file.images, file.tried, strict=True):
        if not tried:
            file.bad(image.where, f"{image.name} has no caption; write one or remove the image")


def _read_json(file: CaptionFile) -> None:
    """Reads a `.json` or `.jsonl` file by content: COCO, Karpathy, a list of entries, or lines."""
    text = read_text(file.path)
    whole, named_lines = text.strip(), file.path.suffix.lower() == ".jsonl"
    first, more, _ = whole.partition("\n")
    tree: Any = None
    # A first line that is an object alone means lines: a whole JSON file would fail to parse there.
    lines = bool(more) and _is_object(first)
    if not lines:
        try:
            tree = parse_line(whole)
        except ValueError as error:
            # An empty file and an HTML page of an error are no lines, whatever the file is called.
            if not named_lines or whole[:1] in ("", "<"):
                raise not_json(file.path, whole, error) from None
            lines = True
    if isinstance(tree, dict) and not tree.keys() & {"images", "annotations"}:
        # A single line parses as a whole tree.
        lines = lines or named_lines or "image" in tree
    # `form` is set here: callers sort the captions of a COCO file by image, those of others not.
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
    """Reads XTD's `test_1kcaptions_LANGUAGE.txt` and, line by line, `test_image_names.txt`."""
    names_path = file.path.with_name("test_image_names.txt")
    names = list(numbered_lines(read_text(names_path)))
    texts = list(numbered_lines(read_text(file.path)))
    # A caption line does not name its image: one line too few would shift all that follow.
    if len(names) != len(texts):
        raise DataError(
            f"{file.path} has {len(texts)} lines and {names_path} {len(names)}; fetch both"
        )
    for (line_number, name), (_, text) in zip(names, texts, strict=True):
        where = f"line {line_number}"
        file.add_captions(where, file.image(where, name.strip()), [text])


def _read_folder(file: CaptionFile) -> None:
    """Reads images below a folder; their captions are the lines of a `.txt` of the same name."""
    entries = sorted(file.path.rglob("*"))
    texts = {entry for entry in entries if entry.suffix.lower() == ".txt"}
    for entry in entries:
        if entry.suffix.lower() not in IMAGE_ENDINGS:
            continue
        name = str(entry.relative_to(file.path))
        image = file.image(name, name)
        text_path = entry.with_suffix(".txt")
        if text_path in texts and text_path.is_file():
            texts.discard(text_path)
            lines = list(numbered_lines(read_text(text_path)))
            for line_number, line in lines if image is not None else ():
                where = f"{text_path.relative_to(file.path)} line {line_number}"
                file.add_captions(where, image, [line])
    for unused in sorted(texts):
        # Downloaded folders hold texts that describe the data set.
        if unused.stem.lower() not in ("readme", "license"):
            file.bad(str(unused.relative_to(file.path)), "there is no image of this name beside it")


def _read_webdataset(file: CaptionFile) -> None:
    """Reads tars; captions are those of an image's `.json`, or else the lines of its `.txt`."""
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
            # Members of different tars may share a name, so the tar's is part of it.
            image = file.image(where, f"{tar.name}/{slice.name}", slice=slice)
            file.add_captions(where, image, texts or lines.splitlines())


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
"""Form -> its reader: `name.jpg,caption` lines; `name#0<TAB>caption` lines; COCO caption JSON;
Karpathy's JSON; XTD's two texts; CSV with a header; JSONL; images with texts beside; tars of them.
"""

_BY_CONTENT: dict[str, Callable[[CaptionFile], None]] = {
    "json": _read_json,
    "lines": lambda file: read_lines(file, split_any),
}
"""Readers that decide by content, for what `form_of` cannot tell from a name."""


def form_of(path: Path) -> str:
    """Returns the form by the file's name: a key of FORMS, or "json" or "lines" (by content)."""
    if path.is_dir():
        return "webdataset" if any(path.glob("*.tar")) else "folder"
    # Compressed tars too, so that the tar reader can say that they must be uncompressed.
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return "webdataset"
    ending = path.suffix.lower()
    if ending in (".json", ".jsonl"):
        return "json"
    if path.name.startswith("test_1kcaptions"):
        return "xtd"
    return "lines"
