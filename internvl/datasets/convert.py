"""Converts annotation files: box coordinates, captions, parquet.

    convert.run("boxes-to-1000", Path("llava_form.jsonl"), Path("internvl_form.jsonl"))

Outputs are atomic: written under a temporary name in the same folder and renamed.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from internvl.data import captions, json_rows
from internvl.data.images import open_checked
from internvl.errors import BadImage, BadSample, DataError, UserError
from internvl.files import complete_folder, first_line, write_lines
from internvl.log import Progress

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2: left, top, right, bottom."""
Caption = tuple[str, str]
"""(image path, one of its captions)."""

CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
"""The original's prompt for a caption, in training and in evaluation."""

KINDS: dict[str, str] = {
    "boxes-to-1000": "chat JSONL: [x1, y1, x2, y2] in 0-1 to <box>[[x1, y1, x2, y2]]</box> in "
    "0-1000",
    "boxes-to-unit": "chat JSONL: <box>[[x1, y1, x2, y2]]</box> in 0-1000 to [x1, y1, x2, y2] in "
    "0-1",
    "captions": "captions (COCO or Karpathy's JSON, Flickr's text, CSV, JSONL) to chat JSONL",
    "parquet": "a parquet file, or a folder of them, to images/ and annotations.jsonl in a folder",
}
"""Conversion -> its description."""

_SHOWN = 100  # characters of a box in a message
_ROWS_AT_ONCE = 64  # rows of a parquet file held in memory; their images are a few MB each
_SUFFIX = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}

# 0 and 1 without a decimal point too: boxes at the border of an image have them.
_FRACTION = r"(?:0?\.\d+|0|1(?:\.0*)?)"
_UNIT_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({_FRACTION})"] * 4) + r"\s*\]")
_FOUR = re.compile(r"\[\s*" + r"\s*,\s*".join([r"[-+]?(?:\d+\.?\d*|\.\d+)"] * 4) + r"\s*\]")
_BOXED = re.compile(r"<box>.*?</box>", re.DOTALL)
_INTEGERS = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")


@dataclass(frozen=True)
class Converted:
    """Files written by a conversion."""

    files: tuple[Path, ...]
    counts: dict[str, int] = field(default_factory=dict)
    """Such as {"lines": 1000, "boxes": 1432}."""


def run(conversion: str, source: Path, target: Path) -> Converted:
    """Converts `source` into `target` by the conversion of this name, a key of KINDS.

    Raises:
        UserError: no such kind; DataError, which is one: `source` is missing or not in its form
            (names file and line), or a package is missing (with its install line).
    """
    if conversion not in _CONVERTERS:
        raise UserError(f"there is no conversion {conversion!r}; known: {', '.join(KINDS)}")
    if not source.exists():
        raise DataError(f"there is no {source} to convert")
    return _CONVERTERS[conversion](source, target)


def box_to_1000(box: Box, size: tuple[float, float] = (1, 1)) -> tuple[int, int, int, int]:
    """Converts a box in units of `size` (W, H) to integers 0-1000: round(x / W * 1000).

    >>> box_to_1000((0.352, 0.1, 0.5, 1.0))
    (352, 100, 500, 1000)
    >>> box_to_1000((32, 48, 320, 480), size=(640, 480))
    (50, 100, 500, 1000)
    """
    width, height = size
    x1, y1, x2, y2 = box
    # Python's `round`: a half goes to the even neighbour, as in the original.
    return (
        round(x1 / width * 1000),
        round(y1 / height * 1000),
        round(x2 / width * 1000),
        round(y2 / height * 1000),
    )


def box_to_unit(box: Sequence[int]) -> Box:
    """Converts integers 0-1000 to fractions of the image; `box_to_1000` is its inverse.

    >>> box_to_unit((352, 100, 500, 1000))
    (0.352, 0.1, 0.5, 1.0)
    """
    x1, y1, x2, y2 = (value / 1000 for value in box)
    return x1, y1, x2, y2


