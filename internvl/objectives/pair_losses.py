"""Losses of preference pairs: pure functions of rewards, each with its paper.

A reward is beta (log p(answer) - log p_reference(answer)), log p summed over the answer's tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rewards:
    """Rewards of P pairs, and the constants of their losses."""

    chosen: Tensor
    """float32 (P,)"""
    rejected: Tensor
    """float32 (P,)"""
    lengths: Tensor
    """Tokens of the chosen and the rejected answers, float32 (P, 2)."""
    beta: float = 0.1
    delta: float = 0.0
    """Threshold between good and bad answers of `bco`: the running mean of rewards."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are assumed to be swapped."""

    @property
    def margins(self) -> Tensor:
        """(P,): how much better the chosen answers are rewarded."""
        return self.chosen - self.rejected

    @classmethod
    def of_logps(cls, logps: Tensor, reference: Tensor, lengths: Tensor, beta: float) -> "Rewards":
        """Makes rewards of log-probabilities (P, 2), those of the chosen answers first."""
        # Sums over tokens, as in the papers: a mean would favour long answers.
        chosen, rejected = (beta * (logps - reference)).unbind(1)
        return cls(chosen, rejected, lengths, beta)

    @classmethod
    def equal(cls, beta: float, label_smoothing: float) -> "Rewards":
        """Makes the rewards of one pair before the first update: policy and reference agree."""
        zero = torch.zeros(1)
        return cls(zero, zero, torch.ones(1, 2), beta, label_smoothing=label_smoothing)


def dpo(rewards: Rewards) -> Tensor:
    """Returns the preference loss (P,), Rafailov et al. 2023, arXiv:2305.18290.

    With label smoothing the conservative one of Mitchell 2023 (cDPO).
    """
    smoothing = rewards.label_smoothing
    # Not log(sigmoid): it is -inf for margins below -104.
    right, wrong = F.logsigmoid(rewards.margins), F.logsigmoid(-rewards.margins)
    return -(1 - smoothing) * right - smoothing * wrong


def bco(rewards: Rewards) -> Tensor:
    """Returns the quality loss (P,), Jung et al. 2024, arXiv:2404.04656, without density ratio."""
    good = F.logsigmoid(rewards.chosen - rewards.delta)
    bad = F.logsigmoid(rewards.delta - rewards.rejected)
    return -good - bad


def ipo(rewards: Rewards) -> Tensor:
    """Returns the squared loss (P,), Azar et al. 2023, arXiv:2310.12036.

    Of means over tokens, as TRL computes it; the paper has sums.
    """
    per_token = torch.stack([rewards.chosen, rewards.rejected], 1) / rewards.lengths
    # Undone: this loss is of log-ratios, and beta is in its target alone.
    ratios = (per_token[:, 0] - per_token[:, 1]) / rewards.beta
    return (ratios - 1 / (2 * rewards.beta)) ** 2


def hinge(rewards: Rewards) -> Tensor:
    """Returns the hinge loss (P,), Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425."""
    return F.relu(1 - rewards.margins)


def robust(rewards: Rewards) -> Tensor:
    """Returns the loss (P,) that swapped labels leave unbiased, Chowdhury et al. 2024,
    arXiv:2403.00409."""
    smoothing = rewards.label_smoothing
    right, wrong = F.logsigmoid(rewards.margins), F.logsigmoid(-rewards.margins)
    # Swapped pairs are taken out of the sum, and the divisor scales what is left to all pairs.
    return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)


PAIR_LOSSES: dict[str, Callable[[Rewards], Tensor]] = {
    "dpo": dpo,
    "bco": bco,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
}
"""Term of an objective -> its loss of each pair, float32 (P,); a new one is an entry here and in
`config.objective.preference.PAIR_TERMS`."""
