"""Renders numbers, curves and images as one self-contained HTML page.

The page is self-contained: styles and curves are inline, images are data URLs, there is no
script, and its content-security policy forbids every request. So it can be mailed, archived with
a run, or opened years later. It receives plain data and knows nothing of runs or models.

Adding a kind of section: one dataclass, one function, one entry in `_RENDERERS`.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from internvl.files import write_text
from internvl.report.style import STYLE


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs, then commands to copy."""

    title: str
    paragraphs: Sequence[str] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A few large numbers, e.g. ("317", "samples per second")."""

    title: str
    facts: Sequence[tuple[str, str]]
    """(value, label)."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts; the first column is a count."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of `Scores`."""

    group: str
    """Rows of the same group stand together, e.g. the language."""
    name: str
    before: float | None
    after: float | None
    best: float = 1.0
    """The value of a full bar, in the score's unit."""
    form: str = ".3f"
    """Python format specification of the values, e.g. ".1%"."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Before and after, with bars. None is shown as a dash."""

    title: str
    scores: Sequence[Score]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; points with a value that is not finite leave a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), in the order of x."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    form: str = ",.4g"
    """Python format specification of the y values, e.g. ".0%"."""
    from_zero: bool = False
    """True includes zero in the y axis."""
    bars: bool = False
    """True draws the bars of a histogram of whole numbers: of each, a point at both ends."""


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Charts side by side if the window is wide enough."""

    title: str
    charts: Sequence[Chart]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Reference and model's answer for one image in one language."""

    language: str
    """A language tag, e.g. "en"; it also picks the font."""
    reference: str
    answer: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """An image and the answers to it."""

    image: bytes
    """An encoded PNG, JPEG, GIF or WebP file."""
    answers: Sequence[Answer]


@dataclass(frozen=True, kw_only=True)
class Images:
    """A grid of images with their answers, right or wrong by colour and by symbol."""

    title: str
    cards: Sequence[Card]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One of the first results of a search: an image, a text, or both."""

    right: bool
    image: bytes | None = None
    """An encoded PNG, JPEG, GIF or WebP file."""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A query, text or image, and its first results."""

    language: str
    """A language tag, e.g. "en", of the text or of the results; it also picks the font."""
    rank: int
    """Rank of the right result, from 1."""
    hits: Sequence[Hit]
    """Best first."""
    text: str = ""
    image: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Searches:
    """Searches with their first results, the right one marked by colour and by symbol."""

    title: str
    searches: Sequence[Search]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TiledImage:
    """An image stretched onto a grid of square tiles, the model's input."""

    image: bytes
    """An encoded PNG, JPEG, GIF or WebP file, of the whole image."""
    columns: int
    rows: int
    thumbnail: bool = False
    """True adds the whole image once more as one tile."""


