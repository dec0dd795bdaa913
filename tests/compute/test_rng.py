"""Random numbers that a seed, a step and a rank decide, whatever was drawn before."""

import torch

from internvl import dist
from internvl.compute import rng


def draws(seed: int, step: int) -> list[float]:
    rng.seed_step(seed, step)
    return torch.rand(3).tolist()


def test_draws_depend_on_seed_step_and_rank_alone(monkeypatch) -> None:
    first = draws(7, 12)
    torch.rand(5)
    assert draws(7, 12) == first
    assert draws(8, 12) != first != draws(7, 13)
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert draws(7, 12) != first


def test_what_is_drawn_inside_changes_nothing_outside() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with rng.preserve_rng(torch.device("cpu")):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)
