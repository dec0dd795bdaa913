"""Answers on disk while an evaluation runs: JSONL files, one for every start of a rank."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl import dist

Row = dict[str, Any]


class AnswerFiles:
    """Rows of one model and data set in a folder, by the index of their item.

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
