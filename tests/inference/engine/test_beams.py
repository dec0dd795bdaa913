"""The beam search of slots against `transformers`' own, on a stock Llama."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from internvl.inference.engine.beams import Beams, until_end
from internvl.inference.settings import Settings

END = 2


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    with torch.no_grad():
        model.lm_head.weight[END] *= 1.5  # texts end
    return model


@torch.no_grad()
def ours(llama, prompts, settings):
    cache, (count, read) = DynamicCache(config=llama.config), prompts.shape
    beams = settings.num_beams
    search = Beams(count, read + beams * settings.max_new_tokens, beams, END, prompts.device)
    first = llama(prompts, past_key_values=cache, use_cache=True).logits[:, -1]
    search.begin(torch.arange(count), [read] * count, [settings] * count, first)
    for step in range(1, settings.max_new_tokens + 3):
        seen = search.seen[:, None, :, : read + beams * step]
        # Searches that are done go on, and what they answered stays.
        before = search.outcome()
        given = {"position_ids": search.positions, "past_key_values": cache}
        if step >= settings.max_new_tokens:
            break
        search.advance(llama(search.tokens, attention_mask=seen, **given).logits)
        done = before[:, 0].bool()
        assert torch.equal(search.outcome()[done], before[done])
    return [until_end(ids[: settings.max_new_tokens], END) for ids in before[:, 1:].tolist()]


def theirs(llama, prompts, settings):
    config = settings.generation_config(END, END)
    output = llama.generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_config=config
    )
    return [until_end(ids, END) for ids in output[:, prompts.shape[1] :].tolist()]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize(("num_beams", "longest", "shortest"), [(5, 12, 0), (5, 12, 8), (3, 6, 2)])
def test_texts_equal_transformers(llama, num_beams, longest, shortest, length_penalty):
    prompts = torch.randint(3, 40, (12, 5), generator=torch.Generator().manual_seed(1))
    extra = {"length_penalty": length_penalty}
    settings = Settings(longest, shortest, num_beams, extra=extra)
    assert ours(llama, prompts, settings) == theirs(llama, prompts, settings)


def test_texts_of_several_lengths_are_among_them(llama):
    """Otherwise the test above would say nothing of ends."""
    prompts = torch.randint(3, 40, (12, 5), generator=torch.Generator().manual_seed(1))
    texts = ours(llama, prompts, Settings(12, 0, 5))
    assert len({len(text) for text in texts}) > 3


def test_a_search_in_a_slot_of_another_one(llama):
    """A slot that a longer search had, and slots that nobody has, are not seen."""
    prompts = torch.randint(3, 40, (3, 5), generator=torch.Generator().manual_seed(3))
    search = Beams(4, 40, 3, END, prompts.device)
    with torch.no_grad():
        logits = llama(prompts).logits[:, -1]
    some = [Settings(8, 0, 3)] * 3
    search.begin(torch.tensor([3, 0, 2]), [5, 5, 5], some, logits)
    for _ in range(12):  # more than any of them may have
        search.advance(torch.randn(4, 3, 40))
    assert torch.isfinite(search.search.scores).all()
    assert search.search.done[[3, 0, 2]].all()
    fresh = Beams(4, 40, 3, END, prompts.device)
    for beams in (search, fresh):
        beams.begin(torch.tensor([2]), [9], [Settings(4, 2, 3)], logits[:1])
        beams.advance(torch.linspace(0, 1, 480).view(4, 3, 40))
    for both in zip(search.search.tensors(), fresh.search.tensors(), strict=True):
        assert torch.equal(both[0][2], both[1][2])
    assert torch.equal(search.seen[2], fresh.seen[2])
    assert search.cells[2].tolist() == fresh.cells[2].tolist() == [12, 13, 14]
