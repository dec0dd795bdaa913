"""One form of annotation into another: box coordinates, captions, parquet. Files to files.

    convert.run("boxes-to-1000", Path("llava_form.jsonl"), Path("internvl_form.jsonl"))

What is written is there whole or not at all: it is built beside its place and renamed.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from internvl.data import captions, json_rows
from internvl.data.images import opened
from internvl.errors import BadImage, BadSample, DataError, UserError
from internvl.files import first_line
from internvl.log import Progress

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2: left, top, right, bottom."""
Caption = tuple[str, str]
"""Image path and one caption of it."""

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
"""What the original asks for a caption, in training and in evaluation."""

KINDS: dict[str, str] = {
    "boxes-to-1000": "chat JSONL: [x1, y1, x2, y2] in 0-1 to <box>[[x1, y1, x2, y2]]</box> in "
    "0-1000",
    "boxes-to-unit": "chat JSONL: <box>[[x1, y1, x2, y2]]</box> in 0-1000 to [x1, y1, x2, y2] in "
    "0-1",
    "captions": "captions (COCO or Karpathy's JSON, Flickr's text, CSV, JSONL) to chat JSONL",
    "parquet": "a parquet file, or a folder of them, to images/ and annotations.jsonl in a folder",
}
"""What `run` can do."""

_SHOWN = 100  # characters of a box in a message
_ROWS_AT_ONCE = 64  # rows of a parquet file held in memory; their images are a few MB each
_SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}

_FRACTION = r"(?:0?\.\d+|0|1(?:\.0*)?)"
_UNIT_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({_FRACTION})"] * 4) + r"\s*\]")
_FOUR = re.compile(r"\[\s*" + r"\s*,\s*".join([r"[-+]?(?:\d+\.?\d*|\.\d+)"] * 4) + r"\s*\]")
_BOXED = re.compile(r"<box>.*?</box>", re.DOTALL)
_INTEGERS = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    files: tuple[Path, ...]
    counts: dict[str, int] = field(default_factory=dict)
    """What was counted, such as {"lines": 1000, "boxes": 1432}."""


def run(kind: str, source: Path, target: Path) -> Converted:
    """Converts `source` into `target`, as `KINDS[kind]` says.

    Raises:
        UserError: no such kind; DataError, which is one: `source` is missing or not in its form
            (names file and line), or a package is missing (with its install line).
    """
    if kind not in _CONVERTERS:
        raise UserError(f"there is no conversion {kind!r}; known: {', '.join(KINDS)}")
    if not source.exists():
        raise DataError(f"there is no {source} to convert")
    return _CONVERTERS[kind](source, target)


# Boxes


def box_to_1000(box: Box, size: tuple[float, float] = (1, 1)) -> tuple[int, int, int, int]:
    """A box in units of `size` (W, H) as integers 0-1000 of the whole image: round(x / W * 1000).

    Python's rounding: a half goes to the even neighbour, as in the original.

    >>> box_to_1000((0.352, 0.1, 0.5, 1.0))
    (352, 100, 500, 1000)
    >>> box_to_1000((32, 48, 320, 480), size=(640, 480))
    (50, 100, 500, 1000)
    """
    width, height = size
    x1, y1, x2, y2 = box
    return (
        round(x1 / width * 1000),
        round(y1 / height * 1000),
        round(x2 / width * 1000),
        round(y2 / height * 1000),
    )


def box_to_unit(box: Sequence[int]) -> Box:
    """Integers 0-1000 as fractions of the image. `box_to_1000` of the result is `box` again.

    >>> box_to_unit((352, 100, 500, 1000))
    (0.352, 0.1, 0.5, 1.0)
    """
    x1, y1, x2, y2 = (value / 1000 for value in box)
    return x1, y1, x2, y2


def boxes_to_1000(text: str) -> tuple[str, int]:
    """(text, number of boxes): every `[x1, y1, x2, y2]` in 0-1 as a `<box>` in 0-1000.

    Text inside `<box>` stays. So do four numbers that are no box: none has a decimal point, or
    left is right of right, or top below bottom.

    >>> boxes_to_1000("It is at [0.35, 0.1, 0.5, 1.0].")
    ('It is at <box>[[350, 100, 500, 1000]]</box>.', 1)
    """
    count = 0

    def rewrite(match: re.Match[str]) -> str:
        nonlocal count
        x1, y1, x2, y2 = (float(value) for value in match.groups())
        if "." not in match.group() or x1 > x2 or y1 > y2:
            return match.group()
        count += 1
        return f"<box>[{list(box_to_1000((x1, y1, x2, y2)))}]</box>"

    pieces, end = [], 0
    for boxed in _BOXED.finditer(text):
        pieces += [_UNIT_BOX.sub(rewrite, text[end : boxed.start()]), boxed.group()]
        end = boxed.end()
    pieces.append(_UNIT_BOX.sub(rewrite, text[end:]))
    return "".join(pieces), count


