"""Metrics of an evaluation as sums over its items, for `bootstrap`."""

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from internvl.datasets import tasks
from internvl.report.results.bootstrap import Statistic
from internvl.report.results.items import Item

Statistics = dict[str, Statistic]
"""Metric -> statistic."""
_MOST_CATEGORIES = 64
"""Beyond, a table of categories tells nothing: ImageNet's 1,000 classes."""
_TOLERANCE = 6e-4
"""The originals round some of their numbers to three places."""


def statistics(name: str, items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    """Returns a statistic for every metric that its items give again.

    Args:
        name: of the evaluation; a benchmark's key.
        values: metric -> its value. A statistic with another total is none: the metric is then
            computed from more than the rows hold.
    """
    if not items:
        return {}
    return {
        metric: statistic
        for metric, statistic in _OF_FORM[items[0].form](name, items, values).items()
        if metric in values and _equal(statistic.total(), values[metric])
    }


def of_categories(items: Sequence[Item]) -> Statistics:
    """Returns the mean score of every category, drawn within its category."""
    levels = max((len(item.categories) for item in items), default=0)
    # Nobody reads more, and each has an array over all items.
    if len({label for item in items for label in item.categories}) > _MOST_CATEGORIES:
        return {}
    means: Statistics = {}
    for level in range(levels):
        labels = [item.categories[level] if level < len(item.categories) else "" for item in items]
        strata = _codes(labels)
        for label in dict.fromkeys(labels):
            members = [label == other for other in labels]
            if label and label not in means:
                means[label] = _mean(_scores(items), members=members, strata=strata)
    return {name: mean for name, mean in means.items() if mean.sums[:, 1].any()}


def _equal(total: float, value: float) -> bool:
    return abs(total - value) <= _TOLERANCE * max(1.0, abs(value))


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    codes = {label: code for code, label in enumerate(dict.fromkeys(labels))}
    return np.array([codes[label] for label in labels], dtype=np.int64)


def _scores(items: Sequence[Item]) -> list[float | None]:
    return [item.score for item in items]


def _ratio(sums: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = sums[..., 0] / sums[..., 1]
    return ratio


def _mean(
    scores: Sequence[float | None],
    *,
    members: Sequence[bool] | None = None,
    strata: np.ndarray | None = None,
    scale: float = 1.0,
) -> Statistic:
    """Returns the mean of the scores of some items; one without a score counts nowhere."""
    inside = [
        score is not None and (members is None or members[index])
        for index, score in enumerate(scores)
    ]
    sums = np.array(
        [[score or 0.0, 1.0] if i else [0, 0] for score, i in zip(scores, inside, strict=True)]
    )
    zeros = np.zeros(len(scores), np.int64)
    return Statistic(sums, zeros if strata is None else strata, lambda s: scale * _ratio(s))


def _by_unit(sums: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Adds up the rows of each unit, int (N,): (N, S) -> (U, S)."""
    totals = np.zeros((units.max() + 1, sums.shape[1]))
    np.add.at(totals, units, sums)
    return totals


def _spread(sums: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Gives every group columns of its own: (U, S) -> (U, G * S)."""
    count, width = groups.max() + 1, sums.shape[1]
    wide = np.zeros((len(sums), count, width))
    wide[np.arange(len(sums)), groups] = sums
    return wide.reshape(len(sums), count * width)


def _of_group_means(items: Sequence[Item], labels: Sequence[str], reduce: str) -> Statistic:
    """Returns the mean or sum of the groups' mean scores; items labelled "" count nowhere."""
    inside = [index for index, label in enumerate(labels) if label]
    chosen = [items[index] for index in inside]
    groups = _codes([labels[index] for index in inside])
    sums = _mean(_scores(chosen)).sums
    width = groups.max() + 1

    def value(total: np.ndarray) -> np.ndarray:
        means = _ratio(total.reshape(*total.shape[:-1], width, 2))
        combined: np.ndarray = getattr(np, reduce)(means, axis=-1)
        return combined

    return Statistic(_spread(sums, groups), groups, value)


def _benchmark(name: str, items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    task = tasks.find(name)
    sets = {} if task is None else task.sets
    result: Statistics = {}
    for prefix, dataset in sets.items():
        start = f"{prefix}_" if prefix else ""
        # Rows say their set only where a key has several.
        chosen = [item for item in items if len(sets) == 1 or item.row.get("set") == dataset.name]
        if not chosen:
            continue
        of_prefix = {m.removeprefix(start): v for m, v in values.items() if m.startswith(start)}
        # The special ones last: they know better what a name stands for.
        of_score = _OF_SCORE.get(dataset.score or dataset.judge, lambda items, values: {})
        of_set = _overall(chosen, of_prefix) | of_categories(chosen) | of_score(chosen, of_prefix)
        result |= {f"{start}{metric}": statistic for metric, statistic in of_set.items()}
    # Each set counts alike, however many questions it has.
    if task is not None and task.mean:
        labels = [str(item.row.get("set", "")) for item in items]
        result[task.mean] = _of_group_means(items, labels, "mean")
    return result or (_overall(items, values) | of_categories(items))


def _overall(items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    """Returns the mean of all scores for every metric that may be it, whatever it is called."""
    means = {scale: _mean(_scores(items), scale=scale) for scale in (1.0, 100.0)}
    return {
        metric: mean
        for metric, value in values.items()
        for mean in means.values()
        if mean.sums[:, 1].any() and _equal(mean.total(), value)
    }


def _mme(items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    # Two questions of an image follow each other: the image is what is drawn, for its pair counts.
    tasks_of = [item.categories[0] for item in items]
    first_of_task = {task: tasks_of.index(task) for task in tasks_of}
    units = _codes([(task, (i - first_of_task[task]) // 2) for i, task in enumerate(tasks_of)])
    scores = np.array([item.score or 0.0 for item in items])
    right, count = (_by_unit(column[:, None], units) for column in (scores, np.ones(len(items))))
    # A pair counts if both of its questions are right.
    both = (right == 2).astype(float)
    sums = np.concatenate([right, count, both, np.ones_like(both)], axis=1)
    labels = list(dict.fromkeys(tasks_of))
    strata = np.zeros(len(sums), np.int64)
    strata[units] = _codes(tasks_of)

    def score(total: np.ndarray) -> np.ndarray:
        points: np.ndarray = (
            100 * total[..., 0] / total[..., 1] + 100 * total[..., 2] / total[..., 3]
        )
        return points

    def summed(total: np.ndarray) -> np.ndarray:
        points = score(total.reshape(*total.shape[:-1], -1, 4))
        return points.sum(axis=-1)

    result: Statistics = {}
    for code, label in enumerate(labels):
        result[label] = Statistic(sums * (strata == code)[:, None], strata, score)
    for group in ("perception", "cognition"):
        chosen = [
            c for c, label in enumerate(labels) if (label in _COGNITION) == (group == "cognition")
        ]
        inside = np.isin(strata, chosen)
        if inside.any():
            # Numbered anew: columns of tasks outside the group would divide 0 by 0.
            codes = _codes(strata[inside].tolist())
            result[group] = Statistic(_spread(sums[inside], codes), codes, summed)
    return result


_COGNITION = frozenset(
    ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
)
"""MME's tasks of this group; all others are perception."""


def _pope(items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    labels = [item.categories[0] for item in items]
    strata = _codes(labels)
    counts = np.zeros((len(items), 4))
    for index, item in enumerate(items):
        if item.score is None:
            continue
        # The original takes any label but "no" for yes.
        expected = item.references[:1] != ("no",)
        predicted = expected if item.score else not expected
        counts[index, (0 if expected else 1) if predicted else (3 if expected else 2)] = 1

    def f1(total: np.ndarray) -> np.ndarray:
        tp, fp, fn = (total[..., column] for column in (0, 1, 3))
        return _safe(2 * tp, 2 * tp + fp + fn)

    def mean_f1(total: np.ndarray) -> np.ndarray:
        averaged: np.ndarray = f1(total.reshape(*total.shape[:-1], -1, 4)).mean(axis=-1)
        return averaged

    rates: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "f1": f1,
        "accuracy": lambda t: _safe(t[..., 0] + t[..., 2], t.sum(axis=-1)),
        "precision": lambda t: _safe(t[..., 0], t[..., 0] + t[..., 1]),
        "recall": lambda t: _safe(t[..., 0], t[..., 0] + t[..., 3]),
        "yes_ratio": lambda t: _safe(t[..., 0] + t[..., 1], t.sum(axis=-1)),
    }
    result = {
        f"{label}_{name}": Statistic(counts * (strata == code)[:, None], strata, rate)
        for code, label in enumerate(dict.fromkeys(labels))
        for name, rate in rates.items()
    }
    return {**result, "f1": Statistic(_spread(counts, strata), strata, mean_f1)}


def _safe(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides; 0 where the original would divide by zero."""
    quotient: np.ndarray = np.divide(
        numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0
    )
    return quotient


def _pairs(items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    scores = [item.score or 0.0 for item in items]
    # Both questions of a pair of images must be right; a last one without its second is dropped.
    both = [a * b for a, b in zip(scores[::2], scores[1::2], strict=False)]
    return {"accuracy": _mean(both), "single_accuracy": _mean([*scores])}


def _mirb(items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    tasks_of = [item.categories[0] for item in items]
    groups_of = [item.categories[1] if len(item.categories) > 1 else "" for item in items]
    result: Statistics = {}
    for group in dict.fromkeys(filter(None, groups_of)):
        inside = [t if g == group else "" for t, g in zip(tasks_of, groups_of, strict=True)]
        result[group] = _of_group_means(items, inside, "mean")
    # Tasks of no group count nowhere, as in the original.
    grouped = [t if g else "" for t, g in zip(tasks_of, groups_of, strict=True)]
    if not any(grouped):
        return result
    group_of_task = dict(zip(grouped, groups_of, strict=True))
    names = [label for label in dict.fromkeys(grouped) if label]
    group_codes = _codes([group_of_task[name] for name in names])
    base = _of_group_means(items, grouped, "mean")

    def value(total: np.ndarray) -> np.ndarray:
        means = _ratio(total.reshape(*total.shape[:-1], len(names), 2))
        by_group = [
            means[..., group_codes == g].mean(axis=-1) for g in range(group_codes.max() + 1)
        ]
        averaged: np.ndarray = np.mean(by_group, axis=0)
        return averaged

    return result | {"accuracy": Statistic(base.sums, base.strata, value)}


def _task_means(reduce: str, metric: str) -> "_OfScore":
    def make(items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
        # A task that the original does not know counts nowhere, and has no metric of its name.
        labels = [c if c in values else "" for c in (item.categories[0] for item in items)]
        return {metric: _of_group_means(items, labels, reduce)} if any(labels) else {}

    return make


def _remote_answers(items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    useful = [item.categories[:1] not in (("count",), ("area",)) for item in items]
    return {"useful_accuracy": _mean(_scores(items), members=useful)} if any(useful) else {}


def _mmhal(items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    scores = _scores(items)
    # The eight types of questions take turns in the file.
    types = {
        f"type_{n + 1}": _mean(scores, members=[i % 8 == n for i in range(len(items))])
        for n in range(min(8, len(items)))
    }
    # The published bound of a hallucination.
    low = [None if score is None else float(score < 3) for score in scores]
    return {"score": _mean(scores), "hallucination_rate": _mean(low), **types}


_OfScore = Callable[[Sequence[Item], Mapping[str, float]], Statistics]
_OF_SCORE: dict[str, _OfScore] = {
    "mme": _mme,
    "pope": _pope,
    "pairs": _pairs,
    "mirb": _mirb,
    "mmiu": _task_means("mean", "accuracy"),
    "contained": _task_means("sum", "overall"),
    "remote_answers": _remote_answers,
    "mmhal": _mmhal,
}
"""Name of a score or rubric in tasks.yaml -> statistics of the metrics that are no plain means."""


def _qa(name: str, items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    scores = _scores(items)
    result = {"score": _mean(scores)}
    for metric in dict.fromkeys(str(item.row["metric"]) for item in items):
        members = [item.row["metric"] == metric for item in items]
        result[metric] = _mean(scores, members=members)
    result |= {f"category_{label}": mean for label, mean in of_categories(items).items()}
    # Last: a metric `exact` that was chosen for some is the share of all in the result too.
    if "exact" in items[0].row:
        result["exact"] = _mean([float(item.row["exact"]) for item in items])
    return {metric: mean for metric, mean in result.items() if mean.sums[:, 1].any()}


def _caption(name: str, items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    result = {
        "exact": _mean([float(item.row["exact"]) for item in items]),
        "average_length": _mean([float(len(item.answer.split())) for item in items]),
    }
    # CIDEr weights words by their rarity among the references, which both models share.
    for metric in ("cider", "rouge_l"):
        if metric in items[0].row.get("scores", {}):
            result[metric] = _mean([item.row["scores"][metric] for item in items])
    zeros = np.zeros(len(items), np.int64)
    sums = items[0].row.get("sums", {})
    if "bleu" in sums:
        counts = np.array([item.row["sums"]["bleu"] for item in items], float)
        for n in range(1, 5):
            result[f"bleu_{n}"] = Statistic(counts, zeros, _bleu(n))
    if "meteor" in sums:
        result["meteor"] = Statistic(_meteor_counts(items), zeros, _meteor)
    return result


def _bleu(n: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns BLEU-n of sums: length, reference's length, n-grams of 1 to 4, those that match."""

    def value(total: np.ndarray) -> np.ndarray:
        guesses, matches = total[..., 2:6], total[..., 6:10]
        # pycocoevalcap's two constants, which keep a corpus without any match from dividing by 0.
        precisions = (matches + 1e-15) / (guesses + 1e-9)
        ratio = (total[..., 0] + 1e-15) / (total[..., 1] + 1e-9)
        brevity = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
        bleu: np.ndarray = precisions[..., :n].prod(axis=-1) ** (1 / n) * brevity
        return bleu

    return value


_METEOR_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
"""METEOR 1.5, English: exact, stem, synonym, paraphrase."""
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


def _meteor_counts(items: Sequence[Item]) -> np.ndarray:
    counts = np.array([item.row["sums"]["meteor"] for item in items], float)
    (length, reference_length), (chunks, words, reference_words) = counts[:, :2].T, counts[:, 20:].T
    whole = (words == length) & (reference_words == reference_length) & (chunks == 1)
    # METEOR leaves the one chunk of a candidate that equals its reference out of a corpus's.
    counts[whole, 20] = 0
    return counts


def _meteor(total: np.ndarray) -> np.ndarray:
    """Returns METEOR of the counts that its process adds up, 23 for an image.

    They are the lengths of candidate and reference, function words in each, then for each of four
    matchers the matched content words and function words of either side, chunks, matched words.
    """
    length, reference_length, function, reference_function = np.moveaxis(total[..., :4], -1, 0)
    matched = total[..., 4:20].reshape(*total.shape[:-1], 4, 4)
    chunks, words, reference_words = np.moveaxis(total[..., 20:], -1, 0)
    content, by_function = _METEOR_WEIGHTS * _DELTA, _METEOR_WEIGHTS * (1 - _DELTA)
    hits = (matched[..., 0] * content + matched[..., 2] * by_function).sum(axis=-1)
    reference_hits = (matched[..., 1] * content + matched[..., 3] * by_function).sum(axis=-1)
    weighted = _DELTA * (length - function) + (1 - _DELTA) * function
    reference_weighted = (
        _DELTA * (reference_length - reference_function) + (1 - _DELTA) * reference_function
    )
    with np.errstate(all="ignore"):
        precision, recall = hits / weighted, reference_hits / reference_weighted
        f_mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragments = chunks / ((words + reference_words) / 2)
        score = f_mean * (1 - _GAMMA * fragments**_BETA)
    return np.nan_to_num(score)


def _retrieval(name: str, items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    # An image is drawn with all of its texts: they are no independent samples.
    units = _codes([item.images[0] for item in items])
    is_text = np.array([bool(item.question) for item in items])
    strata = np.zeros(units.max() + 1, np.int64)
    columns: dict[str, np.ndarray] = {}
    for metric in values:
        mode, _, rest = metric.partition("_retrieval_recall@")
        mode, _, direction = mode.rpartition("_")
        if not rest or mode not in items[0].row["rank"]:
            continue
        members = is_text if direction == "image" else ~is_text
        # A rank of 0 is the first place.
        hits = np.array([item.row["rank"][mode] < int(rest) for item in items]) & members
        columns[metric] = _by_unit(np.stack([hits, members], axis=1).astype(float), units)
    result = {metric: Statistic(sums, strata, _ratio) for metric, sums in columns.items()}
    for mode in items[0].row["rank"]:
        of_mode = [
            sums
            for metric, sums in columns.items()
            if metric.rpartition("_retrieval")[0] in (f"{mode}_image", f"{mode}_text")
        ]
        if of_mode:
            joined = np.concatenate(of_mode, axis=1)
            result[f"{mode}_mean_recall"] = Statistic(joined, strata, _mean_ratio)
    return result


def _mean_ratio(total: np.ndarray) -> np.ndarray:
    averaged: np.ndarray = _ratio(total.reshape(*total.shape[:-1], -1, 2)).mean(axis=-1)
    return averaged


def _classify(name: str, items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    classes = _codes([item.references[0] for item in items])
    result: Statistics = {}
    for mode in items[0].row["rank"]:
        ranks = np.array([item.row["rank"][mode] for item in items])
        hits = [float(rank == 0) for rank in ranks]
        first, fifth = _mean(hits), _mean([float(rank < 5) for rank in ranks])
        # Drawn class by class: none of them may vanish from the mean.
        per_class = _spread(_mean(hits).sums, classes)
        recall = Statistic(per_class, classes, _mean_ratio)
        # Zero-shot, or of a linear layer.
        for prefix in (f"{mode}_", f"{mode}_lp_"):
            result |= {f"{prefix}acc1": first, f"{prefix}acc5": fifth}
            result[f"{prefix}mean_per_class_recall"] = recall
    return result


def _preference(name: str, items: Sequence[Item], values: Mapping[str, float]) -> Statistics:
    # All of its metrics are means of a column of the rows.
    names = [metric for metric in values if metric in items[0].row]
    return {metric: _mean([item.row[metric] for item in items]) for metric in names}


_OF_FORM: dict[str, Callable[[str, Sequence[Item], Mapping[str, float]], Statistics]] = {
    "benchmark": _benchmark,
    "qa": _qa,
    "caption": _caption,
    "retrieval": _retrieval,
    "classify": _classify,
    # A mean average precision is no sum over images.
    "labels": lambda name, items, values: {},
    "preference": _preference,
}
"""Evaluator -> its statistics."""
