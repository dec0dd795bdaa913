"""gelu: torch's own kernel takes the place of the exact GELU alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from internvl.models.kernels import gelu


def test_it_only_takes_the_place_of_the_exact_one():
    tower = nn.Sequential(ACT2FN["gelu"], ACT2FN["gelu_pytorch_tanh"], nn.GELU())
    kinds = [type(module) for module in tower]
    gelu.enable(tower)
    assert [type(module) for module in tower] == [gelu.OwnKernelGelu, *kinds[1:]]
    inputs = torch.randn(1000).bfloat16()
    assert torch.equal(tower[0](inputs), F.gelu(inputs))


def test_the_kernel_alone():
    inputs = torch.randn(3, 5, 8)
    assert torch.equal(gelu.gelu(inputs), F.gelu(inputs))
    torch.library.opcheck(gelu.gelu, (inputs,))


@pytest.mark.gpu
@pytest.mark.parametrize("trains", [False, True])
def test_compiled_for_a_gpu(trains):
    layer = nn.Sequential(ACT2FN["gelu"])
    gelu.enable(layer)
    inputs = torch.randn(3, 100, 64, device="cuda").bfloat16().requires_grad_(trains)
    found = torch.compile(layer, dynamic=True)(inputs)
    torch.testing.assert_close(found, F.gelu(inputs))
    if trains:
        (gradient,) = torch.autograd.grad(found.float().sum(), inputs)
        (wanted,) = torch.autograd.grad(F.gelu(inputs).float().sum(), inputs)
        torch.testing.assert_close(gradient, wanted)