@dataclass(frozen=True)
class Span:
    """A piece of a sample's text."""

    text: str
    supervised: bool
    """The loss counts its tokens."""


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One sample as training sees it."""

    name: str
    images: Sequence[TiledImage]
    spans: Sequence[Span]
    """The whole text in order, special tokens included."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples with their tile grids and the text the loss counts."""

    title: str
    samples: Sequence[TrainingSample]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Credits of shown works. URLs (http, https) become links, the only ones to other pages."""

    title: str
    text: str


Section = Text | Facts | Table | Scores | Charts | Images | Searches | Samples | Attribution


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


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
        f"<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{escape(report.title)}</h1>"
        f"<p>{escape(report.subtitle)}</p><nav>{contents}</nav></header>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def write(report: Report, path: Path) -> None:
    """Writes the rendered page atomically."""
    write_text(path, render(report))


def _text(section: Text) -> str:
    commands = "\n".join(section.commands)
    return "".join(f"<p>{escape(text)}</p>" for text in section.paragraphs) + (
        f"<pre><code>{escape(commands)}</code></pre>" if commands else ""
    )


def _facts(section: Facts) -> str:
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for value, label in section.facts
    )
    return f'<dl class="facts">{facts}</dl>{_note(section.note)}'


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
        f"<tbody>{rows}</tbody></table></div>{_note(section.note)}"
    )


def _scores(section: Scores) -> str:
    rows = []
    # Groups only neighbours, so the order of rows stays the caller's.
    for group, members in groupby(section.scores, key=lambda score: score.group):
        scores = list(members)
        head = f'<th scope="rowgroup" rowspan="{len(scores)}">{escape(group)}</th>'
        for i, score in enumerate(scores):
            rows.append(f"<tr>{head if i == 0 else ''}{_score_cells(score)}</tr>")
        rows.append("</tbody><tbody>")
    # The last separator would open an empty group.
    body = f"<tbody>{''.join(rows[:-1])}</tbody>"
    return (
        '<div class="scroll"><table class="scores"><thead><tr><th></th><th></th>'
        '<th class="number">before</th><th class="number">after</th>'
        '<th class="wide"><span class="key before"></span> before '
        '<span class="key after"></span> after</th>'
        f"</tr></thead>{body}</table></div>{_note(section.note)}"
    )


def _score_cells(score: Score) -> str:
    def shown(value: float | None) -> str:
        return "–" if value is None or not math.isfinite(value) else format(value, score.form)

    def bar(value: float | None, css_class: str) -> str:
        if value is None or not math.isfinite(value):
            return ""
        # Clipped: a value beyond `best`, or below zero, would leave the column.
        share = min(1.0, max(0.0, value / score.best))
        return f'<i class="{css_class}" style="width:{100 * share:.2f}%"></i>'

    # Bars are hidden from screen readers: they only repeat the two values.
    return (
        f'<th scope="row">{escape(score.name)}</th>'
        f'<td class="number">{shown(score.before)}</td>'
        f'<td class="number after">{shown(score.after)}</td>'
        f'<td class="wide"><div class="bars" aria-hidden="true">'
        f"{bar(score.before, 'before')}{bar(score.after, 'after')}</div></td>"
    )


def _charts(section: Charts) -> str:
    charts = "".join(map(_chart, section.charts))
    return f'<div class="charts">{charts}</div>{_note(section.note)}'


_WIDTH, _HEIGHT = 500, 285  # of a chart, SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 10, 48  # of its margins


def _chart(chart: Chart) -> str:
    points = [p for series in chart.series for p in series.points if all(map(math.isfinite, p))]
    ends = [x for x, _ in points]
    if chart.bars and ends and max(ends) - min(ends) < _FEW_BARS:
        # One or two bars would fill the chart.
        ends += [min(ends) - 1, max(ends) + 1]
    xs = _axis(ends, whole=chart.bars)
    ys = _axis([y for _, y in points] + [0.0] * chart.from_zero, loose=True)

    def across(x: float) -> float:
        return _LEFT + (x - xs.low) / (xs.high - xs.low) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - ys.low) / (ys.high - ys.low) * (_HEIGHT - _TOP - _BOTTOM)

    grid = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y:{chart.form}}</text>'
        for y in ys.ticks
    ) + "".join(
        f'<text x="{across(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
        f"{x:,.10g}</text>"
        for x in xs.ticks
    )
    draw = _bars if chart.bars else _curve
    curves = "".join(
        draw(series, _color(i), across, down, chart.form) for i, series in enumerate(chart.series)
    )
    # The last value of a curve is its result; a histogram has none.
    legend = "" if chart.bars else f'<ul class="legend">{_legend(chart)}</ul>'
    middle = _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    return (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><svg viewBox="0 0 {_WIDTH} '
        f'{_HEIGHT}" role="img" aria-label="{escape(chart.title)}"><g class="grid">{grid}</g>'
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>'
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(chart.y_label)}</text>{curves}</svg>{legend}</figure>'
    )


def _curve(
    series: Series,
    color: str,
    across: Callable[[float], float],
    down: Callable[[float], float],
    form: str,
) -> str:
    # A polyline per run of finite points, for a single one would draw across the gaps.
    pieces = [
        [(across(x), down(y), x, y) for x, y in piece]
        for drawn, piece in groupby(series.points, key=lambda p: all(map(math.isfinite, p)))
        if drawn
    ]
    lines = "".join(
        f'<polyline points="{" ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in piece)}"/>'
        for piece in pieces
    )
    # Dots carry the exact values as tooltips: with few points, and for a run of one point, of
    # which a polyline would show nothing.
    few = sum(map(len, pieces)) <= _MOST_DOTS
    dots = "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{escape(series.name)}: '
        f"{y:{form}} at {x:,.10g}</title></circle>"
        for piece in pieces
        for px, py, x, y in piece
        if few or len(piece) == 1
    )
    return f'<g class="curve" style="--color:{color}">{lines}{dots}</g>'


def _bars(
    series: Series,
    color: str,
    across: Callable[[float], float],
    down: Callable[[float], float],
    form: str,
) -> str:
    drawn = []
    ends = zip(series.points[::2], series.points[1::2], strict=True)
    for (left, value), (right, _) in ends:
        # A bar ends half a number beyond the numbers that it counts.
        first, last = f"{left + 0.5:,.10g}", f"{right - 0.5:,.10g}"
        of_bar = first if first == last else f"{first} to {last}"
        # A pixel of space between bars, and at least one of height for a value above zero.
        height = max(down(0) - down(value), 1.0 if value else 0.0)
        drawn.append(
            f'<rect x="{across(left) + 0.5:.1f}" y="{down(0) - height:.1f}" '
            f'width="{max(across(right) - across(left) - 1, 1):.1f}" height="{height:.1f}">'
            f"<title>{of_bar}: {value:{form}} {escape(series.name)}</title></rect>"
        )
    return f'<g class="bar" style="--color:{color}">{"".join(drawn)}</g>'


def _legend(chart: Chart) -> str:
    entries = []
    for i, series in enumerate(chart.series):
        finite = [y for x, y in series.points if math.isfinite(x) and math.isfinite(y)]
        # The last finite value: a run that diverged would show only nan.
        last = f" <b>{finite[-1]:{chart.form}}</b>" if finite else ""
        entries.append(
            f'<li><span class="key" style="background:{_color(i)}"></span>'
            f"{escape(series.name)}{last}</li>"
        )
    return "".join(entries)


def _color(i: int) -> str:
    return f"var(--series-{i % _NUM_COLORS})"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: list[float]


def _axis(values: list[float], *, loose: bool = False, whole: bool = False) -> _Axis:
    """Chooses about five round ticks.

    Args:
        loose: it ends at ticks, not at the outermost values.
        whole: ticks are whole numbers.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    # A constant curve: a range of zero would be divided by.
    if low == high:
        low, high = low - 0.5 * abs(low or 1.0), high + 0.5 * abs(high or 1.0)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    # 0.999 and 1e-9 absorb rounding, which would skip a step or lose a tick at an end.
    steps = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(m * power for m in steps if m * power >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = (
        (math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9))
        if loose
        else (math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))
    )
    # Rounded: 3 * 0.1 is 0.30000000000000004.
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return _Axis(ticks[0], ticks[-1], ticks) if loose else _Axis(low, high, ticks)


