"""Losses of pairs against their formulas, written out in floating point of Python."""

import math

import pytest
import torch

from internvl.config import MpoConfig
from internvl.objectives.pair_losses import PAIR_LOSSES, Rewards

BETA, DELTA, SMOOTHING = 0.1, 0.3, 0.2
CHOSEN, REJECTED, LENGTHS = (0.7, -1.2, 0.0), (0.1, 0.4, 0.0), ((3, 5), (2, 8), (1, 1))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def expected(name, c, r, n_c, n_r, smoothing):
    right, wrong = math.log(sigmoid(c - r)), math.log(sigmoid(r - c))
    return {
        "dpo": -(1 - smoothing) * right - smoothing * wrong,
        "bco": -math.log(sigmoid(c - DELTA)) - math.log(sigmoid(-(r - DELTA))),
        "ipo": ((c / n_c - r / n_r) / BETA - 1 / (2 * BETA)) ** 2,
        "hinge": max(0.0, 1 - (c - r)),
        "robust": (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing),
    }[name]


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses(name, smoothing):
    lengths = torch.tensor(LENGTHS).float()
    rewards = Rewards(torch.tensor(CHOSEN), torch.tensor(REJECTED), lengths, BETA, DELTA, smoothing)
    wanted = [
        expected(name, c, r, *n, smoothing)
        for c, r, n in zip(CHOSEN, REJECTED, LENGTHS, strict=True)
    ]
    assert PAIR_LOSSES[name](rewards).tolist() == pytest.approx(wanted, abs=1e-5)


def test_every_loss_is_a_term_of_a_recipe():
    assert [*PAIR_LOSSES] == [term for term in MpoConfig.terms if term != "sft"]


def test_weights_that_are_not_listed_are_zero():
    assert MpoConfig().term_weights == {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
    assert MpoConfig(weights={"dpo": 1.0}).term_weights == {"dpo": 1.0}
