"""Numbers, curves and pictures as one HTML page that needs nothing else.

The page is self-contained: styles and curves are inline, pictures are data URLs, there is no
script, and its content-security policy forbids every request. So it can be mailed, archived with
a run, or opened years later. It receives plain data and knows nothing of runs or models.

Adding a kind of section: one dataclass, one function, one entry in `_RENDERERS`.
"""

from __future__ import annotations

import base64
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any


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
    """(value, what it is)."""
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
    """The y axis includes zero."""


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Charts side by side where the window is wide enough."""

    title: str
    charts: Sequence[Chart]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was expected and what came, for one picture in one language."""

    language: str
    """A language tag, e.g. "en"; it also picks the font."""
    reference: str
    answer: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """A picture and the answers to it."""

    picture: bytes
    """An encoded PNG, JPEG, GIF or WebP file."""
    answers: Sequence[Answer]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A grid of pictures with their answers, right or wrong by colour and by symbol."""

    title: str
    cards: Sequence[Card]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TiledPicture:
    """A picture as the model gets it: stretched onto a grid of square tiles."""

    picture: bytes
    """An encoded PNG, JPEG, GIF or WebP file, of the whole picture."""
    columns: int
    rows: int
    thumbnail: bool = False
    """The whole picture follows once more as one tile."""


@dataclass(frozen=True)
class Span:
    """A piece of a sample's text."""

    text: str
    supervised: bool
    """The loss counts its tokens."""


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One sample the way it is trained on."""

    name: str
    pictures: Sequence[TiledPicture]
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
    """Whose work is shown. Addresses (http, https) become links, the only ones of the page."""

    title: str
    text: str


Section = Text | Facts | Scores | Charts | Pictures | Samples | Attribution


@dataclass(frozen=True, kw_only=True)
class Report:
    """A page."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


def render(report: Report) -> str:
    """The page as HTML.

    Raises:
        ValueError: a picture is no PNG, JPEG, GIF or WebP; a grid has no tiles.
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
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(report.title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<header><h1>{escape(report.title)}</h1>"
        f"<p>{escape(report.subtitle)}</p><nav>{contents}</nav></header>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def write(report: Report, path: Path) -> None:
    """Renders to a file that is there whole or not at all."""
    page = render(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        Path(beside).chmod(0o644)  # mkstemp's 0600 would keep a web server from reading it
        Path(beside).replace(path)
    finally:
        Path(beside).unlink(missing_ok=True)


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


def _scores(section: Scores) -> str:
    rows = []
    for group, members in groupby(section.scores, key=lambda score: score.group):
        scores = list(members)
        head = f'<th scope="rowgroup" rowspan="{len(scores)}">{escape(group)}</th>'
        for i, score in enumerate(scores):
            rows.append(f"<tr>{head if i == 0 else ''}{_score_cells(score)}</tr>")
        rows.append("</tbody><tbody>")
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

    def bar(value: float | None, kind: str) -> str:
        if value is None or not math.isfinite(value):
            return ""
        share = min(1.0, max(0.0, value / score.best))
        return f'<i class="{kind}" style="width:{100 * share:.2f}%"></i>'

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
    xs = _axis([x for x, _ in points])
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
    curves = "".join(
        _curve(series, _color(i), across, down, chart.form) for i, series in enumerate(chart.series)
    )
    middle = _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    return (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><svg viewBox="0 0 {_WIDTH} '
        f'{_HEIGHT}" role="img" aria-label="{escape(chart.title)}"><g class="grid">{grid}</g>'
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>'
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(chart.y_label)}</text>{curves}</svg>'
        f'<ul class="legend">{_legend(chart)}</ul></figure>'
    )


def _curve(
    series: Series,
    color: str,
    across: Callable[[float], float],
    down: Callable[[float], float],
    form: str,
) -> str:
    pieces = [
        [(across(x), down(y), x, y) for x, y in piece]
        for drawn, piece in groupby(series.points, key=lambda p: all(map(math.isfinite, p)))
        if drawn
    ]
    lines = "".join(
        f'<polyline points="{" ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in piece)}"/>'
        for piece in pieces
    )
    # Dots only where there are few points: they carry the exact values as tooltips.
    few = sum(map(len, pieces)) <= _MOST_DOTS
    dots = "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{escape(series.name)}: '
        f"{y:{form}} at {x:,.10g}</title></circle>"
        for piece in pieces
        for px, py, x, y in piece
        if few or len(piece) == 1
    )
    return f'<g class="curve" style="--color:{color}">{lines}{dots}</g>'


def _legend(chart: Chart) -> str:
    entries = []
    for i, series in enumerate(chart.series):
        finite = [y for x, y in series.points if math.isfinite(x) and math.isfinite(y)]
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


def _axis(values: list[float], *, loose: bool = False) -> _Axis:
    """About five round ticks; `loose`: the axis ends at a tick, not at the outermost value."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5 * abs(low or 1.0), high + 0.5 * abs(high or 1.0)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = (
        (math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9))
        if loose
        else (math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))
    )
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return _Axis(ticks[0], ticks[-1], ticks) if loose else _Axis(low, high, ticks)


