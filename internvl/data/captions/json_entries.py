"""Captions in JSON: lines or a list of {image, caption}, and Karpathy's `dataset_*.json`."""

from collections import Counter
from pathlib import Path
from typing import Any

from internvl.data.captions.caption_file import CaptionFile, name_problem, object_problem
from internvl.data.captions.lines import TEXT_KEYS, numbered_lines
from internvl.data.json_rows import parse_json, parse_line, read_json
from internvl.data.texts import json_type, printable, problem_lines, read_text
from internvl.errors import BadSample, DataError


def read_json_lines(file: CaptionFile, text: str | None = None) -> None:
    given = text is not None
    text = read_text(file.path) if text is None else text
    if text.lstrip().startswith("[") and not given:
        read_entries(file, parse_json(file.path, text))
        return
    for number, line in numbered_lines(text):
        where = f"line {number}"
        if not line.strip():
            file.bad(where, "the line is blank; remove it")
            continue
        try:
            row = parse_line(line)
        except ValueError as error:
            file.bad(where, f"not JSON ({error}); write the line again")
            continue
        _read_entry(file, where, row)


def read_entries(file: CaptionFile, rows: list[Any]) -> None:
    for number, row in enumerate(rows, start=1):
        _read_entry(file, f"entry {number}", row)


def _read_entry(file: CaptionFile, where: str, row: Any) -> None:
    """An object with `image` and captions under one of their usual keys: a text or a list."""
    reason = object_problem(row)
    if reason is None and "image" not in row:
        reason = "no `image`; write the image's path under this key"
    if reason:
        file.bad(where, reason)
    else:
        file.captions_of(where, file.image(where, row["image"], again=True), entry_texts(row))


def entry_texts(row: dict[str, Any]) -> list[Any]:
    value: Any = next((row[key] for key in TEXT_KEYS if key in row), [])
    return value if isinstance(value, list) else [value]


def karpathy_names(path: Path) -> list[tuple[str, str]]:
    """(where, name) of every image of Karpathy's list of {image, …}.

    Raises:
        DataError: another form, or entries that name no image; the first ones.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not Karpathy's list of images, but {json_type(rows)}; fetch it")
    problems: list[BadSample] = []
    names: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=1):
        where = f"entry {number}"
        reason = object_problem(row) or name_problem(row.get("image"))
        if reason:
            problems.append(BadSample(f"{path} {where}", printable(reason)))
        else:
            names.append((where, row["image"]))
    if problems:
        head = (
            f"{path} is not Karpathy's list of images: {len(problems)} problem(s); fetch it again"
        )
        raise DataError("\n".join([head, *problem_lines(problems)]))
    return names


def read_karpathy(file: CaptionFile, tree: Any = None) -> None:
    """Karpathy's `dataset_*.json`, or a list of {image, caption} as LAVIS wrote it."""
    tree = read_json(file.path) if tree is None else tree
    if isinstance(tree, list):
        read_entries(file, tree)
        return
    images = tree.get("images") if isinstance(tree, dict) else None
    if not isinstance(images, list):
        raise DataError(
            f"{file.path} is neither a COCO caption file (`images` and `annotations`), nor "
            "Karpathy's (`images` with `split` and `sentences`), nor a list of {image, caption}; "
            "write one of these"
        )
    if "annotations" in tree:
        raise DataError(f"{file.path} is a COCO caption file, not Karpathy's; set its form to coco")
    splits = Counter(
        str(row["split"]) for row in images if isinstance(row, dict) and "split" in row
    )
    meant = ("train", "restval") if file.split == "train" else (file.split,)
    if not splits.keys() & {*meant}:
        known = f"it has {', '.join(splits)}" if splits else "its images name no `split`"
        raise DataError(
            printable(f"{file.path} has no split {file.split!r}; {known}; choose another file")
        )
    for number, row in enumerate(images, start=1):
        _sentences(file, f"image {number}", row, meant)


def _sentences(file: CaptionFile, where: str, row: Any, meant: tuple[str, ...]) -> None:
    reason = object_problem(row)
    if reason is None and "split" not in row:
        reason = f"no `split`; write one, such as {meant[0]!r}"
    if reason is None and row["split"] not in meant:
        return
    folder, name = (row.get("filepath") or "", row.get("filename")) if reason is None else ("", "")
    if reason is None:
        reason = name_problem(name) or (name_problem(folder) if folder else None)
    sentences = row.get("sentences") if reason is None else []
    if reason is None and not isinstance(sentences, list):
        reason = f"`sentences` must be a list, not {json_type(sentences)}"
    if reason:
        file.bad(where, reason)
        return
    texts = [s.get("raw") if isinstance(s, dict) else s for s in sentences]
    file.captions_of(where, file.image(where, f"{folder}/{name}" if folder else name), texts)
