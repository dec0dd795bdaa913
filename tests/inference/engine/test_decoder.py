"""The two passes beside the model's own forward."""

import copy

import pytest
import torch
from small_models import small_model
from torch._dynamo.utils import counters

from internvl.inference import engine
from internvl.inference.engine import attention
from internvl.inference.engine import decoder as decoders
from internvl.inference.engine.decoder import Decoder, Placed
from internvl.models.attention import packed, per_document
from internvl.models.kernels.last_mlp import SelectiveBlock


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
    decoder.tokens.copy_(torch.tensor(tokens))
    decoder.place(positions)
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
def test_rows_are_padded_little_or_to_few_lengths(total):
    assert attention.padded(per_document.DOCUMENTS, total) == total
    for kernel in (packed.FLASH, attention.VARLEN):
        assert total <= attention.padded(kernel, total) <= total + 15
        assert attention.padded(kernel, total) % 16 == 0
    few = attention.padded(packed.FLEX, total)
    assert total <= few <= max(128, 1.25 * total + 128)
    assert few % 128 == 0


@pytest.fixture
def any_length(monkeypatch):
    """Rows attend by the operator that takes any length, which on a CPU computes plainly."""
    monkeypatch.setattr(decoders, "row_kernel", lambda *_: attention.VARLEN)


def test_a_row_by_the_kernel_of_any_length(model, any_length, monkeypatch):
    rows = []
    for _ in range(2):
        decoder = Decoder(model)
        decoder.allocate(2, 64, torch.float32)
        placed = [Placed(torch.arange(20, 20 + n), None, slot) for slot, n in enumerate((9, 4))]
        rows.append(decoder.prefill(placed))
        monkeypatch.undo()
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("float8", [False, True])
def test_one_graph_serves_rows_of_any_length(model, any_length, graphs_alone, float8):
    dtype = torch.bfloat16 if float8 else torch.float32
    fast = copy.deepcopy(model).to(dtype).requires_grad_(False)
    engine.accelerate(fast, float8=float8)
    both = Decoder(fast), Decoder(fast, compiled=True)
    counters.clear()
    for length, slots in ((64, 3), (320, 4)):  # of the cache: what waits says how long slots are
        for decoder in both:
            decoder.allocate(slots, length, dtype)
        for sizes in ((9, 4), (30,), (5, 5, 7), (17, 1), (40, 3, 9)):
            ids = [torch.arange(20, 20 + n) for n in sizes]
            placed = [Placed(row, None, slot) for slot, row in enumerate(ids)]
            rows = [decoder.prefill(placed) for decoder in both]
            allowed = {"rtol": 0.05, "atol": 0.05} if float8 else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(*rows, **allowed)
    # All blocks but the last of a row, and the last one.
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
def test_a_captured_pass_is_the_pass():
    torch.manual_seed(0)
    model = small_model("InternVL2-2B", (), 0).eval().to("cuda", torch.bfloat16)
    decoder = Decoder(model)
    decoder.allocate(4, 512, torch.bfloat16)
    decoder.prefill([Placed(torch.arange(20, 90), None, slot) for slot in range(4)])
    for step, longest in enumerate((71, 72, 300, 301)):
        given = torch.full((4,), 30 + step, device="cuda")
        decoder.tokens.copy_(given)
        decoder.place([longest - 1] * 4)
        replayed = decoder.decode(longest).clone()
        assert decoder.snapshot().read().tolist() == replayed.argmax(-1).tolist()
        decoder.tokens.copy_(given)
        reach = None if decoder._has_kernel else -(-longest // decoders.REACH) * decoders.REACH
        with torch.no_grad():
            torch.testing.assert_close(replayed, decoder._decode(reach), rtol=0, atol=0)


def wide_model():
    """Heads of 64, which the kernels of GPUs take."""
    text = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}
    return small_model("InternVL2-2B", (), 0, sizes={"text": text})


@pytest.mark.gpu
@pytest.mark.parametrize("float8", [False, True])
def test_compiled_rows_of_any_length_on_a_gpu(float8):
    if float8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products")
    torch.manual_seed(0)
    model = wide_model().eval().to("cuda", torch.bfloat16).requires_grad_(False)
    plain, fast = model, copy.deepcopy(model)
    engine.accelerate(fast, float8=float8)
    slow, compiled = both = Decoder(plain), Decoder(fast, compiled=True)
    for decoder in both:
        decoder.allocate(4, 512, torch.bfloat16)
    compiled.prefill([Placed(torch.arange(20, 60), None, slot) for slot in range(3)])
    counters.clear()
    for sizes in ((9, 4), (300,), (5, 5, 7), (170, 1), (400, 3, 90)):
        ids = [torch.arange(20, 20 + n) for n in sizes]
        placed = [Placed(row, None, slot) for slot, row in enumerate(ids)]
        rows, wanted = compiled.prefill(placed), slow.prefill(placed)
        assert float((rows - wanted).norm() / wanted.norm()) < (0.2 if float8 else 0.02)
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.gpu
def test_an_odd_vocabulary_has_no_more_tokens():
    torch.manual_seed(0)
    model = wide_model().eval().to("cuda", torch.bfloat16).requires_grad_(False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:-3].clone(), False)
    engine.accelerate(model)
    logits = []
    for compiled in (False, True):
        decoder = Decoder(model, compiled=compiled)
        decoder.allocate(2, 256, torch.bfloat16)
        logits.append(decoder.prefill([Placed(torch.arange(20, 60), None, 0)]))
    assert decoder.head is not None
    assert logits[0].shape == logits[1].shape
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.02