def boxes_to_1000(text: str) -> tuple[str, int]:
    """Rewrites every `[x1, y1, x2, y2]` in 0-1 as `<box>` in 0-1000: (text, number of boxes).

    Text inside `<box>` stays. So do four numbers without a decimal point, with x1 > x2 or y1 > y2.

    >>> boxes_to_1000("It is at [0.35, 0.1, 0.5, 1.0].")
    ('It is at <box>[[350, 100, 500, 1000]]</box>.', 1)
    """
    count = 0

    def rewrite(match: re.Match[str]) -> str:
        nonlocal count
        x1, y1, x2, y2 = (float(value) for value in match.groups())
        # [0, 1, 1, 0] is rather a list of the text than a box.
        if "." not in match.group() or x1 > x2 or y1 > y2:
            return match.group()
        count += 1
        return f"<box>[{list(box_to_1000((x1, y1, x2, y2)))}]</box>"

    # Only between the marks: a box in 0-1000 may consist of zeros and ones.
    pieces, end = [], 0
    for boxed in _BOXED.finditer(text):
        pieces += [_UNIT_BOX.sub(rewrite, text[end : boxed.start()]), boxed.group()]
        end = boxed.end()
    pieces.append(_UNIT_BOX.sub(rewrite, text[end:]))
    return "".join(pieces), count


def boxes_to_unit(text: str) -> tuple[str, int]:
    """Rewrites every `<box>[[…], …]</box>` in 0-1000 as `[x1, y1, x2, y2]` in 0-1: (text, number
    of boxes).

    Several boxes of one mark are joined by commas. A mark without four integers stays.

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
    """Returns the first four numbers with a decimal point that `boxes_to_1000` did not rewrite."""
    numbers = _FOUR.findall(_BOXED.sub("", text))
    return next((four for four in numbers if "." in four), None)


def _left_in_1000(text: str) -> str | None:
    """Returns the first mark with a digit in it that `boxes_to_unit` did not rewrite."""
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

    Args:
        rewrite: text -> (text, number of boxes).
        left: returns a box that `rewrite` did not convert, or None.
        form: the range of the source's coordinates, for messages.

    Raises:
        DataError: a box is not in `form`.
    """
    counts = {"lines": 0, "boxes": 0}

    def lines() -> Iterator[str]:
        for row_number, row in read_jsonl(source):
            counts["lines"] += 1
            for turn in _turns(row):
                turn["value"], boxes = rewrite(turn["value"])
                counts["boxes"] += boxes
                box = left(turn["value"])
                # Not left as it is: the file would mix two forms, and a model learn both.
                if box is not None:
                    unit = "entry" if json_rows.is_list(source) else "line"
                    raise DataError(
                        f"{source} {unit} {row_number}: {box[:_SHOWN]} is no box in {form} with "
                        "left before right and top before bottom; put it right or remove the line"
                    )
            yield to_json(row)
        if not counts["lines"]:
            raise DataError(f"{source} is empty, so there is nothing to convert; check the path")

    write_lines(target, lines())
    return Converted((target,), counts)


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the turns of a chat line that have a text."""
    # Others are passed through: `internvl check` reports them.
    turns = row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    return [t for t in turns if isinstance(t, dict) and isinstance(t.get("value"), str)]


def read_captions(path: Path, form: str = "auto") -> list[Caption]:
    """Reads (image, caption) for every caption of a file, in its order; `form` as `captions.read`.

    Raises:
        DataError: the file is missing, not in its form, or has problems; lists the first ones.
    """
    file = captions.read_whole(path, form)
    if any(image.slice is not None for image in file.images):
        raise DataError(f"{path} holds images in tars; train on it as it is (type: webdataset)")
    names = [image.name for image in file.images]
    return [(names[index], text.strip()) for index, text in file.captions]


def read_flickr(path: Path) -> list[Caption]:
    """Reads `name.jpg,caption` lines, see `read_captions`."""
    return read_captions(path, "flickr")


def read_coco(path: Path) -> list[Caption]:
    """Reads COCO caption JSON, see `read_captions`; paths are those of `file_name` or `image`."""
    return read_captions(path, "coco")


def chat_lines(pairs: Iterable[Caption], prompt: str = CAPTION_PROMPT) -> Iterator[str]:
    """Yields a line of chat JSONL for every caption: the prompt under the image, the caption."""
    for row_id, (image, caption) in enumerate(pairs):
        turns = [
            {"from": "human", "value": f"<image>\n{prompt}"},
            {"from": "gpt", "value": caption},
        ]
        yield to_json({"id": row_id, "image": image, "conversations": turns})


def coco_form(pairs: Iterable[Caption]) -> dict[str, list[dict[str, Any]]]:
    """Converts captions to COCO form; image ids count from 1 in order of appearance."""
    ids: dict[str, int] = {}
    annotations = [
        {"id": row_id, "image_id": ids.setdefault(image, len(ids) + 1), "caption": caption}
        for row_id, (image, caption) in enumerate(pairs, start=1)
    ]
    images = [{"id": image_id, "file_name": image} for image, image_id in ids.items()]
    return {"images": images, "annotations": annotations}


def _convert_captions(source: Path, target: Path) -> Converted:
    pairs = read_captions(source)
    if not pairs:
        raise DataError(f"{source} holds no caption to convert; check it")
    counts = {
        "lines": write_lines(target, chat_lines(pairs)),
        "images": len({image for image, _ in pairs}),
    }
    return Converted((target,), counts)


def parquet_rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yields the rows of parquet files.

    Raises:
        DataError: pyarrow is missing (with its install line), or a file is no parquet file.
    """
    # Here: pyarrow is an extra, which the other conversions do not need.
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError("parquet files need pyarrow: pip install 'internvl[parquet]'") from None
    for path in files:
        try:
            # In batches: a file with its images is larger than memory.
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path} cannot be read as parquet ({first_line(error)}); download it again"
            ) from None