def _images(section: Images) -> str:
    cards = "".join(map(_card, section.cards))
    return f'<div class="cards">{cards}</div>{_note(section.note)}'


def _card(card: Card) -> str:
    lines = []
    for answer in card.answers:
        verdict, symbol = ("right", "✓") if answer.right else ("wrong", "✗")
        language = escape(answer.language)
        # An equal reference would only repeat the answer.
        expected = (
            ""
            if answer.answer == answer.reference
            else f'<div class="reference" lang="{language}">{escape(answer.reference)}</div>'
        )
        lines.append(
            f'<li class="{verdict}"><span class="tag">{language}</span>'
            f'<span class="mark" role="img" aria-label="{verdict}">{symbol}</span>'
            f'<div><div lang="{language}">{escape(answer.answer) or "(nothing)"}</div>'
            f"{expected}</div></li>"
        )
    return f'<article><img src="{_data_url(card.image)}" alt=""><ul>{"".join(lines)}</ul></article>'


def _searches(section: Searches) -> str:
    return f'<div class="searches">{"".join(map(_search, section.searches))}</div>' + _note(
        section.note
    )


def _search(search: Search) -> str:
    language = escape(search.language)
    verdict = "right" if search.rank == 1 else "wrong"
    hits = "".join(_hit(hit, language) for hit in search.hits)
    return (
        f'<article class="search"><h3><span class="tag">{language}</span>'
        f"{_shown(search.image, search.text, language)}"
        f'<span class="rank {verdict}">rank {search.rank:,}</span></h3><ol>{hits}</ol></article>'
    )


