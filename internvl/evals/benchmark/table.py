"""Tables of MMBench: tab-separated text with types by column, and the Excel file of the results.

The official scripts read and write them with pandas; the types here are those that it infers.
"""

import csv
import io
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from internvl.data.texts import read_text
from internvl.errors import DataError

_MISSING = frozenset(
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND"),
        *("1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)
"""Cells that pandas takes for missing."""
_BOOLEANS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False}
_BOOLEANS |= {"false": False}

_END = "end"
"""A row after the last one."""

Columns = dict[str, list[Any]]
"""Name -> its cells, None for a missing one."""


def read_columns(path: Path) -> Columns:
    """Reads a tab-separated file with a header; whole numbers, decimals and booleans by column.

    Raises:
        DataError: rows of different lengths, a quotation that never ends, or a file without rows.
    """
    return parse_columns(read_text(path), str(path))


def parse_columns(text: str, name: str = "table") -> Columns:
    """Parses the text of such a file."""
    # An image is one cell, longer than the module's limit; the limit is a C long.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = list(csv.reader(io.StringIO(f"{text}\n{_END}"), delimiter="\t"))
    # The module takes an open quotation to the end of the file for a cell, and says nothing.
    if rows.pop() != [_END]:
        raise DataError(
            f"{name} row {len(rows) + 1}: a quotation mark begins a cell that never ends, which "
            "would hold all rows below; fetch the file again"
        )
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise DataError(f"{name} holds no row")
    header, *body = rows
    for position, row in enumerate(body, start=2):
        if len(row) > len(header):
            raise DataError(f"{name} row {position}: {len(row)} cells below {len(header)} names")
    # pandas fills short rows; a long one shifts all its cells, and is an error.
    padded = [row + [""] * (len(header) - len(row)) for row in body]
    return {column: _typed([row[index] for row in padded]) for index, column in enumerate(header)}


def _typed(cells: Sequence[str]) -> list[Any]:
    """Converts a column to numbers or booleans if all its cells are; missing ones become None."""
    present = [cell for cell in cells if cell not in _MISSING]
    if not present:
        return [None] * len(cells)
    if len(present) == len(cells) and all(cell in _BOOLEANS for cell in cells):
        return [_BOOLEANS[cell] for cell in cells]
    to_type = _number_type(present)
    if to_type is int and len(present) < len(cells):
        # A column of whole numbers with a gap is one of floats: "3" is shown as 3.0.
        to_type = float
    if to_type is None:
        return [None if cell in _MISSING else cell for cell in cells]
    return [None if cell in _MISSING else to_type(cell) for cell in cells]


def _number_type(cells: Sequence[str]) -> type[int] | type[float] | None:
    """Returns int or float if every cell is such a number, else None."""
    to_type: type[int] | type[float]
    for to_type in (int, float):
        try:
            for cell in cells:
                # Python alone takes "1_000" for a number.
                if "_" in cell:
                    return None
                to_type(cell)
        except ValueError:
            continue
        return to_type
    return None


def result_columns(
    columns: Mapping[str, Sequence[Any]],
    predictions: Mapping[Any, str],
    drop: Sequence[str],
    insert_at: int,
) -> Columns:
    """Returns the columns of a result table: without some, the predictions at a position.

    Args:
        predictions: value of the column `index` -> answer; rows without one stay empty.
        drop: columns to leave out; those that a file lacks are passed over.
        insert_at: position of the new column, the end for a table with fewer columns.
    """
    left = {name: list(values) for name, values in columns.items() if name not in drop}
    cells = [predictions.get(index) for index in columns["index"]]
    names = list(left)
    # evaluate_mmbench.py:244 counts the position after the dropped columns.
    names.insert(insert_at, "prediction")
    left["prediction"] = cells
    return {name: left[name] for name in names}


_TYPES = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Default Extension="xml" ContentType="application/xml"/>
<Override PartName="/xl/workbook.xml" ContentType="{office}.sheet.main+xml"/>
<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{office}.worksheet+xml"/>
</Types>"""
_OFFICE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_RELATIONS = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
<Relationship Id="rId1" Target="{target}"
 Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/{role}"/>
</Relationships>"""
_WORKBOOK = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"
 xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships">
<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>"""
_SHEET = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">
<sheetData>{rows}</sheetData></worksheet>"""


def excel(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Returns the columns as the bytes of an .xlsx file with one sheet."""
    lines = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    rows = "".join(
        f'<row r="{r}">{"".join(_cell(value, r, c) for c, value in enumerate(line))}</row>'
        for r, line in enumerate(lines, start=1)
    )
    buffer = io.BytesIO()
    # By hand: a library for it would be one more dependency for eight lines of XML.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", _TYPES.replace("{office}", _OFFICE))
        root = _RELATIONS.format(role="officeDocument", target="xl/workbook.xml")
        archive.writestr("_rels/.rels", root)
        archive.writestr("xl/workbook.xml", _WORKBOOK)
        sheet = _RELATIONS.format(role="worksheet", target="worksheets/sheet1.xml")
        archive.writestr("xl/_rels/workbook.xml.rels", sheet)
        archive.writestr("xl/worksheets/sheet1.xml", _SHEET.replace("{rows}", rows))
    return buffer.getvalue()


def _cell(value: Any, row: int, column: int) -> str:
    """Returns a cell's XML, empty for None."""
    if value is None:
        return ""
    name = f"{_column_name(column)}{row}"
    # Before numbers: bool is a subclass of int.
    if isinstance(value, bool):
        return f'<c r="{name}" t="b"><v>{int(value)}</v></c>'
    if isinstance(value, int | float):
        return f'<c r="{name}"><v>{value!r}</v></c>'
    # Control characters are no XML; a model may write them.
    text = "".join(char for char in str(value) if char >= " " or char in "\t\n\r")
    inner = f'<t xml:space="preserve">{escape(text)}</t>'
    return f'<c r="{name}" t="inlineStr"><is>{inner}</is></c>'


def _column_name(index: int) -> str:
    """Returns the name of a column: A, …, Z, AA, …"""
    name = ""
    while index >= 0:
        name = chr(ord("A") + index % 26) + name
        index = index // 26 - 1
    return name
