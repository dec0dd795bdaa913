"""Devices and dtypes of trained and of frozen weights."""

import torch

from internvl.compute import placement
from internvl.models.adapters import lora

CPU = torch.device("cpu")


def test_trained_weights_are_float32_and_frozen_ones_compute(model):
    lora.select_trainable(model, ["multi_modal_projector"])
    placement.to_device(model, CPU, "bfloat16")
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
