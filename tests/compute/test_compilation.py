"""Contexts of the compiler: what fails is blamed on its cause, generation runs uncompiled."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp import fully_shard

from internvl.check import rehearse
from internvl.compute import compilation
from internvl.config import ComputeConfig
from internvl.errors import UserError
from internvl.models.attention import packed

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Doubled(nn.Module):
    def forward(self, inputs):
        return inputs * 2


def raising(file, error):
    """A function of another file, which raises the error."""
    code = compile("def raises():\n    raise error", file, "exec")
    exec(code, names := {"error": error})
    return names["raises"]


@pytest.mark.parametrize(
    "file", ["site-packages/flash_attn/cute/interface.py", "flex/flex_flash_attention.py"]
)
def test_what_fails_to_compile_is_blamed_on_flash_alone(monkeypatch, file):
    calling = raising(file, TypeError("no such argument\nand more"))
    with pytest.raises(TypeError, match="argument"), compilation.compiling(ComputeConfig(), CPU):
        calling()
    monkeypatch.setattr(packed, "has_flash", lambda device: True)
    wanted = "as this torch calls it .no such argument.: .* compute.attention=flex"
    with pytest.raises(UserError, match=wanted), compilation.compiling(ComputeConfig(), GPU):
        calling()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from importing the compiler
def test_what_the_compiler_itself_lacks_is_not_blamed_on_flash(monkeypatch):
    monkeypatch.setattr(packed, "has_flash", lambda device: True)
    lacking = raising("torch/_inductor/tiling_utils.py", AssertionError("of the compiler"))
    block = Doubled()
    block.compile(backend=lambda graph, inputs: lacking())
    compiling = compilation.compiling(ComputeConfig(), GPU)
    with pytest.raises(BackendCompilerFailed, match="of the compiler"), compiling:
        block(torch.ones(2, 3))


class Headed(nn.Module):
    """A layer that holds numbers."""

    def __init__(self):
        super().__init__()
        self.heads, self.scale = 4, 0.25
        self.project = nn.Linear(8, 8)

    def forward(self, inputs):
        rows, length, _ = inputs.shape
        return self.project(inputs).view(rows, length, self.heads, -1) * self.scale


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_numbers_of_layers_in_shards_are_constants():
    """With them as inputs torch 2.11 could not read its cache of compiled code again."""
    block, taken = Headed(), []

    def backend(graph, inputs):
        taken.extend(value for value in inputs if not isinstance(value, torch.Tensor))
        return graph.forward

    with rehearse._stand_in(2):
        fully_shard(block)
        block.compile(backend=backend, dynamic=True)
        with compilation.tracing():
            block(torch.ones(3, 5, 8))
    assert sorted(int(size) for size in taken) == [3, 5]


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
