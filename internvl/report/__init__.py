"""Renders numbers, curves and images as one self-contained HTML page.

The page is self-contained: styles and curves are inline, images are data URLs, there is no
script, and its content-security policy forbids every request. So it can be mailed, archived with
a run, or opened years later. It receives plain data and knows nothing of runs or models.

Adding a kind of section: one dataclass, one function, one entry in `_RENDERERS`.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from internvl.files import write_text
from internvl.report import cards
from internvl.report.charts import chart_svg
from internvl.report.markup import head_cells, note, number_cell, value_text
from internvl.report.sections import Answer as Answer
from internvl.report.sections import (
    Attribution,
    Charts,
    Difference,
    Differences,
    Facts,
    Group,
    Images,
    Properties,
    Samples,
    Score,
    Scores,
    Searches,
    Table,
)
from internvl.report.sections import Box as Box
from internvl.report.sections import Card as Card
from internvl.report.sections import Chart as Chart
from internvl.report.sections import Drawing as Drawing
from internvl.report.sections import Hit as Hit
from internvl.report.sections import Report as Report
from internvl.report.sections import Search as Search
from internvl.report.sections import Section as Section
from internvl.report.sections import Series as Series
from internvl.report.sections import Span as Span
from internvl.report.sections import Text as Text
from internvl.report.sections import TiledImage as TiledImage
from internvl.report.sections import TrainingSample as TrainingSample

T = TypeVar("T", Score, Difference)


def render(report: Report) -> str:
    """Renders the page as HTML.

    Raises:
        ValueError: an image is no PNG, JPEG, GIF or WebP; a grid has no tiles.
    """
    numbered = list(enumerate(report.sections, start=1))
    contents = "".join(
        f'<a href="#section-{i}">{escape(section.title)}</a>' for i, section in numbered
    )
    body = "".join(
        f'<section id="section-{i}"><h2>{escape(section.title)}</h2>'
        f"{_RENDERERS[type(section)](section)}</section>\n"
        for i, section in numbered
    )
    # The empty icon keeps a browser from asking the server for /favicon.ico.
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(report.title)}</title>\n'
        f"<style>{_style()}</style>\n</head>\n<body>\n<header><h1>{escape(report.title)}</h1>"
        f"<p>{escape(report.subtitle)}</p><nav>{contents}</nav></header>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


@cache
def _style() -> str:
    """Reads the style sheet, which every page contains: it must open without its neighbours."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def write(report: Report, path: Path) -> None:
    """Writes the rendered page atomically."""
    write_text(path, render(report))


def _text(section: Text) -> str:
    commands = "\n".join(section.commands)
    return "".join(f"<p>{_linked(text)}</p>" for text in section.paragraphs) + (
        f"<pre><code>{escape(commands)}</code></pre>" if commands else ""
    )


def _facts(section: Facts) -> str:
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for value, label in section.facts
    )
    return f'<dl class="facts">{facts}</dl>{note(section.note)}'


def _table(section: Table) -> str:
    # A column without any text would only take room.
    shown = [i for i in range(len(section.head)) if any(row[i] for row in section.rows)]
    head = "".join(f"<th>{escape(section.head[i])}</th>" for i in shown)
    rows = "".join(
        f'<tr><td class="number">{escape(count)}</td>'
        + "".join(f"<td>{escape(text)}</td>" for text in texts)
        + "</tr>"
        for count, *texts in ([row[i] for i in shown] for row in section.rows)
    )
    return (
        f'<div class="scroll"><table class="texts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note(section.note)}"
    )


def _scores(section: Scores) -> str:
    heads = [name for name in (section.before, section.after, section.reference) if name]
    # Bars of one colour need no key.
    key = (
        f'<span class="key before"></span> {escape(section.before)} '
        f'<span class="key after"></span> {escape(section.after)}'
        if section.before
        else ""
    )
    rows = _grouped(section.scores, lambda score: _score_cells(score, section))
    return (
        '<div class="scroll"><table class="scores"><thead><tr><th></th><th></th>'
        f'{head_cells(heads)}<th class="wide">{key}</th>'
        f"</tr></thead>{rows}</table></div>{note(section.note)}"
    )


def _grouped(members: Sequence[T], cells: Callable[[T], str]) -> str:
    """Renders rows below the names of their groups."""
    rows = []
    # Groups only neighbours, so the order of rows stays the caller's.
    for group, of_group in groupby(members, key=lambda member: member.group):
        neighbours = list(of_group)
        head = f'<th scope="rowgroup" rowspan="{len(neighbours)}">{escape(group)}</th>'
        for i, member in enumerate(neighbours):
            rows.append(f"<tr>{head if i == 0 else ''}{cells(member)}</tr>")
        rows.append("</tbody><tbody>")
    # The last separator would open an empty group.
    return f"<tbody>{''.join(rows[:-1])}</tbody>"


