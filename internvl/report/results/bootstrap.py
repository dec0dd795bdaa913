"""Paired bootstrap: an interval of the difference of two models' scores on the same items.

A metric is a function of sums over units (items, or pairs of questions of one image), so that a
resampled test set is a vector of weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_SEED = 0
_AT_ONCE = 1 << 21
"""Weights in memory at a time."""


@dataclass(frozen=True)
class Statistic:
    """A metric as a function of sums. U units, S sums."""

    sums: np.ndarray
    """(U, S): what every unit adds."""
    strata: np.ndarray
    """int (U,): units are drawn from those of their own stratum alone, for a metric that is a mean
    over groups must not lose one."""
    value: Callable[[np.ndarray], np.ndarray]
    """Sums (…, S) -> values (…)."""

    def total(self) -> float:
        """Returns the metric of the whole set."""
        return float(self.value(self.sums.sum(axis=0)))


def intervals(
    first: Mapping[str, Statistic],
    second: Mapping[str, Statistic],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Computes the interval of second - first for every metric, from the same resampled units.

    Both hold the same metrics of the same units in the same order. The percentile bootstrap; the
    same call gives the same numbers.
    """
    # Metrics of the same units share their resampled sets.
    together: dict[bytes, list[str]] = {}
    for name, statistic in first.items():
        together.setdefault(statistic.strata.tobytes(), []).append(name)
    ends: dict[str, tuple[float, float]] = {}
    for names in together.values():
        sums = np.concatenate(
            [side[name].sums for name in names for side in (first, second)], axis=1, dtype=float
        )
        totals = _resampled(sums, first[names[0]].strata, resamples)
        start = 0
        for name in names:
            width = first[name].sums.shape[1]
            a, b = (totals[:, s : s + width] for s in (start, start + width))
            start += 2 * width
            # An empty stratum of a tiny set divides nothing by nothing.
            with np.errstate(all="ignore"):
                change = second[name].value(b) - first[name].value(a)
            tail = 50 * (1 - level)
            low, high = np.nanpercentile(change, [tail, 100 - tail])
            ends[name] = (float(low), float(high))
    return ends


def _resampled(sums: np.ndarray, strata: np.ndarray, resamples: int) -> np.ndarray:
    """Returns the sums (resamples, S) of sets drawn with replacement within each stratum."""
    # Sorted by stratum: its units are then a range to draw from.
    order = np.argsort(strata, kind="stable")
    _, starts, sizes = np.unique(strata[order], return_index=True, return_counts=True)
    start, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    count, ordered = len(strata), np.asfortranarray(sums[order])
    # A new one for each group of metrics: what stands beside changes no interval.
    random = np.random.default_rng(_SEED)
    chunk = max(1, _AT_ONCE // count)
    totals = []
    for begin in range(0, resamples, chunk):
        sets = min(chunk, resamples - begin)
        drawn = start + (random.random((sets, count)) * size).astype(np.int64)
        drawn += np.arange(sets)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=sets * count).reshape(sets, count)
        weights = weights.astype(float)
        # A dot product each: BLAS adds in another order beside other columns or rows.
        columns = [np.einsum("ru,u->r", weights, column) for column in ordered.T]
        totals.append(np.stack(columns, axis=1))
    return np.concatenate(totals)
