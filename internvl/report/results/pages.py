"""Pages of evaluations and of comparisons, from result folders alone."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from internvl import report
from internvl.report.results import Results
from internvl.report.results.compare import Compared, Pair
from internvl.report.results.items import Item, shown
from internvl.report.results.statistics import of_categories
from internvl.report.results.thumbnails import MOST_IMAGES, thumbnail

_MOST_CARDS, _FEWEST_CARDS, _CARDS_OF_PAGE = 12, 2, 240
_LONGEST_TEXT = 600
_MOST_REFERENCES = 3
_MOST_METRICS = 16
"""Metrics of an evaluation at the top of a page."""


def write_evaluation(results: Results, path: Path) -> None:
    """Writes the page of a result folder."""
    report.write(evaluation_page(results), path)


def evaluation_page(results: Results) -> report.Report:
    """Builds the page of a result folder: scores, worst and best answers, settings."""
    names = list(results.metrics)
    most = _cards_each(2 * len(names))
    overview: list[report.Score] = []
    groups: list[report.Group] = []
    for name in names:
        # Read once, and freed before the next: a file may have 200,000 rows.
        items = results.items(name) if results.rows_file(name).is_file() else []
        headline = _headline(results, name, items)
        overview += _scores(results, name, headline)
        groups.append(_evaluation(results, name, items, headline, most))
    return report.Report(
        title=f"Evaluation of {results.model}",
        subtitle=", ".join(_counted(results, name) for name in names),
        sections=(
            _table("Scores", overview),
            *groups,
            report.Properties(title="How it was computed", pairs=_facts(results)),
        ),
    )


def _cards_each(num_sections: int) -> int:
    """Returns the most cards of a section."""
    # Seventy keys in one call still make a page that a browser opens.
    return max(_FEWEST_CARDS, min(_MOST_CARDS, _CARDS_OF_PAGE // num_sections))


def _counted(results: Results, name: str) -> str:
    counts = results.settings_of(name).get("counts", {})
    sizes = ", ".join(f"{count:,} {noun}" for noun, count in counts.items())
    return f"{name} ({sizes})" if sizes else name


def _table(title: str, scores: Sequence[report.Score]) -> report.Scores:
    """Returns a table of measured values, with published ones where there are any."""
    # A column of dashes would only take room.
    has_published = any(score.before is not None for score in scores)
    has_reference = any(score.reference is not None for score in scores)
    return report.Scores(
        title=title,
        scores=scores,
        before="published" if has_published else "",
        after="measured",
        reference="published before training" if has_reference else "",
    )


def _headline(results: Results, name: str, items: Sequence[Item]) -> list[str]:
    """Returns the metrics for the top of a page: the published ones, then those of no category."""
    values = results.metrics[name]
    published = results.settings_of(name).get("published", {})
    labels = {label for item in items for label in item.categories}
    metrics = [metric for metric in values if metric in published or not _of_label(metric, labels)]
    # All are of categories where the data's names cover everything.
    return (metrics or list(values))[:_MOST_METRICS]


def _of_label(metric: str, labels: Collection[str]) -> bool:
    # POPE has "random_f1", one's own questions "category_random".
    return metric in labels or any(
        metric.startswith(f"{label}_") or metric == f"category_{label}" for label in labels
    )


def _scores(results: Results, name: str, metrics: Sequence[str]) -> list[report.Score]:
    saved = results.settings_of(name)
    published, before = saved.get("published", {}), saved.get("published_before", {})
    values = results.metrics[name]
    return [
        _score(
            name,
            metric,
            values[metric],
            published.get(metric),
            before.get(metric),
            best=_best(results.task_of(name), metric),
        )
        for metric in metrics
    ]


_BEST = {"mme": {"perception": 2000.0, "cognition": 800.0}}
_BEST_OF_TASK = {"mme": 200.0}
"""Evaluation -> the best score of its groups, and of its tasks."""


def _score(
    group: str,
    name: str,
    value: float,
    published: float | None = None,
    before: float | None = None,
    best: float | None = None,
) -> report.Score:
    values = [v for v in (value, published, before) if v is not None and math.isfinite(v)]
    return report.Score(
        group=group,
        name=name,
        before=published,
        after=value,
        reference=before,
        best=best or _round_up(max(values, default=1.0)),
        form=_form(values),
    )


def _best(evaluation: str, metric: str) -> float | None:
    return _BEST.get(evaluation, {}).get(metric, _BEST_OF_TASK.get(evaluation))


def _round_up(value: float) -> float:
    """Returns the end of a bar: 1 for shares, else the next of 1, 2 and 5 times a power of ten."""
    if value <= 1:
        return 1.0
    # As axes of charts: a bar that ends at the value would always be full.
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value)


def _form(values: Sequence[float]) -> str:
    # Points, as MME's, are read in units; shares to four places, as printed.
    return ",.2f" if any(abs(value) > 10 for value in values) else ".4f"


def _evaluation(
    results: Results, name: str, items: Sequence[Item], headline: Sequence[str], most: int
) -> report.Group:
    sections: list[report.Section] = []
    # What stands at the top of the page is not said again.
    if len(headline) < len(results.metrics[name]):
        sections.append(_table("All metrics", _scores(results, name, list(results.metrics[name]))))
    categories = [
        _score("", label, mean.total())
        # Many benchmarks have their categories as metrics already.
        for label, mean in of_categories(items).items()
        if label not in results.metrics[name] and f"category_{label}" not in results.metrics[name]
    ]
    if categories:
        sections.append(_table("Mean score by category", categories))
    if items and items[0].form == "retrieval":
        sections += _searches(items, most)
    elif items:
        sections += _worst_and_best(results, name, items, most)
    pairs = _settings(results, name)
    if pairs:
        sections.append(report.Properties(title="Settings", pairs=pairs))
    return report.Group(title=name, sections=sections)


def _worst_and_best(
    results: Results, name: str, items: Sequence[Item], most: int
) -> Iterator[report.Images]:
    worst, best = shown(items, most)
    scored = any(item.score is not None for item in items)
    total = sum(item.score is not None for item in items) if scored else len(items)
    note = f"{len(worst)} of {total:,}; among equal scores spread evenly over the data."
    if any(item.boxes for item in worst):
        note += " Boxes: the reference solid and green, the answer dashed and red."
    # What only a server scores has no worst and best.
    titles = ("Lowest scores", "Highest scores") if scored else ("Answers", "More answers")
    for title, some in zip(titles, (worst, best), strict=True):
        if some:
            cards = [_card(results, name, item, [_answer(item)]) for item in some]
            yield report.Images(title=title, cards=cards, note=note, roomy=True)
            note = ""


def _card(results: Results, name: str, item: Item, answers: Sequence[report.Answer]) -> report.Card:
    drawings, absent = _drawings(results, name, item)
    remarks = [*item.categories, *([absent] if absent else [])]
    return report.Card(
        images=drawings,
        question=_clipped(item.question),
        answers=answers,
        note=" · ".join(remarks),
    )


def _answer(item: Item, label: str = "") -> report.Answer:
    more = len(item.references) - _MOST_REFERENCES
    # Five captions, or ten people's answers, would be longer than the card.
    references = " / ".join(item.references[:_MOST_REFERENCES]) + (
        f" / +{more}" if more > 0 else ""
    )
    parsed = f"read as {_clipped(item.parsed)}" if item.parsed else ""
    return report.Answer(
        label=label,
        reference=_clipped(references),
        answer=_clipped(item.answer),
        right=item.right,
        note=", ".join(text for text in (_score_text(item), parsed) if text),
    )


def _score_text(item: Item) -> str:
    scores = item.row.get("scores", {})
    if scores:
        return ", ".join(
            f"{label} {scores[metric]:.3f}"
            for metric, label in (("cider", "CIDEr"), ("bleu_4", "BLEU-4"), ("meteor", "METEOR"))
            if metric in scores
        )
    # A tick or a cross says 1 and 0 already.
    if item.score is None or (item.most is not None and item.score in (0.0, item.most)):
        return ""
    return f"score {item.score:.3g}"


def _drawings(results: Results, name: str, item: Item) -> tuple[list[report.Drawing], str]:
    """Returns the images of an item, and a remark about those that are not shown."""
    folder = results.rows_file(name).parent
    # Images of tables and videos have small copies beside the rows.
    paths = [*item.images, *(str(folder / path) for path in item.row.get("thumbnails", ()))]
    drawings, absent = [], 0
    for path in paths[:MOST_IMAGES]:
        small = thumbnail(path)
        if small is None:
            absent += 1
            continue
        data, size = small
        drawings.append(report.Drawing(image=data, size=size, boxes=_boxes(item)))
    remarks = []
    if absent:
        remarks.append(
            "the image cannot be read" if absent == 1 else f"{absent} images cannot be read"
        )
    if len(paths) > MOST_IMAGES:
        remarks.append(f"{len(paths) - MOST_IMAGES} more images")
    return drawings, ", ".join(remarks)


def _boxes(item: Item) -> list[report.Box]:
    # The answer last, so that it lies on top of the reference.
    roles: tuple[Literal["reference", "answer"], ...] = ("reference", "answer")
    return [
        report.Box(x1, y1, x2, y2, role)
        for role in roles
        if role in item.boxes
        for x1, y1, x2, y2 in [item.boxes[role]]
    ]


def _clipped(text: str) -> str:
    """Returns a text that fits a card; a model may repeat a word a thousand times."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}… ({len(text) - _LONGEST_TEXT:,} more characters)"


