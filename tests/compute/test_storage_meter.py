"""The peak of living tensors: views once, freed ones gone, resized ones by their new size."""

import torch

from internvl.compute.storage_meter import StorageMeter


def test_what_lives_at_the_same_time_counts():
    held = torch.zeros(100)
    with StorageMeter([held, held[:10]]) as meter:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        del first
        assert meter.peak == 4400
        del view
        second = torch.ones(500)
    assert meter.peak == 4400
    assert len(second) == 500


def test_what_the_backward_pass_saves_counts():
    weight = torch.ones(1000, requires_grad=True)
    with StorageMeter([weight]) as meter:
        product = (weight * 2).exp()  # exp saves its result, and the product is freed
        live = meter._total
        product.sum().backward()
    assert live == 2 * 4000
    assert meter.peak >= 3 * 4000
