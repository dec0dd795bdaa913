"""Two result folders beside each other: differences with intervals, and the items that changed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl.errors import ConfigError, counted
from internvl.report.results import Results, bootstrap
from internvl.report.results.items import Item
from internvl.report.results.statistics import Statistics, of_categories, statistics

_NAMED = 3
"""Items that an error names."""
# They name the model, which is what is compared, or only where it ran.
_NO_SETTINGS = ("checkpoint", "device", "batch_size", "on_bad_sample")


@dataclass(frozen=True)
class Change:
    """A metric of both, or the mean score of a category."""

    name: str
    first: float
    second: float
    interval: tuple[float, float] | None
    """Of second - first, 95 %; None if the items do not give the metric again."""
    is_category: bool = False

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Pair:
    """An item with both answers."""

    first: Item
    second: Item

    @property
    def gain(self) -> float:
        """Score of the second less that of the first."""
        return (self.second.score or 0.0) - (self.first.score or 0.0)


@dataclass(frozen=True)
class Compared:
    """An evaluation of both."""

    name: str
    num_items: int
    changes: list[Change]
    better: list[Pair]
    """Items whose score grew, the largest gain first."""
    worse: list[Pair]
    settings: list[tuple[str, Any, Any]]
    """Name and values of every setting that differs."""
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many items changed, by how."""
        # A graded score may rise without crossing the half.
        flips = Counter(_flip(pair) for pair in (*self.better, *self.worse))
        return {name: flips[name] for name in FLIPS if flips[name]}

    @property
    def summary(self) -> str:
        """The same in words."""
        shown = [f"{count:,} {name}" for name, count in self.counts.items()]
        return ", ".join(shown) or "no item changed"


FLIPS = ("right → wrong", "wrong → right", "lower score", "higher score")
"""Ways in which an item changes."""


def _flip(pair: Pair) -> str:
    before, after = pair.first.right, pair.second.right
    if before is not None and before != after:
        return "wrong → right" if after else "right → wrong"
    return "higher score" if pair.gain > 0 else "lower score"


def compare(
    first: Results,
    second: Results,
    task: str | None = None,
    *,
    resamples: int = bootstrap.RESAMPLES,
) -> list[Compared]:
    """Compares the evaluations that both have, or `task` alone.

    Args:
        resamples: number of resampled sets of an interval.

    Raises:
        ConfigError: no such evaluation, or their items differ.
        UserError: rows that are missing or damaged.
    """
    # In the order of the first: a run may have more evaluations than a later call.
    shared = [name for name in first.metrics if name in second.metrics]
    if task is not None and task not in shared:
        raise ConfigError(f"{task} is not in both: {_listed(first, second)}")
    if not shared:
        raise ConfigError(f"no evaluation is in both: {_listed(first, second)}")
    names = shared if task is None else [task]
    return [_compared(name, first, second, resamples) for name in names]


def _listed(first: Results, second: Results) -> str:
    sides = (f"{r.metrics_file} has {', '.join(r.metrics) or 'none'}" for r in (first, second))
    return "; ".join(sides)


