"""Tensors offloaded to the CPU: another place, the same gradients."""

import pytest
import torch
from packed_rows import assert_same, loss_and_gradients, row
from torch import nn

from internvl.compute import kernels, memory, placement
from internvl.config import ComputeConfig
from internvl.models.attention.packed import packed_mask
from internvl.models.chat.model import Supervision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("kind", ["none", "full"])
def test_offloading_changes_nothing(model, kind):
    wanted = loss_and_gradients(model, row())
    compute = ComputeConfig(checkpointing=kind, offload=True)
    kernels.apply_compute(model, CPU, compute)
    with memory.offloaded(model, CPU, compute):
        assert_same(loss_and_gradients(model, row()), wanted)


def test_what_is_offloaded_is_another_tensor_and_weights_are_not():
    layer = nn.Linear(64, 64)
    inputs = torch.randn(64, 64)
    wanted = inputs.sum(0)
    with memory.offloaded(layer, CPU, ComputeConfig(offload=True)):
        output = layer(inputs)
    inputs.zero_()  # what the graph keeps is not the input itself …
    output.sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], wanted)
    with memory.offloaded(layer, CPU, ComputeConfig(offload=True)):
        output = inputs.requires_grad_() @ layer.weight
    saved = output.grad_fn._saved_mat2
    assert saved.data_ptr() == layer.weight.data_ptr()  # … but a weight is


@pytest.mark.gpu
def test_offloading_frees_the_gpu(model):
    placement.to_device(model, GPU, "bfloat16")
    held = {}
    for offload in (False, True):
        compute = ComputeConfig(checkpointing="full", offload=offload, attention="dense")
        kernels.apply_compute(model, GPU, compute)
        batch = row(2048).to(GPU)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with placement.autocast(GPU, "bfloat16"), memory.offloaded(model, GPU, compute):
            mask = packed_mask("sdpa", batch.document, batch.branch, model.dtype)
            found = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=mask,
                supervision=Supervision(batch.loss_positions, batch.targets, batch.loss_weights),
            ).loss
        del mask
        held[offload] = torch.cuda.memory_allocated() - before
        found.backward()
        model.zero_grad(set_to_none=True)
    assert held[True] < held[False]
