"""patch_embed: the patch embedding as a product is the convolution."""

import pytest
import torch
from torch import nn

from internvl.models.kernels import patch_embed


class Tower(nn.Module):
    """Patch embedding under the names of `transformers`' vision tower."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.patch_embeddings = nn.Module()
        layer = nn.Conv2d(3, 24, kernel_size=14, stride=14, device=device)
        self.embeddings.patch_embeddings.projection = layer

    @property
    def layer(self):
        return self.embeddings.patch_embeddings.projection


@pytest.mark.parametrize(("height", "width"), [(56, 56), (28, 70)])
def test_the_product_is_the_convolution(height, width):
    tower = Tower()
    inputs = torch.randn(2, 3, height, width)
    expected = tower.layer(inputs)
    names, weight = list(tower.state_dict()), tower.layer.weight
    random = torch.get_rng_state()
    patch_embed.enable(tower)
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tower.state_dict()) == names
    assert tower.layer.weight is weight
    assert torch.equal(tower.layer(inputs), expected)  # a CPU keeps the convolution
    torch.testing.assert_close(tower.layer.product(inputs), expected)


@pytest.mark.gpu
def test_a_gpu_takes_the_product_in_training_alone():
    tower = Tower("cuda")
    inputs = torch.randn(2, 3, 56, 56, device="cuda")
    expected = tower.layer(inputs)
    patch_embed.enable(tower)
    layer = tower.layer
    assert torch.equal(layer.eval()(inputs), expected)
    torch.testing.assert_close(layer.train()(inputs), layer.product(inputs))
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-3, atol=1e-3)
