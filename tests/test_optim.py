"""The schedule is the one of transformers; decay reaches what the recipe says."""

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from internvl import optim
from internvl.config import OptimConfig


@pytest.mark.parametrize("num_steps", [10, 100, 1107])
def test_the_schedule_equals_transformers(num_steps):
    config = OptimConfig(lr=4e-5, warmup_ratio=0.03)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.lr)
    warmup = -(-3 * num_steps // 100)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    for step in range(num_steps):
        assert optim.lr_at(step, num_steps, config) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        schedule.step()


def test_the_floor_of_the_schedule():
    config = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_ratio=0.0)
    assert optim.lr_at(100, 100, config) == pytest.approx(0.1)
    assert optim.lr_at(0, 100, config) == pytest.approx(1.0)


@pytest.mark.parametrize(("decay_vectors", "decayed"), [(False, 12), (True, 16)])
def test_decay_groups(decay_vectors, decayed):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[1].requires_grad_(False)
    config = OptimConfig(weight_decay=0.1, decay_vectors=decay_vectors)
    groups = optim.build(model, config).param_groups
    counts = {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in groups}
    assert counts[0.1] == decayed
    assert sum(counts.values()) == 16  # the frozen layer is in none