def boxes_to_unit(text: str) -> tuple[str, int]:
    """(text, number of boxes): every `<box>[[…], …]</box>` in 0-1000 as `[x1, y1, x2, y2]` in 0-1.

    Several boxes of one mark come out one after the other. A mark without four integers stays.

    >>> boxes_to_unit("It is at <box>[[350, 100, 500, 1000]]</box>.")
    ('It is at [0.35, 0.1, 0.5, 1.0].', 1)
    """
    count = 0

    def rewrite(match: re.Match[str]) -> str:
        nonlocal count
        boxes = [tuple(map(int, box)) for box in _INTEGERS.findall(match.group())]
        if not boxes or max(max(box) for box in boxes) > 1000:
            return match.group()
        count += len(boxes)
        return ", ".join(str(list(box_to_unit(box))) for box in boxes)

    return _BOXED.sub(rewrite, text), count


def _left_in_fractions(text: str) -> str | None:
    """The first four numbers with a decimal point that `boxes_to_1000` left as they are."""
    numbers = _FOUR.findall(_BOXED.sub("", text))
    return next((four for four in numbers if "." in four), None)


def _left_in_1000(text: str) -> str | None:
    """The first mark with a number in it that `boxes_to_unit` left as it is."""
    marks = _BOXED.findall(text)
    return next((mark for mark in marks if re.search(r"\d", mark)), None)


def _convert_boxes(
    rewrite: Callable[[str], tuple[str, int]],
    left: Callable[[str], str | None],
    form: str,
    source: Path,
    target: Path,
) -> Converted:
    """Converts the boxes of all turns.

    Raises:
        DataError: a box is none in `form`; the file would then mix two forms.
    """
    counts = {"lines": 0, "boxes": 0}

    def lines() -> Iterator[str]:
        for number, row in read_jsonl(source):
            counts["lines"] += 1
            for turn in _turns(row):
                turn["value"], boxes = rewrite(turn["value"])
                counts["boxes"] += boxes
                box = left(turn["value"])
                if box is not None:
                    unit = "entry" if json_rows.is_list(source) else "line"
                    raise DataError(
                        f"{source} {unit} {number}: {box[:_SHOWN]} is no box in {form} with left "
                        "before right and top before bottom; put it right or remove the line"
                    )
            yield to_json(row)
        if not counts["lines"]:
            raise DataError(f"{source} is empty, so there is nothing to convert; check the path")

    write_lines(target, lines())
    return Converted((target,), counts)


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a chat line that have a text; what is wrong with others is `check`'s to say."""
    turns = row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    return [t for t in turns if isinstance(t, dict) and isinstance(t.get("value"), str)]


# Captions


def read_captions(path: Path, form: str = "auto") -> list[Caption]:
    """(image, caption) of every caption of a file, in its order, in any form of data/captions/.

    Raises:
        DataError: the file is missing, not in its form, or has problems; lists the first ones.
    """
    file = captions.read_whole(path, form)
    if any(image.slice is not None for image in file.images):
        raise DataError(f"{path} holds images in tars; train on it as it is (type: webdataset)")
    names = [image.name for image in file.images]
    return [(names[number], text.strip()) for number, text in file.captions]


def read_flickr(path: Path) -> list[Caption]:
    """`read_captions` of a text of `name.jpg,caption` lines under a header `image,caption`."""
    return read_captions(path, "flickr")


def read_coco(path: Path) -> list[Caption]:
    """`read_captions` of a COCO caption JSON; an image's path is its `file_name`, or `image`."""
    return read_captions(path, "coco")


def chat_lines(found: Iterable[Caption], prompt: str = CAPTION_PROMPT) -> Iterator[str]:
    """A line of chat JSONL for every caption: the prompt under the image, then the caption."""
    for number, (image, caption) in enumerate(found):
        turns = [
            {"from": "human", "value": f"<image>\n{prompt}"},
            {"from": "gpt", "value": caption},
        ]
        yield to_json({"id": number, "image": image, "conversations": turns})


def coco_form(found: Iterable[Caption]) -> dict[str, list[dict[str, Any]]]:
    """Captions in COCO form, as evaluations read it; images are numbered from 1 as they come."""
    ids: dict[str, int] = {}
    annotations = [
        {"id": number, "image_id": ids.setdefault(image, len(ids) + 1), "caption": caption}
        for number, (image, caption) in enumerate(found, start=1)
    ]
    images = [{"id": number, "file_name": image} for image, number in ids.items()]
    return {"images": images, "annotations": annotations}