def save_images(row: dict[str, Any], folder: Path, stem: str) -> dict[str, Any]:
    """Writes a row's images into `folder`; returns the row with their paths under `image`.

    An image is a column {"bytes": …, "path": …} or a list of such, as Hugging Face data sets
    store them. Paths start from the folder's parent.

    Raises:
        DataError: the bytes are no image Pillow knows.
    """
    converted: dict[str, Any] = {}
    images: list[str] = []
    as_list = False
    for column, value in row.items():
        cells = value if isinstance(value, list) else [value]
        if not cells or not all(map(_is_image, cells)):
            converted[column] = value
            continue
        as_list = as_list or isinstance(value, list)
        for cell in cells:
            suffix = f"_{len(images)}" if images else ""
            name = f"{stem}{suffix}{_suffix(cell['bytes'], stem)}"
            # The bytes as they are: encoding a JPEG again would lose some of it.
            (folder / name).write_bytes(cell["bytes"])
            images.append(f"{folder.name}/{name}")
    if images:
        # A list column stays a list, be it of one image: rows of a file should have one form.
        converted["image"] = images if as_list or len(images) > 1 else images[0]
    return converted


def parquet_files(source: Path) -> list[Path]:
    """Lists the parquet file itself, or those below a folder, sorted."""
    return [source] if source.is_file() else sorted(source.rglob("*.parquet"))


def _convert_parquet(source: Path, target: Path) -> Converted:
    files = parquet_files(source)
    if not files:
        raise DataError(f"there is no parquet file in {source}; check the path")
    # The folder may hold another data set, whose images have the same numbered names.
    if target.exists():
        raise DataError(f"{target} exists; choose another folder or move it away")
    counts = {"rows": 0, "images": 0}
    with complete_folder(target, shared=True) as folder, Progress("rows") as progress:
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
        with open_checked(data) as image:
            return _SUFFIX.get(image.format or "", f".{(image.format or 'img').lower()}")
    except BadImage as error:
        raise DataError(f"row {stem}: {error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of every line that is not blank, or (entry number, object) of a
    JSON list.

    Raises:
        DataError: missing, a line that is no JSON object, or with half a character in it; names
            file and line.
    """
    try:
        if json_rows.is_list(path):
            for row_number, entry in enumerate(json_rows.entries(path), start=1):
                yield row_number, _object(f"{path} entry {row_number}", entry.encode())
            return
        with path.open("rb") as file:
            for row_number, line in enumerate(file, start=1):
                if line.strip():
                    yield row_number, _object(f"{path} line {row_number}", line)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from None


def _object(name: str, line: bytes) -> dict[str, Any]:
    try:
        return json_rows.parse_row(name, line)
    except BadSample as bad:
        raise DataError(str(bad)) from None


def images_of(row: dict[str, Any]) -> list[str]:
    """Lists the image paths of a chat line, perhaps none.

    Raises:
        DataError: `image` is neither a path nor a list of paths.
    """
    # "" and null mean no image, as in the original.
    image = row.get("image") or []
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError(f"`image` must be a path or a list of paths, not {image!r}")
    return paths


_ENCODER = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` would make one a line


def to_json(value: Any) -> str:
    """Encodes a value as one line of JSON, without escaping letters."""
    return _ENCODER.encode(value)


_CONVERTERS: dict[str, Callable[[Path, Path], Converted]] = {
    "boxes-to-1000": partial(_convert_boxes, boxes_to_1000, _left_in_fractions, "0-1"),
    "boxes-to-unit": partial(_convert_boxes, boxes_to_unit, _left_in_1000, "0-1000"),
    "captions": _convert_captions,
    "parquet": _convert_parquet,
}