def _score_cells(score: Score, section: Scores) -> str:
    def bar(value: float | None, css_class: str) -> str:
        if value is None or not math.isfinite(value):
            return ""
        # Clipped: a value beyond `best`, or below zero, would leave the column.
        share = min(1.0, max(0.0, value / score.best))
        return f'<i class="{css_class}" style="width:{100 * share:.2f}%"></i>'

    def cell(value: float | None, head: str, css_class: str = "") -> str:
        return number_cell(value_text(value, score.form), head, css_class)

    before = cell(score.before, section.before) if section.before else ""
    after = cell(score.after, section.after, "after")
    reference = cell(score.reference, section.reference) if section.reference else ""
    bars = (bar(score.before, "before") if section.before else "") + bar(score.after, "after")
    # Bars are hidden from screen readers: they only repeat the two values.
    return (
        f'<th scope="row">{escape(score.name)}</th>{before}{after}{reference}'
        f'<td class="wide"><div class="bars" aria-hidden="true">{bars}</div></td>'
    )


def _differences(section: Differences) -> str:
    # One scale for all shares, so that their widths can be compared; CIDEr would dwarf them.
    scale = max((_reach(row) for row in section.rows if _is_share(row)), default=0.0)
    rows = _grouped(
        section.rows,
        lambda row: _difference_cells(row, section, scale if _is_share(row) else _reach(row)),
    )
    heads = head_cells((section.first, section.second, *_CHANGE))
    return (
        '<div class="scroll"><table class="scores differences"><thead><tr><th></th><th></th>'
        f'{heads}<th class="wide"></th></tr></thead>{rows}</table></div>{note(section.note)}'
    )


def _is_share(row: Difference) -> bool:
    return all(value is None or abs(value) <= 1 for value in (row.first, row.second))


def _reach(row: Difference) -> float:
    """Returns the end of the interval that is farther from zero."""
    return max((abs(end) for end in row.interval or () if math.isfinite(end)), default=0.0)


_CHANGE = ("difference", "95 % interval")


def _difference_cells(row: Difference, section: Differences, scale: float) -> str:
    values = (row.first, row.second)
    change = None if None in values else (row.second or 0.0) - (row.first or 0.0)
    # A format such as ".3f" takes the sign in front.
    signed = f"+{row.form}"
    interval, drawing, css_class = "–", "", ""
    if row.interval is not None:
        low, high = row.interval
        interval = f"{value_text(low, signed)} … {value_text(high, signed)}"
        # Only an interval on one side of zero is more than chance.
        if not row.neutral:
            css_class = "better" if low > 0 else "worse" if high < 0 else ""
        left, right = (50 + 50 * max(-1.0, min(1.0, end / (scale or 1.0))) for end in (low, high))
        drawing = f'<i style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
    cells = "".join(
        number_cell(value_text(value, row.form), head)
        for value, head in zip(values, (section.first, section.second), strict=True)
    )
    changed = number_cell(value_text(change, signed), _CHANGE[0], f"after {css_class}".strip())
    return (
        f'<th scope="row">{escape(row.name)}</th>{cells}{changed}'
        f'{number_cell(interval, _CHANGE[1])}<td class="wide">'
        f'<div class="interval {css_class}" aria-hidden="true">{drawing}</div></td>'
    )


def _properties(section: Properties) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in section.pairs
    )
    return f'<table class="properties"><tbody>{rows}</tbody></table>{note(section.note)}'


def _group(section: Group) -> str:
    inner = "".join(
        f"<h3>{escape(member.title)}</h3>{_RENDERERS[type(member)](member)}"
        for member in section.sections
    )
    return f'<div class="group">{inner}</div>{note(section.note)}'


def _charts(section: Charts) -> str:
    charts = "".join(map(chart_svg, section.charts))
    return f'<div class="charts">{charts}</div>{note(section.note)}'


def _attribution(section: Attribution) -> str:
    return f'<p class="attribution">{_linked(section.text.strip())}</p>'


def _linked(plain: str) -> str:
    """Returns a text as HTML, its addresses as links."""
    texts = _ADDRESS.split(plain)  # text and addresses alternate
    return "".join(
        # noreferrer: the page's own address may be a private one.
        f'<a href="{escape(text)}" rel="noreferrer">{escape(text)}</a>' if i % 2 else escape(text)
        for i, text in enumerate(texts)
    )


_RENDERERS: dict[type, Callable[[Any], str]] = {
    Text: _text,
    Facts: _facts,
    Table: _table,
    Scores: _scores,
    Differences: _differences,
    Properties: _properties,
    Charts: _charts,
    Images: cards.images,
    Searches: cards.searches,
    Samples: cards.samples,
    Attribution: _attribution,
    Group: _group,
}

# Without the punctuation of the sentence around it.
_ADDRESS = re.compile(r"(https?://[^\s<>\"']*[^\s<>\"'.,;:)])")

# 'unsafe-inline' is for styles alone: the style sheet, and the lengths of bars.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
