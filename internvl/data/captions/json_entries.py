"""Reads captions from JSON: lines or lists of {image, caption}, Karpathy's `dataset_*.json`."""

from collections import Counter
from pathlib import Path
from typing import Any

from internvl.data.captions.caption_file import CaptionFile, name_problem, object_problem
from internvl.data.captions.lines import TEXT_KEYS, numbered_lines
from internvl.data.json_rows import parse_json, parse_line, read_json
from internvl.data.texts import json_type, printable, problem_lines, read_text
from internvl.errors import BadSample, DataError, counted


def read_json_lines(file: CaptionFile, text: str | None = None) -> None:
    """Reads JSON Lines of {image, caption}, or a list of them; `text` is the file's, if known."""
    # A caller that has read the text has also seen that it is no list.
    may_be_list = text is None
    text = read_text(file.path) if text is None else text
    if text.lstrip().startswith("[") and may_be_list:
        read_entries(file, parse_json(file.path, text))
        return
    for line_number, line in numbered_lines(text):
        where = f"line {line_number}"
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
    """Reads a list of {image, caption}."""
    for entry_number, row in enumerate(rows, start=1):
        _read_entry(file, f"entry {entry_number}", row)


def _read_entry(file: CaptionFile, where: str, row: Any) -> None:
    """Reads an object with `image` and captions (a text or a list) under one of TEXT_KEYS."""
    reason = object_problem(row)
    if reason is None and "image" not in row:
        reason = "no `image`; write the image's path under this key"
    if reason:
        file.bad(where, reason)
    else:
        # Published lists have an entry for every caption, so an image comes several times.
        file.add_captions(where, file.image(where, row["image"], again=True), entry_texts(row))


def entry_texts(row: dict[str, Any]) -> list[Any]:
    """Returns the captions under the first of TEXT_KEYS that the row has, unchecked."""
    value: Any = next((row[key] for key in TEXT_KEYS if key in row), [])
    return value if isinstance(value, list) else [value]


def karpathy_names(path: Path) -> list[tuple[str, str]]:
    """Reads (entry, image name) pairs from Karpathy's list of {image, …}.

    Raises:
        DataError: another form, or entries that name no image; lists the first ones.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} is not Karpathy's list of images, but {json_type(rows)}; fetch it")
    problems: list[BadSample] = []
    names: list[tuple[str, str]] = []
    for entry_number, row in enumerate(rows, start=1):
        where = f"entry {entry_number}"
        reason = object_problem(row) or name_problem(row.get("image"))
        if reason:
            problems.append(BadSample(f"{path} {where}", printable(reason)))
        else:
            names.append((where, row["image"]))
    if problems:
        count = counted(len(problems), "problem")
        head = f"{path} is not Karpathy's list of images: {count}; fetch it again"
        raise DataError("\n".join([head, *problem_lines(problems)]))
    return names


def read_karpathy(file: CaptionFile, tree: Any = None) -> None:
    """Reads Karpathy's `dataset_*.json`, or a list of {image, caption} as LAVIS wrote it."""
    tree = read_json(file.path) if tree is None else tree
    # `coco_karpathy_val.json` and its like: LAVIS kept Karpathy's name for the other form.
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
    # Counted in the order of the file, for the message.
    splits = Counter(
        str(row["split"]) for row in images if isinstance(row, dict) and "split" in row
    )
    # COCO's validation images that are neither in val nor in test; published results train on them.
    split_names = ("train", "restval") if file.split == "train" else (file.split,)
    if not splits.keys() & {*split_names}:
        listed = f"it has {', '.join(splits)}" if splits else "its images name no `split`"
        raise DataError(
            printable(f"{file.path} has no split {file.split!r}; {listed}; choose another file")
        )
    for image_number, row in enumerate(images, start=1):
        _read_sentences(file, f"image {image_number}", row, split_names)


def _read_sentences(file: CaptionFile, where: str, row: Any, split_names: tuple[str, ...]) -> None:
    reason = object_problem(row)
    if reason is None and "split" not in row:
        reason = f"no `split`; write one, such as {split_names[0]!r}"
    if reason is None and row["split"] not in split_names:
        return
    # COCO's entries have the folder apart (`filepath`), Flickr's have none.
    folder, name = (row.get("filepath") or "", row.get("filename")) if reason is None else ("", "")
    if reason is None:
        reason = name_problem(name) or (name_problem(folder) if folder else None)
    sentences = row.get("sentences") if reason is None else []
    if reason is None and not isinstance(sentences, list):
        reason = f"`sentences` must be a list, not {json_type(sentences)}"
    if reason:
        file.bad(where, reason)
        return
    # `raw`, not `tokens`: those are lower case and without punctuation.
    texts = [s.get("raw") if isinstance(s, dict) else s for s in sentences]
    file.add_captions(where, file.image(where, f"{folder}/{name}" if folder else name), texts)
