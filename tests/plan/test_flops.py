"""flops: equal to what torch counts while a small model is run forward and backward."""

import pytest
import torch
from small_models import small_model
from torch.utils.flop_counter import FlopCounterMode

from internvl.models.adapters import lora
from internvl.models.chat import model as chat_model
from internvl.models.kernels import last_mlp
from internvl.plan import flops
from internvl.plan.work import Sequences, Work

FULL = ("multi_modal_projector", "language_model")
ALL = ("vision_tower", *FULL)


@pytest.mark.parametrize(
    ("train", "rank", "on"),
    [
        (FULL, None, ()),
        (ALL, None, ()),
        (("multi_modal_projector",), None, ()),
        ((), 8, ("language_model",)),
        ((), 8, ("language_model", "vision_tower")),
    ],
)
@pytest.mark.parametrize("name", ["InternVL2-2B", "InternVL3_5-8B", "InternVL2-4B"])
def test_flops_are_those_that_torch_counts(name, train, rank, on):
    """Every position supervised; torch's counter knows no mask, so every query sees every key."""
    model = small_model(name, train, None)
    if rank:  # computed three times where q, k and v share an A, but needed once
        lora.inject(model, {part: lora.Adapter(rank, 16.0) for part in on}, share=False)
    model.set_attn_implementation("eager")
    length, tiles = 64, 2
    ids = torch.full((1, length), 5)
    ids[0, : tiles * 4] = model.config.image_token_id
    pixels = torch.rand(tiles, 3, 56, 56)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, pixel_values=pixels).logits.sum().backward()
    work = Work(1, tiles, length, Sequences(1, length, length * length))
    assert counted.get_total_flops() == pytest.approx(flops.count(model, work).needed, rel=1e-3)


def counted_flops(model, inputs):
    with FlopCounterMode(display=False) as counted:
        model(**inputs).loss.backward()
    return counted.get_total_flops()


@pytest.mark.parametrize(("train", "rank"), [(FULL, None), ((), 8)])
def test_the_last_mlp_runs_on_supervised_positions_alone(train, rank):
    model = small_model("InternVL3_5-8B", train, rank)
    positions = torch.arange(6)
    supervision = chat_model.Supervision(positions, positions, torch.ones(6))
    inputs = {"input_ids": torch.full((1, 64), 5), "supervision": supervision}
    whole = counted_flops(model, inputs)
    last_mlp.enable(model.model.language_model.layers)
    spared = whole - counted_flops(model, inputs)
    assert (
        spared == flops.last_mlp_flops(model, 64).needed - flops.last_mlp_flops(model, 6).needed > 0
    )


def test_an_a_that_q_k_and_v_share_is_needed_once():
    work = Work(1, 0, 64, Sequences(1, 64, 64 * 64))
    shared, apart = (small_model("InternVL2-2B", (), None) for _ in range(2))
    adapters = {"language_model": lora.Adapter(8, 16.0)}
    lora.inject(shared, adapters, share=True)
    lora.inject(apart, adapters, share=False)
    saved = flops.count(apart, work).needed - flops.count(shared, work).needed
    # Twice A (8 x 64) less: forward and weight gradient, and in the second block the input's too.
    assert saved == 2 * (2 + 3) * 2 * 8 * 64 * 64


def test_a_mixture_needs_the_experts_that_are_used():
    model = small_model("InternVL3_5-30B-A3B", FULL, None)
    block = model.model.language_model.layers[0]
    experts = sum(p.numel() for n, p in block.named_parameters() if "mlp.experts" in n)
    rest = sum(
        p.numel() for n, p in block.named_parameters() if p.ndim > 1 and "mlp.experts" not in n
    )
    counted = flops.count(model, Work(1, rows=Sequences(1, 10))).decoder.forward
    layers = len(model.model.language_model.layers)
    assert counted == pytest.approx(layers * 2 * 10 * (rest + experts * 8 / 128))