def _searches(items: Sequence[Item], most: int) -> Iterator[report.Searches]:
    texts_of: dict[str, set[str]] = {}
    for item in items:
        if item.question:
            texts_of.setdefault(item.images[0], set()).add(item.question)
    listed = [item for item in items if "first" in item.row]
    # Texts first, as the papers' tables.
    for title, is_text in (("text → image", True), ("image → text", False)):
        queries = [item for item in listed if bool(item.question) == is_text]
        for ends, some in zip(("worst", "best"), shown(queries, max(2, most // 2)), strict=True):
            if some:
                searches = [_search(item, texts_of) for item in some]
                yield report.Searches(title=f"{title}: {ends} ranks", searches=searches)


def _search(item: Item, texts_of: Mapping[str, set[str]]) -> report.Search:
    mode, candidates = [*item.row["first"].items()][-1]
    image = item.images[0]
    if item.question:
        hits = [_image_hit(name, name == image) for name in candidates]
    else:
        # Any of its captions is right.
        right = texts_of.get(image, set())
        hits = [report.Hit(right=text in right, text=_clipped(text)) for text in candidates]
    small = None if item.question else thumbnail(image)
    return report.Search(
        language="",
        text=_clipped(item.question) or (Path(image).name if small is None else ""),
        image=None if small is None else small[0],
        # Of the mode whose candidates are shown, not of the re-ranked ones.
        rank=item.row["rank"][mode] + 1,
        hits=hits,
    )


def _image_hit(name: str, right: bool) -> report.Hit:
    small = thumbnail(name)
    if small is None:
        return report.Hit(right=right, text=Path(name).name)
    return report.Hit(right=right, image=small[0])


def _settings(results: Results, name: str) -> list[tuple[str, str]]:
    saved = results.settings_of(name)
    pairs = [(key, value) for key, value in saved.get("settings", {}).items() if value is not None]
    sets = results.benchmark_settings(name)
    for dataset, described in sets.items():
        start = f"{dataset}: " if len(sets) > 1 else ""
        # What the evaluation's own settings say already is not said again.
        keys = [key for key in described if key not in saved.get("settings", {})]
        pairs += [(f"{start}{key}", described[key]) for key in keys]
    return [(key, _clipped(_value_text(value))) for key, value in pairs if _is_set(value)]


def _is_set(value: Any) -> bool:
    return value is not None and value != "" and value != {} and value != []


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if _is_set(inner))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)


def _facts(results: Results) -> list[tuple[str, str]]:
    names = ("model", "computed", "processes", "internvl", "torch", "transformers", "date")
    facts = [(name, str(results.settings[name])) for name in names if results.settings.get(name)]
    return [*facts, ("metrics", str(results.metrics_file))]


def comparison_page(first: Results, second: Results, compared: Sequence[Compared]) -> report.Report:
    """Builds the page of a comparison: differences with intervals, items that changed, settings."""
    cards = _cards_each(2 * len(compared))
    rows = [row for of_name in compared for row in _differences(of_name)]
    legend = (
        "B less A. 95 % intervals of a paired bootstrap over the items; those that leave out zero "
        "are coloured."
    )
    return report.Report(
        title="Two evaluations compared",
        subtitle=f"A: {first.model} · B: {second.model}",
        sections=(
            report.Differences(title="Differences", first="A", second="B", rows=rows, note=legend),
            *(_changed(first, second, of_name, cards) for of_name in compared),
            report.Properties(
                title="What was compared",
                pairs=[("A", str(first.metrics_file)), ("B", str(second.metrics_file))],
            ),
        ),
    )


def _differences(compared: Compared) -> list[report.Difference]:
    return [
        report.Difference(
            group=compared.name,
            name=change.name,
            first=change.first,
            second=change.second,
            interval=change.interval,
            form=_form([change.first, change.second]),
            neutral=change.name in NEUTRAL or change.name.endswith("yes_ratio"),
        )
        for change in compared.changes
    ]


NEUTRAL = ("average_length", "hallucination_rate", "loss", "logp_chosen", "logp_rejected")
"""Metrics of which more is not better."""


def _changed(first: Results, second: Results, compared: Compared, most: int) -> report.Group:
    sections: list[report.Section] = [
        report.Text(
            title="Items",
            paragraphs=[f"{compared.num_items:,} items: {compared.summary}.", *compared.notes],
        )
    ]
    for title, pairs in (("Worse in B", compared.worse), ("Better in B", compared.better)):
        if pairs:
            cards = [_pair_card(first, compared.name, pair) for pair in pairs[:most]]
            note = f"{len(cards)} of {len(pairs):,}, the largest changes first."
            sections.append(report.Images(title=title, cards=cards, note=note, roomy=True))
    if compared.settings:
        rows = [
            (key, f"A: {_clipped(_value_text(a))} · B: {_clipped(_value_text(b))}")
            for key, a, b in compared.settings
        ]
        sections.append(report.Properties(title="Settings that differ", pairs=rows))
    return report.Group(title=compared.name, sections=sections)


def _pair_card(results: Results, name: str, pair: Pair) -> report.Card:
    # A's references are B's: they stand once, below the second answer.
    answers = [replace(_answer(pair.first, "A"), reference=""), _answer(pair.second, "B")]
    return _card(results, name, pair.first, answers)
