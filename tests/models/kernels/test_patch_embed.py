"""patches: the patch embedding as a product is the convolution."""

import pytest
import torch
from torch import nn

from internvl.models.kernels import patch_embed


@pytest.mark.parametrize(("height", "width"), [(56, 56), (28, 70)])
def test_the_product_is_the_convolution(height, width):
    layer = nn.Conv2d(3, 24, kernel_size=14, stride=14)
    inputs = torch.randn(2, 3, height, width)
    wanted = layer(inputs)
    names, weight = list(layer.state_dict()), layer.weight
    patch_embed.as_product(layer)
    assert list(layer.state_dict()) == names
    assert layer.weight is weight
    assert torch.equal(layer(inputs), wanted)  # a CPU keeps the convolution
    torch.testing.assert_close(layer.product(inputs), wanted)


@pytest.mark.gpu
def test_a_gpu_takes_the_product_in_training_alone():
    layer = nn.Conv2d(3, 24, kernel_size=14, stride=14, device="cuda")
    inputs = torch.randn(2, 3, 56, 56, device="cuda")
    wanted = layer(inputs)
    patch_embed.as_product(layer)
    assert torch.equal(layer.eval()(inputs), wanted)
    torch.testing.assert_close(layer.train()(inputs), layer.product(inputs))
    torch.testing.assert_close(layer(inputs), wanted, rtol=1e-3, atol=1e-3)
