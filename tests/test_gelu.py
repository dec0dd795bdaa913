"""gelu: the rational GELU of training is the exact one, up to what float32 and bfloat16 round."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from internvl.models import gelu


def test_it_is_the_exact_one_up_to_rounding():
    inputs = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    found, wanted = gelu.gelu(inputs.float()).double(), F.gelu(inputs)
    assert (found - wanted).abs().max() < 1e-6
    drawn = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    differ = gelu.gelu(drawn) != F.gelu(drawn)
    assert differ.float().mean() < 2e-4
    assert drawn[differ].float().max() < -3  # where it is nearly zero


def test_it_only_takes_the_place_of_the_exact_one():
    tower = nn.Sequential(ACT2FN["gelu"], ACT2FN["gelu_pytorch_tanh"], nn.GELU())
    kinds = [type(module) for module in tower]
    gelu.rationalize(tower)
    assert [type(module) for module in tower] == [gelu.RationalGelu, *kinds[1:]]
    inputs = torch.randn(1000).bfloat16()
    assert torch.equal(tower[0].train()(inputs), F.gelu(inputs))  # a CPU computes the exact one


@pytest.mark.gpu
def test_a_gpu_takes_it_in_training_alone():
    layer = nn.Sequential(ACT2FN["gelu"])
    gelu.rationalize(layer)
    inputs = torch.randn(100_000, device="cuda").bfloat16()
    assert torch.equal(layer.eval()(inputs), F.gelu(inputs))
    assert torch.equal(layer.train()(inputs), gelu.gelu(inputs))
    assert torch.equal(layer(inputs.float()), F.gelu(inputs.float()))
