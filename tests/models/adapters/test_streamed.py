"""Adapters merged weight by weight, to the bits of a merge in memory."""

import pytest
import torch
from small_models import small_model

from internvl.config import LoraConfig
from internvl.models.adapters import lora, streamed
from internvl.models.tensors import in_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["InternVL2-2B", "InternVL2-1B"])
def test_weights_are_those_of_a_merge(name, dtype):
    """InternLM2's q, k and v share one A, Qwen2's have one each."""
    on = ("language_model", "vision_tower")
    model = small_model(name, ["multi_modal_projector"], 4, on=on)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parameters = dict(model.named_parameters())
    # Copies: merging writes into the model's own.
    trained = {n: in_memory(p.detach().clone()) for n, p in parameters.items() if p.requires_grad}
    base = {
        n.replace(".base_layer.", "."): in_memory(p.detach().clone())
        for n, p in model.state_dict().items()
        if ".lora_" not in n
    }
    found = streamed.merged(base, trained, LoraConfig(rank=4, on=on), dtype)
    merged = lora.merge(model.to(dtype)).state_dict()
    assert found.keys() == merged.keys()
    for key, weight in merged.items():
        assert torch.equal(found[key].read().to(dtype), weight), key
        half = len(weight) // 2
        assert torch.equal(found[key].rows(0, half).to(dtype), weight[:half]), key
