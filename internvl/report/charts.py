"""Draws curves and histograms as inline SVG."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import groupby

from internvl.report.sections import Chart, Series

_MOST_DOTS = 40
_FEW_BARS = 3
_NUM_COLORS = 6

_WIDTH, _HEIGHT = 500, 285  # of a chart, SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 10, 48  # of its margins


def chart_svg(chart: Chart) -> str:
    """Renders a chart with its title and legend."""
    points = [p for series in chart.series for p in series.points if all(map(math.isfinite, p))]
    ends = [x for x, _ in points]
    if chart.bars and ends and max(ends) - min(ends) < _FEW_BARS:
        # One or two bars would fill the chart.
        ends += [min(ends) - 1, max(ends) + 1]
    xs = axis(ends, whole=chart.bars)
    ys = axis([y for _, y in points] + [0.0] * chart.from_zero, loose=True)

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
class Axis:
    """Ends and ticks of an axis."""

    low: float
    high: float
    ticks: list[float]


def axis(values: list[float], *, loose: bool = False, whole: bool = False) -> Axis:
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
    return Axis(ticks[0], ticks[-1], ticks) if loose else Axis(low, high, ticks)
