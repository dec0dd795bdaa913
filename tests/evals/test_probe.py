"""A linear layer trained on features."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from labelled_trees import draw

from internvl import evaluate
from internvl.config import eval_config
from internvl.errors import ConfigError, UserError
from internvl.evals import probe


def spec(**more: object):
    return eval_config(type="classify", annotations=".", set="cifar10", method="probe", **more)


def clusters(count: int = 60, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    centers = torch.eye(8)[:classes]
    noise = 0.1 * torch.randn(count, 8, generator=generator)
    return torch.nn.functional.normalize(centers[labels] + noise, dim=1), labels


def test_it_learns_what_can_be_learnt() -> None:
    features, labels = clusters()
    scores = probe.fit(features, labels, 3, spec(batch_size=16))(features)
    assert (scores.argmax(dim=1) == labels).all()


def test_the_schedule_and_steps_are_the_originals() -> None:
    """Its loop, written down: AdamW without decay, a cosine from the first step to 0."""
    features, labels = clusters(10)
    config = spec(batch_size=4, probe_epochs=2, probe_lr=0.05, probe_seed=5)
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randperm(10, generator=generator)
    layer = torch.nn.Linear(8, 3)
    for parameter in layer.parameters():
        parameter.data.uniform_(-(8**-0.5), 8**-0.5, generator=generator)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0)
    step = 0
    for _ in range(2):
        for rows in torch.randperm(10, generator=generator).split(4):
            optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(math.pi * step / 6)) * 0.05
            optimizer.zero_grad()
            scores = layer(features[chosen][rows])
            torch.nn.functional.cross_entropy(scores, labels[chosen][rows]).backward()
            optimizer.step()
            step += 1
    assert torch.equal(probe.fit(features, labels, 3, config)(features), layer(features))


def test_shots_are_of_every_class() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    chosen = probe.choose(labels, 2, torch.Generator().manual_seed(0))
    assert sorted(labels[chosen].tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match="3 of every class, but class 1 has 2 images"):
        probe.choose(labels, 3, torch.Generator())


def test_a_probe_of_a_set(model: Path, tmp_path: Path) -> None:
    draw("renderedsst2", tmp_path)
    shutil.copytree(tmp_path / "rendered-sst2/test", tmp_path / "rendered-sst2/train")
    options = {"root": tmp_path, "method": "probe", "modes": ["c"], "to": tmp_path / "out"}
    options |= {"device": "cpu", "probe_epochs": 100, "output": tmp_path / "r.json"}
    measured = evaluate.measure(model, "renderedsst2", **options)
    # The training images are the tested ones.
    assert measured.metrics["renderedsst2/c_lp_acc1"] == 1.0
    line = json.loads((tmp_path / "r.json").read_text())
    assert line["task"] == "linear_probe"
    assert line["metrics"] == {
        "lp_acc1": 1.0,
        "lp_mean_per_class_recall": 1.0,
        "lr": 0.1,
        "epochs": 100,
        "seed": 0,
        "fewshot_k": -1,
    }
    shown = evaluate.render(measured.metrics, "", measured.counts, measured.tables)
    assert "100.00" in shown


def test_what_a_probe_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="probe learns from the training split of `set`"):
        eval_config(type="classify", annotations=tmp_path, method="probe")
