"""Answers on disk: of an evaluation that runs, and of one that is to be scored alone."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from internvl import dist
from internvl.data.json_rows import parse_json, parse_row
from internvl.data.texts import printable, read_text, text_problem
from internvl.errors import BadSample, DataError

Row = dict[str, Any]


class AnswerFiles:
    """JSONL files in a folder, one for every start of a rank, with rows by the index of their item.

    A killed process may leave half a line at the end of its file; it is dropped when read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Path | None = None

    def read(self) -> dict[int, Row]:
        """Reads the rows of all files: index of an item -> its row."""
        rows: dict[int, Row] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            # By bytes: half a line may end within a character.
            for line in file.read_bytes().split(b"\n")[:-1]:
                # A power failure leaves worse than half a line; what is lost is computed again.
                with suppress(ValueError):
                    row = json.loads(line)
                    rows[row.pop("item")] = row
        return rows

    def append(self, rows: Mapping[int, Row]) -> None:
        """Appends rows to this process's file, in one write."""
        if self._file is None:
            self._file = self._create()
        lines = [json.dumps({"item": item, **row}) + "\n" for item, row in rows.items()]
        with self._file.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _create(self) -> Path:
        """Creates a file that no other process writes, not even one that was taken for dead."""
        self.folder.mkdir(parents=True, exist_ok=True)
        start = 0
        while True:
            file = self.folder / f"{dist.rank():04d}-{start}.jsonl"
            try:
                file.touch(exist_ok=False)
            except FileExistsError:
                start += 1
            else:
                return file


_IDS, _TEXTS = ("image_id", "question_id"), ("answer", "caption")
"""Keys of an answer's item and text: our rows', and those of the original's result files."""


def read_file(file: Path) -> dict[Any, str]:
    """Reads answers from a file of rows, JSON Lines or a JSON list: id of an item -> answer.

    Rows that only list a sample with the reason why it was left out have no answer.

    Raises:
        DataError: the file is missing, or holds none.
        BadSample: a row without an id or a text, or an id that stands twice.
    """
    answers: dict[Any, str] = {}
    for where, row in _rows(file):
        if isinstance(row, dict) and {"sample", "reason"} <= row.keys():
            continue
        item = _value(row, _IDS, where)
        text = _value(row, _TEXTS, where)
        # A list has no hash; True would be the id 1.
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise BadSample(
                where, f"the id must be a number or a text, not {printable(repr(item))}"
            )
        reason = text_problem(text)
        if reason is not None:
            raise BadSample(where, f"the answer {reason}")
        if item in answers:
            raise BadSample(where, f"{item!r} has an answer already; remove one")
        answers[item] = text
    if not answers:
        raise DataError(f"{file} holds no answer")
    return answers


def _rows(file: Path) -> list[tuple[str, Any]]:
    """Lists (line or entry for messages, row)."""
    text = read_text(file)
    if text.lstrip().startswith("["):
        rows = parse_json(file, text)
        return [(f"{file} entry {n}", row) for n, row in enumerate(rows, start=1)]
    # By line feeds alone: an answer may hold other separators of lines.
    lines = enumerate(text.rstrip("\n").split("\n"), start=1)
    named = ((f"{file} line {n}", line) for n, line in lines)
    return [(where, parse_row(where, line.encode())) for where, line in named]


def _value(row: Any, keys: tuple[str, ...], where: str) -> Any:
    for key in keys:
        if isinstance(row, dict) and key in row:
            return row[key]
    raise BadSample(where, f"an object with {' or '.join(keys)} is expected")
