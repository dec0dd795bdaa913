"""The beam search of captions against `transformers`' own, on a stock Llama."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from internvl.models.dual.beam_search import BeamSearchConfig, search

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
def ours(llama, prompts, how):
    cache, read = DynamicCache(config=llama.config), prompts.shape[1]

    def step(tokens, seen):
        mask = torch.cat([seen.new_ones(*seen.shape[:2], read), seen], dim=2)[:, None]
        places = torch.full_like(tokens, read + seen.shape[2] // seen.shape[1] - 1)
        given = {"attention_mask": mask, "position_ids": places, "past_key_values": cache}
        return llama(tokens, **given).logits

    first = llama(prompts, past_key_values=cache, use_cache=True).logits[:, -1]
    return search(first, step, how)


def theirs(llama, prompts, how):
    settings = GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        min_new_tokens=how.min_new_tokens or None,
        num_beams=how.num_beams,
        length_penalty=how.length_penalty,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=END,
    )
    mask = torch.ones_like(prompts)
    output = llama.generate(prompts, attention_mask=mask, generation_config=settings)
    return output[:, prompts.shape[1] :]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize(("num_beams", "longest", "shortest"), [(5, 12, 0), (5, 12, 8), (3, 6, 2)])
def test_texts_equal_transformers(llama, num_beams, longest, shortest, length_penalty):
    prompts = torch.randint(3, 40, (12, 5), generator=torch.Generator().manual_seed(1))
    how = BeamSearchConfig(num_beams, longest, shortest, END, length_penalty)
    found, wanted = ours(llama, prompts, how), theirs(llama, prompts, how)
    assert torch.equal(found[:, : wanted.shape[1]], wanted)
    assert (found[:, wanted.shape[1] :] == END).all()


@pytest.mark.parametrize("shortest", [0, 6])
def test_greedy_texts_equal_transformers(llama, shortest):
    prompts = torch.randint(3, 40, (12, 5), generator=torch.Generator().manual_seed(2))
    how = BeamSearchConfig(1, 12, shortest, END)
    found, wanted = ours(llama, prompts, how), theirs(llama, prompts, how)
    assert torch.equal(found[:, : wanted.shape[1]], wanted)


def test_texts_of_several_lengths_are_among_them(llama):
    """Otherwise the tests above would say nothing of ends."""
    prompts = torch.randint(3, 40, (12, 5), generator=torch.Generator().manual_seed(1))
    found = ours(llama, prompts, BeamSearchConfig(5, 12, 0, END))
    lengths = {(row != END).sum().item() for row in found}
    assert len(lengths) > 3