def _pictures(section: Pictures) -> str:
    cards = "".join(map(_card, section.cards))
    return f'<div class="cards">{cards}</div>{_note(section.note)}'


def _card(card: Card) -> str:
    lines = []
    for answer in card.answers:
        kind, symbol = ("right", "✓") if answer.right else ("wrong", "✗")
        language = escape(answer.language)
        expected = (
            ""
            if answer.answer == answer.reference
            else f'<div class="reference" lang="{language}">{escape(answer.reference)}</div>'
        )
        lines.append(
            f'<li class="{kind}"><span class="tag">{language}</span>'
            f'<span class="mark" role="img" aria-label="{kind}">{symbol}</span>'
            f'<div><div lang="{language}">{escape(answer.answer) or "(nothing)"}</div>'
            f"{expected}</div></li>"
        )
    return (
        f'<article><img src="{_data_url(card.picture)}" alt=""><ul>{"".join(lines)}</ul></article>'
    )


def _samples(section: Samples) -> str:
    legend = (
        '<p class="note"><mark>Marked text</mark> is what the loss counts. Dashed lines '
        "cut a picture into tiles, numbered in the order the model gets them.</p>"
    )
    return legend + "".join(map(_sample, section.samples)) + _note(section.note)


def _sample(sample: TrainingSample) -> str:
    pictures = "".join(map(_tiled, sample.pictures))
    spans = "".join(
        f"<mark>{escape(span.text)}</mark>" if span.supervised else escape(span.text)
        for span in sample.spans
    )
    return (
        f'<article class="sample"><h3>{escape(sample.name)}</h3>'
        f'<div class="tiled">{pictures}</div><pre class="spans">{spans}</pre>'
        f"{_note(sample.note)}</article>"
    )


_TILE = 100  # side of a tile in a drawing, SVG units


def _tiled(picture: TiledPicture) -> str:
    if picture.columns < 1 or picture.rows < 1:
        raise ValueError(f"a grid of {picture.columns} x {picture.rows} tiles has no tile")
    url = _data_url(picture.picture)
    drawings = [_tile_grid(url, picture.columns, picture.rows, first=1)]
    if picture.thumbnail:
        drawings.append(_tile_grid(url, 1, 1, first=picture.columns * picture.rows + 1))
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
    # Lines and numbers twice, light under dark, so that they show on any picture.
    return (
        f'<svg class="tiles" viewBox="0 0 {width} {height}" role="img" '
        f'style="--columns:{columns}" aria-label="{columns} x {rows} tiles">'
        f'<image href="{url}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f'<path class="under" d="{cuts}"/><path class="over" d="{cuts}"/>{numbers}</svg>'
    )


def _attribution(section: Attribution) -> str:
    parts = _ADDRESS.split(section.text.strip())  # text and addresses alternate
    linked = "".join(
        f'<a href="{escape(part)}" rel="noreferrer">{escape(part)}</a>' if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )
    return f'<p class="attribution">{linked}</p>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _data_url(picture: bytes) -> str:
    for kind, magic in _MAGIC.items():
        if magic.match(picture):
            return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
    raise ValueError(f"a picture starts with {picture[:12]!r}: no PNG, JPEG, GIF or WebP file")


_RENDERERS: dict[type, Callable[[Any], str]] = {
    Text: _text,
    Facts: _facts,
    Scores: _scores,
    Charts: _charts,
    Pictures: _pictures,
    Samples: _samples,
    Attribution: _attribution,
}

_MAGIC = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}

_ADDRESS = re.compile(r"(https?://[^\s<>\"']*[^\s<>\"'.,;:)])")

_MOST_DOTS = 40
_NUM_COLORS = 6

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root {
  --page: #f5f6f8; --card: #ffffff; --ink: #1b1f27; --soft: #5b6472; --rule: #dfe3ea;
  --accent: #1f5fd0; --pale: #c3cad6; --right: #0b7a43; --wrong: #b3261e;
  --right-card: #e9f6ee; --wrong-card: #fcecea; --mark: #cfe6ff; --code: #f0f2f6;
  --series-0: #1f5fd0; --series-1: #d9640a; --series-2: #0b8f6a; --series-3: #a13fb5;
  --series-4: #8a6d00; --series-5: #c2255c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1b2028; --ink: #e8ebf0; --soft: #9aa5b5; --rule: #303846;
    --accent: #6ea3ff; --pale: #566174; --right: #58d18f; --wrong: #ff8a80;
    --right-card: #16301f; --wrong-card: #3a1d1c; --mark: #1d4a7a; --code: #13171e;
    --series-0: #6ea3ff; --series-1: #ff9e4f; --series-2: #45d0a6; --series-3: #d893ea;
    --series-4: #e0c04a; --series-5: #ff7ba5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC",
    "PingFang SC", "Microsoft YaHei", "Apple SD Gothic Neo", "Malgun Gothic", sans-serif;
}
[lang|=ko] { font-family: "Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans CJK KR", system-ui,
  sans-serif; }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.75rem; padding-bottom: .5rem; }