def _hit(hit: Hit, language: str) -> str:
    shown = _shown(hit.image, hit.text, language)
    if not hit.right:
        return f"<li>{shown}</li>"
    mark = '<span class="mark" role="img" aria-label="right">✓</span>'
    return f'<li class="right">{mark}{shown}</li>'


def _shown(data: bytes | None, text: str, language: str) -> str:
    image = "" if data is None else f'<img src="{_data_url(data)}" alt="">'
    return image + (f'<span lang="{language}">{escape(text)}</span>' if text else "")


def _samples(section: Samples) -> str:
    legend = (
        '<p class="note"><mark>Marked text</mark> is what the loss counts. Dashed lines '
        "cut an image into tiles, numbered in the order the model gets them.</p>"
    )
    return legend + "".join(map(_sample, section.samples)) + _note(section.note)


def _sample(sample: TrainingSample) -> str:
    images = "".join(map(_tiled, sample.images))
    spans = "".join(
        f"<mark>{escape(span.text)}</mark>" if span.supervised else escape(span.text)
        for span in sample.spans
    )
    return (
        f'<article class="sample"><h3>{escape(sample.name)}</h3>'
        f'<div class="tiled">{images}</div><pre class="spans">{spans}</pre>'
        f"{_note(sample.note)}</article>"
    )


_TILE = 100  # side of a tile in a drawing, SVG units


def _tiled(image: TiledImage) -> str:
    if image.columns < 1 or image.rows < 1:
        raise ValueError(f"a grid of {image.columns} x {image.rows} tiles has no tile")
    url = _data_url(image.image)
    drawings = [_tile_grid(url, image.columns, image.rows, first=1)]
    if image.thumbnail:
        drawings.append(_tile_grid(url, 1, 1, first=image.columns * image.rows + 1))
    return "".join(drawings)


def _tile_grid(url: str, columns: int, rows: int, *, first: int) -> str:
    width, height = columns * _TILE, rows * _TILE
    cuts = "".join(f"M{i * _TILE} 0V{height}" for i in range(1, columns)) + "".join(
        f"M0 {i * _TILE}H{width}" for i in range(1, rows)
    )
    numbers = "".join(
        f'<text x="{i % columns * _TILE + 6}" y="{i // columns * _TILE + 18}">{first + i}</text>'
        for i in range(columns * rows)
    )
    # Not to scale, for tiles are cut from the image stretched onto the grid. Lines twice, light
    # under dark, so that they show on any image.
    return (
        f'<svg class="tiles" viewBox="0 0 {width} {height}" role="img" '
        f'style="--columns:{columns}" aria-label="{columns} x {rows} tiles">'
        f'<image href="{url}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f'<path class="under" d="{cuts}"/><path class="over" d="{cuts}"/>{numbers}</svg>'
    )


def _attribution(section: Attribution) -> str:
    texts = _ADDRESS.split(section.text.strip())  # text and addresses alternate
    linked = "".join(
        # noreferrer: the page's own address may be a private one.
        f'<a href="{escape(text)}" rel="noreferrer">{escape(text)}</a>' if i % 2 else escape(text)
        for i, text in enumerate(texts)
    )
    return f'<p class="attribution">{linked}</p>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _data_url(image: bytes) -> str:
    # By content: images come as bytes without a file name.
    for subtype, magic in _MAGIC.items():
        if magic.match(image):
            return f"data:image/{subtype};base64,{base64.b64encode(image).decode('ascii')}"
    raise ValueError(f"an image starts with {image[:12]!r}: no PNG, JPEG, GIF or WebP file")


_RENDERERS: dict[type, Callable[[Any], str]] = {
    Text: _text,
    Facts: _facts,
    Table: _table,
    Scores: _scores,
    Charts: _charts,
    Images: _images,
    Searches: _searches,
    Samples: _samples,
    Attribution: _attribution,
}

_MAGIC = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    # Four bytes of file size, any of which may be a line feed.
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}

# Without the punctuation of the sentence around it.
_ADDRESS = re.compile(r"(https?://[^\s<>\"']*[^\s<>\"'.,;:)])")

_MOST_DOTS = 40
_FEW_BARS = 3
_NUM_COLORS = 6

# 'unsafe-inline' is for styles alone: the style sheet, and the lengths of bars.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
