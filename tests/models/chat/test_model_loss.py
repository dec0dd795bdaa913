"""The supervised loss: logits where they are needed, gradients where something learns."""

import pytest
import torch
import torch.nn.functional as F
from chat_folders import IMAGE_TOKEN_ID, training_model

from internvl.models.adapters import lora
from internvl.models.chat.model import Supervision

K = 9  # visual tokens of an 84-pixel tile


@pytest.fixture
def model(tmp_path):
    return training_model(tmp_path)


def row(num_tiles=2):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 400, (30,), generator=generator)
    ids = torch.cat([text[:4], torch.full((K * num_tiles,), IMAGE_TOKEN_ID), text[4:]])
    pixels = torch.randn(num_tiles, 3, 84, 84, generator=generator) if num_tiles else None
    return {"input_ids": ids[None], "pixel_values": pixels}


def supervision(length):
    positions = torch.tensor([length - 9, length - 5, length - 5, length - 2])
    return Supervision(positions, torch.tensor([7, 11, 13, 17]), torch.tensor([1.0, 0.5, 2.0, 1.0]))


@pytest.mark.parametrize("num_tiles", [2, 0])
@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_the_loss_is_that_of_all_logits(model, chunk, num_tiles):
    inputs = row(num_tiles)
    wanted_at = supervision(inputs["input_ids"].shape[1])
    logits = model(**inputs).logits[0, wanted_at.positions]
    each = F.cross_entropy(logits, wanted_at.targets, reduction="none")
    wanted = (each * wanted_at.weights).sum()
    wanted.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.loss_chunk = chunk
    output = model(**inputs, supervision=wanted_at)
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, wanted)
    for name, gradient in gradients.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_logits_only_where_supervised(model):
    inputs = row()
    counted = []
    model.lm_head.register_forward_hook(lambda m, given, out: counted.append(len(given[0])))
    model.loss_chunk = 3
    model(**inputs, supervision=supervision(inputs["input_ids"].shape[1]))
    assert counted == [3, 1]


def test_nothing_is_run_back_below_what_learns(model):
    lora.select_trainable(model, ())
    last = len(model.model.language_model.layers) - 1
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"language_model.layers.{last}." in name)
    tracked = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, given, out, name=name: tracked.update(
                {name: isinstance(out, torch.Tensor) and out.requires_grad}
            )
        )
    inputs = row()
    model(**inputs, supervision=supervision(inputs["input_ids"].shape[1])).loss.backward()
    layer = "model.language_model.layers."
    assert not any(t for name, t in tracked.items() if name.startswith("model.vision_tower"))
    assert not any(t for name, t in tracked.items() if name.startswith("model.multi_modal"))
    assert [tracked[f"{layer}{i}"] for i in range(last + 1)] == [False] * last + [True]
