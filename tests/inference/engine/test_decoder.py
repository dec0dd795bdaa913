"""The two passes beside the model's own forward."""

import copy

import pytest
import torch
from small_models import small_model

from internvl.inference import engine
from internvl.inference.engine import decoder as decoders
from internvl.inference.engine.decoder import Decoder, Placed
from internvl.models.kernels.last_mlp import SelectiveBlock

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_model("InternVL2-1B", (), 0).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, -1]


def test_prompts_of_a_row_then_their_next_tokens(model):
    decoder = Decoder(model)
    decoder.allocate(5, 64, torch.float32)
    prompts = [torch.arange(20, 20 + length) for length in (7, 1, 12)]
    places = [3, 0, 4]
    logits = decoder.prefill(
        [Placed(ids, None, slot) for ids, slot in zip(prompts, places, strict=True)]
    )
    for ids, row in zip(prompts, logits, strict=True):
        torch.testing.assert_close(row, logits_of(model, ids), rtol=1e-4, atol=1e-5)
    # Slots 1 and 2 hold nothing; they run along.
    tokens, positions = [0] * 5, [0] * 5
    for ids, slot in zip(prompts, places, strict=True):
        tokens[slot], positions[slot] = 30 + slot, len(ids)
    decoder.place(tokens, positions)
    logits = decoder.decode(13)
    assert torch.isfinite(logits).all()
    for ids, slot in zip(prompts, places, strict=True):
        longer = torch.cat([ids, torch.tensor([30 + slot])])
        torch.testing.assert_close(logits[slot], logits_of(model, longer), rtol=1e-4, atol=1e-5)


def test_the_last_block_at_the_ends_alone(model):
    fast = copy.deepcopy(model)
    engine.accelerate(fast)
    assert isinstance(fast.model.language_model.layers[-1], SelectiveBlock)
    rows = []
    for decoder in (Decoder(model), Decoder(fast)):
        decoder.allocate(2, 64, torch.float32)
        placed = [Placed(torch.arange(20, 20 + n), None, slot) for slot, n in enumerate((9, 4))]
        rows.append(decoder.prefill(placed))
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)


def test_the_model_keeps_its_own_attention(model):
    before = model.config.text_config._attn_implementation
    decoder = Decoder(model)
    decoder.allocate(1, 32, torch.float32)
    decoder.prefill([Placed(torch.arange(5, 9), None, 0)])
    assert model.config.text_config._attn_implementation == before
    broken = Placed(torch.full((4,), 10**6), None, 0)  # no such token
    with pytest.raises(IndexError):
        decoder.prefill([broken])
    assert model.config.text_config._attn_implementation == before


@pytest.mark.parametrize("total", [1, 127, 129, 1000, 1025, 16000, 16384])
def test_rows_on_a_gpu_have_few_lengths(total):
    assert decoders._padded(total, CPU) == total
    padded = decoders._padded(total, torch.device("cuda"))
    assert total <= padded <= max(128, 1.25 * total + 128)
    assert padded % 128 == 0


@pytest.mark.gpu
def test_a_captured_pass_is_the_pass():
    torch.manual_seed(0)
    model = small_model("InternVL2-2B", (), 0).eval().to("cuda", torch.bfloat16)
    decoder = Decoder(model)
    decoder.allocate(4, 512, torch.bfloat16)
    decoder.prefill([Placed(torch.arange(20, 90), None, slot) for slot in range(4)])
    for step, longest in enumerate((71, 72, 300, 301)):
        decoder.place([30 + step] * 4, [longest - 1] * 4)
        replayed = decoder.decode(longest).clone()
        reach = -(-longest // decoders.REACH) * decoders.REACH
        with torch.no_grad():
            torch.testing.assert_close(replayed, decoder._decode(reach), rtol=0, atol=0)
