"""The next token: what transformers' own processors leave, in their order."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internvl.inference.engine import choosing
from internvl.inference.settings import Settings

VOCABULARY, END = 40, 7


@dataclass
class Asked:
    settings: Settings
    prompt_ids: torch.Tensor = field(default_factory=lambda: torch.tensor([3, 5, 5, 9]))
    generated: list[int] = field(default_factory=lambda: [11, 3])
    generator: torch.Generator | None = None


def theirs(logits, asked):
    """The token that transformers' processors and its sampling choose."""
    settings, steps = asked.settings, []
    ids = torch.cat([asked.prompt_ids, torch.tensor(asked.generated)])[None]
    if settings.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.min_new_tokens:
        prompt, least = len(asked.prompt_ids), settings.min_new_tokens
        steps.append(MinNewTokensLengthLogitsProcessor(prompt, least, END))
    if settings.temperature:
        steps.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            steps.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            steps.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p:
            steps.append(MinPLogitsWarper(settings.min_p))
    scores = LogitsProcessorList(steps)(ids, logits[None].clone())
    if not settings.temperature:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1), 1))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_new_tokens": 2},
        {"min_new_tokens": 3},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "min_new_tokens": 5},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.5},
        {"temperature": 0.9, "top_k": 9, "top_p": 0.3, "repetition_penalty": 1.2},
        {"temperature": 3.0, "top_p": 1e-6, "min_new_tokens": 4},
        {"temperature": 1.3, "top_k": 0, "top_p": 0.9, "min_p": 0.2},
    ],
)
def test_a_token_is_that_of_transformers(settings):
    asked = Asked(Settings(max_new_tokens=9, **settings))
    for seed in range(40):
        torch.manual_seed(seed)
        logits = 3 * torch.randn(VOCABULARY)
        logits[END] += 2 * (seed % 3)
        torch.manual_seed(seed)
        wanted = theirs(logits, asked)
        torch.manual_seed(seed)
        untouched = logits.clone()
        assert choosing.choose(logits[None], [asked], END).tolist() == [wanted]
        assert torch.equal(logits, untouched)  # a captured graph writes there again


def test_each_request_has_settings_of_its_own():
    torch.manual_seed(0)
    logits = torch.randn(1, VOCABULARY).repeat(3, 1)
    logits[:, END] = 9
    requests = [Asked(Settings(min_new_tokens=least)) for least in (0, 2, 3)]
    first, second, third = choosing.choose(logits, requests, END).tolist()
    assert first == second == END != third


def test_a_generator_of_its_own_draws_the_same_whatever_else_is_drawn():
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    settings = Settings(temperature=2.0)

    def drawn(row, *before):
        asked = Asked(settings, generator=torch.Generator().manual_seed(5))
        rows = [*before, row]
        others = [Asked(settings) for _ in before]
        return choosing.choose(logits[rows], [*others, asked], END)[-1].item()

    assert [drawn(0), drawn(1)] == [drawn(0, 2, 2), drawn(1, 0)]


def test_likelihoods_are_those_of_the_softmax():
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    value, likeliest = choosing.likelihoods(logits, 7, 3)
    expected = logits.log_softmax(-1)
    assert value == expected[7].item()
    tops = expected.argsort(descending=True)[:3].tolist()
    assert likeliest == [(token, expected[token].item()) for token in tops]


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature):
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 40
    settings = Settings(temperature=temperature)
    assert choosing.choose(logits, [Asked(settings)], END).item() == logits.argmax()
    assert choosing.is_plain(Asked(settings))
    assert settings.generation_config(END, 0).do_sample is False
    # Above, float32 holds the scaled logits.
    least = Settings(temperature=1e-5)
    assert choosing.choose(logits, [Asked(least)], END).item() == logits.argmax()


@pytest.mark.parametrize("more", [{}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_logits_that_overflowed_do_not_end_the_engine(more):
    logits = torch.randn(2, VOCABULARY)
    logits[0] = torch.nan
    sampled = Asked(Settings(temperature=0.7, **more))
    assert choosing.choose(logits, [sampled, Asked(Settings())], END)[1] == logits[1].argmax()