h1 { margin: 0; font-size: clamp(1.7rem, 4vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; }
header p { margin: .6rem 0 1.2rem; color: var(--soft); font-size: 1.08rem; max-width: 48rem; }
nav { display: flex; flex-wrap: wrap; gap: .5rem; }
nav a {
  padding: .2rem .8rem; border: 1px solid var(--rule); border-radius: 99px; color: var(--soft);
  background: var(--card); font-size: .88rem; text-decoration: none;
}
nav a:hover { color: var(--accent); border-color: var(--accent); }
a { color: var(--accent); }
section {
  margin: 1.25rem 0; padding: 1.4rem 1.5rem; background: var(--card);
  border: 1px solid var(--rule); border-radius: 14px;
}
h2 { margin: 0 0 .9rem; font-size: 1.2rem; letter-spacing: -.01em; }
h3 { margin: 0 0 .6rem; font-size: .95rem; overflow-wrap: anywhere; }
p { margin: 0 0 .7rem; max-width: 60rem; }
.note { margin: .8rem 0 0; color: var(--soft); font-size: .88rem; }
pre {
  margin: .5rem 0 0; padding: .9rem 1rem; overflow-x: auto; background: var(--code);
  border-radius: 9px; font: .86rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem; margin: 0;
}
.facts div { padding-left: .9rem; border-left: 3px solid var(--accent); }
.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.facts dd { margin: 0; font-size: 1.7rem; font-weight: 650; line-height: 1.2; }
.facts dt { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; }
thead th { color: var(--soft); font-size: .85rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; }
thead th:first-child, th[scope=rowgroup] { padding-left: 0; }
tbody { border-top: 1px solid var(--rule); }
tbody tr:first-child > * { padding-top: .6rem; }
tbody tr:last-child > *, th[scope=rowgroup] { padding-bottom: .6rem; }
th[scope=rowgroup] { padding-top: .6rem; font-weight: 650; vertical-align: top; }
th[scope=row] { color: var(--soft); white-space: nowrap; }
.number { text-align: right; white-space: nowrap; }
td.number { color: var(--soft); }
td.number.after { color: var(--ink); font-weight: 650; }
.wide { width: 45%; min-width: 9rem; }
.bars { display: grid; gap: 2px; padding: 2px 0; background: var(--code); align-content: center;
  border-radius: 0 4px 4px 0; min-height: 18px; }
.bars i { height: 7px; min-width: 2px; border-radius: 0 4px 4px 0; }
i.before, .key.before { background: var(--pale); }
i.after, .key.after { background: var(--accent); }
.key {
  display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; border-radius: 3px;
  vertical-align: -1px;
}
.key.after { margin-left: .7rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .4rem; font-size: .95rem; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
.grid line { stroke: var(--rule); stroke-width: 1; }
.curve polyline { fill: none; stroke: var(--color); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
.curve circle { fill: var(--color); stroke: var(--card); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0 0 3.2rem; padding: 0;
  list-style: none; color: var(--soft); font-size: .88rem; }
.legend b { color: var(--ink); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15.5rem, 100%), 1fr));
  gap: .9rem; }
.cards article { display: flex; flex-direction: column; overflow: hidden; border-radius: 11px;
  border: 1px solid var(--rule); }
.cards img { width: 100%; height: 8.5rem; padding: .6rem; object-fit: contain; background: #fff; }
.cards ul { flex: 1; margin: 0; padding: 0; list-style: none; font-size: .88rem; line-height: 1.4; }
.cards li { display: grid; grid-template-columns: 1.9rem 1.2rem 1fr; align-items: baseline;
  padding: .3rem .7rem; border-top: 1px solid var(--rule); overflow-wrap: anywhere; }
.tag { color: var(--soft); font-size: .74rem; text-transform: uppercase; letter-spacing: .04em; }
.mark { font-weight: 700; }
.right { background: var(--right-card); } .right .mark { color: var(--right); }
.wrong { background: var(--wrong-card); } .wrong .mark { color: var(--wrong); }
.reference { color: var(--soft); font-size: .82rem; }
.reference::before { content: "expected: "; }
.sample { margin-top: 1.1rem; padding-top: 1.1rem; border-top: 1px solid var(--rule); }
.tiled { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-end; }
.tiles { width: calc(var(--columns) * 6.5rem); max-width: 100%; border: 1px solid var(--rule);
  border-radius: 6px; }
.tiles path { fill: none; stroke-width: 2; }
.tiles .under { stroke: #fff; }
.tiles .over { stroke: #d11149; stroke-dasharray: 6 5; }
.tiles text { fill: #d11149; font-size: 14px; font-weight: 700; paint-order: stroke; stroke: #fff;
  stroke-width: 3px; }
.spans { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: 4px; padding: .1em .15em;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.attribution { margin: 0; color: var(--soft); font-size: .88rem; white-space: pre-line;
  overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  section { padding: 1.1rem 1rem; }
  th, td { padding-left: .4rem; padding-right: .4rem; }
  .wide { display: none; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } nav { display: none; } }
"""