def _compared(name: str, first: Results, second: Results, resamples: int) -> Compared:
    values = first.metrics[name], second.metrics[name]
    pairs = _paired(name, first.items(name), second.items(name))
    sides = [pair.first for pair in pairs], [pair.second for pair in pairs]
    task = first.task_of(name)
    of_metrics = [statistics(task, side, v) for side, v in zip(sides, values, strict=True)]
    of_labels = [of_categories(side) for side in sides]
    shared = [metric for metric in values[0] if metric in values[1]]
    # Of both: a sum that gives one side's value by chance is none of the metric's.
    usable = [metric for metric in shared if all(metric in side for side in of_metrics)]
    # Many benchmarks have a metric of each category already.
    taken = {*shared, *(metric.removeprefix("category_") for metric in shared)}
    labels = [label for label in of_labels[0] if label in of_labels[1] and label not in taken]
    measured: list[Statistics] = [
        {metric: side[metric] for metric in usable} | {label: of_side[label] for label in labels}
        for side, of_side in zip(of_metrics, of_labels, strict=True)
    ]
    # Once for all metrics, whose resampled sets are then the same.
    intervals = bootstrap.intervals(*measured, resamples=resamples)
    changes = [Change(m, values[0][m], values[1][m], intervals.get(m)) for m in shared]
    for label in labels:
        before, after = (side[label].total() for side in measured)
        changes.append(Change(label, before, after, intervals[label], is_category=True))
    notes = []
    missing = [metric for metric in shared if metric not in usable]
    if missing:
        reason = (
            "the rows of the items do not give it again" if pairs else "it has no rows of items"
        )
        notes.append(f"no interval of {', '.join(missing)}: {reason}")
    # Also an item that only one of them has a score of, as a judge may fail.
    changed = [pair for pair in pairs if pair.first.score != pair.second.score]
    return Compared(
        name,
        len(pairs),
        changes,
        sorted((pair for pair in changed if pair.gain > 0), key=lambda pair: -pair.gain),
        sorted((pair for pair in changed if pair.gain < 0), key=lambda pair: pair.gain),
        [*_settings(name, first, second), *_asked_differently(pairs)],
        notes,
    )


def _paired(name: str, first: Sequence[Item], second: Sequence[Item]) -> list[Pair]:
    """Pairs the items of both, in the order of the first.

    Raises:
        ConfigError: an item is in one of them alone.
    """
    by_key = {item.key: item for item in second}
    if _same_keys(first, second):
        return [Pair(item, by_key[item.key]) for item in first]
    # Asked differently, as with reasoning: images and references in the same order are enough.
    if len(first) == len(second) and all(
        _without_question(a) == _without_question(b) for a, b in zip(first, second, strict=True)
    ):
        return [Pair(a, b) for a, b in zip(first, second, strict=True)]
    keys = {item.key for item in first}
    alone = {
        "A": [item for item in first if item.key not in by_key],
        "B": [item for item in second if item.key not in keys],
    }
    counts = [
        f"{counted(len(items), 'item is', 'items are')} in {side} alone"
        for side, items in alone.items()
    ]
    lines = [f"{name}: {', '.join(counts)}; evaluate both on the same files, with the same --limit"]
    # The first few: a set of another split would list thousands.
    lines += [f"  {side}: {_named(item)}" for side, some in alone.items() for item in some[:_NAMED]]
    raise ConfigError("\n".join(lines))


def _same_keys(first: Sequence[Item], second: Sequence[Item]) -> bool:
    return len(first) == len(second) and {i.key for i in first} == {i.key for i in second}


def _without_question(item: Item) -> tuple[Any, ...]:
    return (item.key[0], *item.key[2:-1])


def _named(item: Item) -> str:
    text = " ".join(item.question.split())
    shown = text if len(text) <= 80 else f"{text[:80]}…"
    return ", ".join([*item.images, *([shown] if shown else []), *item.references[:1]])


def _asked_differently(pairs: Sequence[Pair]) -> Iterator[tuple[str, Any, Any]]:
    for pair in pairs:
        if pair.first.question != pair.second.question:
            yield "question", pair.first.question, pair.second.question
            return


def _settings(name: str, first: Results, second: Results) -> list[tuple[str, Any, Any]]:
    """Lists the settings that differ: of the evaluation, of its sets, and of the computation."""
    sides = []
    for results in (first, second):
        of_evaluation = results.settings_of(name)
        flat: dict[str, Any] = dict(of_evaluation.get("settings", {}))
        for key in ("computed", "internvl", "torch", "transformers"):
            if key in results.settings:
                flat[key] = results.settings[key]
        flat |= dict(_flat(results.benchmark_settings(name)))
        sides.append(flat)
    # A key of one side alone is of another version, which is listed itself.
    both = [key for key in sides[0] if key in sides[1]]
    return [
        (key, sides[0][key], sides[1][key])
        for key in both
        if sides[0][key] != sides[1][key] and key.rpartition(".")[2] not in _NO_SETTINGS
    ]


def _flat(tree: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value