def _convert_captions(source: Path, target: Path) -> Converted:
    found = read_captions(source)
    if not found:
        raise DataError(f"{source} holds no caption to convert; check it")
    counts = {
        "lines": write_lines(target, chat_lines(found)),
        "images": len({image for image, _ in found}),
    }
    return Converted((target,), counts)


# Parquet


def parquet_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of parquet files, a few at a time in memory.

    Raises:
        DataError: pyarrow is missing (with its install line), or a file is no parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("parquet files need pyarrow: pip install 'internvl[parquet]'") from None
    for path in files:
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be read as parquet ({first_line(error)}); download it again"
            ) from None


def save_images(row: dict[str, Any], folder: Path, stem: str) -> dict[str, Any]:
    """The row with its images written into `folder` and their paths, from its parent, instead.

    An image is a column {"bytes": …, "path": …} or a list of such, as Hugging Face data sets
    store them; its bytes are not encoded again. All images of a row become its `image`.

    Raises:
        DataError: the bytes are no image Pillow knows.
    """
    kept: dict[str, Any] = {}
    images: list[str] = []
    as_list = False
    for column, value in row.items():
        cells = value if isinstance(value, list) else [value]
        if not cells or not all(map(_is_image, cells)):
            kept[column] = value
            continue
        as_list = as_list or isinstance(value, list)
        for cell in cells:
            number = f"_{len(images)}" if images else ""
            name = f"{stem}{number}{_suffix(cell['bytes'], stem)}"
            (folder / name).write_bytes(cell["bytes"])
            images.append(f"{folder.name}/{name}")
    if images:
        kept["image"] = images if as_list or len(images) > 1 else images[0]
    return kept


def parquet_files(source: Path) -> list[Path]:
    """The parquet file itself, or those below a folder, by name."""
    return [source] if source.is_file() else sorted(source.rglob("*.parquet"))


def _convert_parquet(source: Path, target: Path) -> Converted:
    files = parquet_files(source)
    if not files:
        raise DataError(f"there is no parquet file in {source}; check the path")
    if target.exists():
        raise DataError(f"{target} exists; choose another folder or move it away")
    counts = {"rows": 0, "images": 0}
    with whole_folder(target) as folder, Progress("rows") as progress:
        (folder / "images").mkdir()

        def lines() -> Iterator[str]:
            for row in parquet_rows(files):
                try:
                    saved = save_images(row, folder / "images", f"{counts['rows']:07d}")
                except DataError as error:
                    raise DataError(f"{source} {error}") from None
                counts["rows"] += 1
                counts["images"] += len(images_of(saved))
                progress.update()
                yield to_json(saved)
            if not counts["rows"]:
                raise DataError(f"{source} holds no row to convert; check the path")

        write_lines(folder / "annotations.jsonl", lines())
    return Converted((target / "annotations.jsonl", target / "images"), counts)


def _is_image(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("bytes"), bytes)


def _suffix(data: bytes, stem: str) -> str:
    try:
        with opened(data) as image:
            return _SUFFIX.get(image.format or "", f".{(image.format or 'img').lower()}")
    except BadImage as error:
        raise DataError(f"row {stem}: {error}") from None


# Files


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank, or of every entry of a JSON list.

    Raises:
        DataError: missing, a line that is no JSON object, or with half a character in it; names
            file and line.
    """
    try:
        if json_rows.is_list(path):
            for number, entry in enumerate(json_rows.entries(path), start=1):
                yield number, _object(f"{path} entry {number}", entry.encode())
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(f"{path} line {number}", line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from None


def _object(name: str, line: bytes) -> dict[str, Any]:
    try:
        return json_rows.parse_row(name, line)
    except BadSample as bad:
        raise DataError(str(bad)) from None


def images_of(row: dict[str, Any]) -> list[str]:
    """The image paths of a chat line; none where it has no image.

    Raises:
        DataError: `image` is neither a path nor a list of paths.
    """
    image = row.get("image") or []
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError(f"`image` must be a path or a list of paths, not {image!r}")
    return paths


_ENCODER = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` would make one a line


def to_json(value: Any) -> str:
    """One line of JSON, letters unescaped."""
    return _ENCODER.encode(value)


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Writes a text file whole or not at all; returns the number of lines."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
                count += 1
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return count


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `path` when everything went well, else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as beside:
        folder = Path(beside) / path.name
        folder.mkdir()
        yield folder
        if path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)  # an empty folder is in nobody's way
        folder.rename(path)


_CONVERTERS: dict[str, Callable[[Path, Path], Converted]] = {
    "boxes-to-1000": partial(_convert_boxes, boxes_to_1000, _left_in_fractions, "0-1"),
    "boxes-to-unit": partial(_convert_boxes, boxes_to_unit, _left_in_1000, "0-1000"),
    "captions": _convert_captions,
    "parquet": _convert_parquet,
}
