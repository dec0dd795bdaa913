"""Comparisons as lines of text and as JSON."""

from collections.abc import Sequence
from typing import Any

from internvl.report.results.compare import Compared, Pair

_LONGEST_TEXT = 100
_LONGEST_NAME = 32
"""Width of a metric's name in the table."""


def lines(compared: Compared, most: int) -> list[str]:
    """Renders an evaluation: its metrics, settings that differ, and `most` items of either sign."""
    width = max([len(change.name) for change in compared.changes] + [len("metric")])
    # Names of categories are the data's, and may be sentences.
    width = min(width, _LONGEST_NAME)
    lines = [
        f"{compared.name}: {compared.num_items:,} items, {compared.summary}",
        f"  {'metric':{width}}  {'A':>10}  {'B':>10}  {'B - A':>10}  95 % interval",
    ]
    for change in compared.changes:
        interval = "-"
        if change.interval is not None:
            low, high = change.interval
            # A star for those that leave out zero: no colour survives a pipe.
            interval = f"[{low:+.4f}, {high:+.4f}]{' *' if change.is_clear else ''}"
        lines.append(
            f"  {change.name[:width]:{width}}  {change.first:10.4f}  {change.second:10.4f}  "
            f"{change.difference:+10.4f}  {interval}"
        )
    # After the table that they explain.
    lines += [f"  {note}" for note in compared.notes]
    if compared.settings:
        lines.append("  settings that differ:")
        lines += [f"    {key}: {_short(a)} -> {_short(b)}" for key, a, b in compared.settings]
    for title, pairs in (("worse in B", compared.worse), ("better in B", compared.better)):
        if pairs and most:
            lines.append(f"  {title}: {min(most, len(pairs)):,} of {len(pairs):,}")
            lines += [line for pair in pairs[:most] for line in _pair_lines(pair)]
    return lines


def _pair_lines(pair: Pair) -> list[str]:
    shown = [
        *pair.first.images[:1],
        *([_short(pair.first.question)] if pair.first.question else []),
    ]
    lines = [f"    {' | '.join(shown)}"]
    for side, item in (("A", pair.first), ("B", pair.second)):
        score = "" if item.score is None else f" ({item.score:.3g})"
        lines.append(f"      {side}: {_short(item.answer)}{score}")
    if pair.first.references:
        lines.append(f"      reference: {_short(' / '.join(pair.first.references))}")
    return lines


def _short(value: Any) -> str:
    # On one line, whatever a model wrote.
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def as_json(compared: Compared) -> dict[str, Any]:
    """Returns an evaluation as a tree of plain values, with every item that changed."""
    return {
        "items": compared.num_items,
        "metrics": [
            {
                "name": change.name,
                "category": change.is_category,
                "a": change.first,
                "b": change.second,
                "difference": change.difference,
                "interval": change.interval,
            }
            for change in compared.changes
        ],
        "changed": compared.counts,
        "worse": _pairs_as_json(compared.worse),
        "better": _pairs_as_json(compared.better),
        "settings": [{"name": key, "a": a, "b": b} for key, a, b in compared.settings],
        "notes": compared.notes,
    }


def _pairs_as_json(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "images": pair.first.images,
            "question": pair.first.question,
            "references": pair.first.references,
            "categories": pair.first.categories,
            "a": {"answer": pair.first.answer, "score": pair.first.score},
            "b": {"answer": pair.second.answer, "score": pair.second.score},
        }
        for pair in pairs
    ]
