"""Intervals of a paired bootstrap, against closed forms and brute force."""

import numpy as np
import pytest

from internvl.report.results.bootstrap import Statistic, intervals


def mean_of(scores: np.ndarray, strata: np.ndarray | None = None) -> Statistic:
    sums = np.stack([scores, np.ones(len(scores))], axis=1)
    zeros = np.zeros(len(scores), np.int64)
    return Statistic(sums, zeros if strata is None else strata, lambda s: s[..., 0] / s[..., 1])


def test_an_interval_of_a_mean_is_that_of_the_normal_law():
    """Half its width is 1.96 standard errors of the paired differences."""
    random = np.random.default_rng(3)
    first = random.random(800)
    second = first + random.normal(0.05, 0.2, 800)
    ((low, high),) = intervals({"m": mean_of(first)}, {"m": mean_of(second)}).values()
    change = second - first
    error = change.std() / np.sqrt(800)
    assert (low + high) / 2 == pytest.approx(change.mean(), abs=0.1 * error)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)


def test_pairs_cancel_what_both_models_share():
    """Items that are hard for both widen no interval: equal answers have none at all."""
    scores = np.random.default_rng(0).random(50)
    same = {"m": mean_of(scores)}
    assert intervals(same, same) == {"m": (0.0, 0.0)}


def test_the_same_call_gives_the_same_numbers_whatever_stands_beside():
    for seed in range(8):
        random = np.random.default_rng(seed)
        a, b = (mean_of(random.random(40)) for _ in range(2))
        alone = intervals({"m": a}, {"m": b})
        assert intervals({"m": a}, {"m": b}) == alone
        assert intervals({"n": b, "m": a}, {"n": a, "m": b})["m"] == alone["m"]


def test_strata_keep_their_sizes():
    """A mean over two groups, one of a single item, is defined in every resampled set."""
    strata = np.array([0] * 9 + [1])
    sums = np.zeros((10, 4))
    sums[:9, :2] = [[n % 2, 1] for n in range(9)]
    sums[9, 2:] = [1, 1]
    other = sums.copy()
    other[9, 2] = 0

    def value(s: np.ndarray) -> np.ndarray:
        return (s[..., 0] / s[..., 1] + s[..., 2] / s[..., 3]) / 2

    found = intervals({"m": Statistic(sums, strata, value)}, {"m": Statistic(other, strata, value)})
    # The single item of its group is in every set: the difference is half a point, always.
    assert found["m"] == pytest.approx((-0.5, -0.5))


def test_many_items_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch):
    from internvl.report.results import bootstrap

    random = np.random.default_rng(2)
    a, b = (mean_of(random.random(30)) for _ in range(2))
    whole = intervals({"m": a}, {"m": b}, resamples=100)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 70)
    assert intervals({"m": a}, {"m": b}, resamples=100) == whole
