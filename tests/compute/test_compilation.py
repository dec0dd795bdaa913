"""Contexts of the compiler: what fails is blamed on its cause, generation runs uncompiled."""

import pytest
import torch
from torch import nn

from internvl.compute import compilation
from internvl.config import ComputeConfig
from internvl.errors import UserError
from internvl.models.attention import packed

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_what_fails_to_compile_is_blamed_on_flash_alone(monkeypatch):
    with pytest.raises(TypeError, match="ours"), compilation.compiling(ComputeConfig(), CPU):
        raise TypeError("ours")
    monkeypatch.setattr(packed, "has_flash", lambda device: True)
    wanted = "as this torch calls it .no such argument.: .* compute.attention=flex"
    with pytest.raises(UserError, match=wanted), compilation.compiling(ComputeConfig(), GPU):
        raise TypeError("no such argument\nand more")


class Doubled(nn.Module):
    def forward(self, inputs):
        return inputs * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from importing the compiler
def test_generation_runs_uncompiled():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    block = Doubled()
    block.compile(backend=backend)
    with compilation.uncompiled():
        block(torch.ones(2, 3))
    assert calls == []
    block(torch.ones(2, 3))
    assert len(calls) == 1
