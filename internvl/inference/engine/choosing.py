"""Chooses the next token of every request from its logits, as `transformers`' processors do."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from internvl.inference.settings import Settings


class Answering(Protocol):
    """What the choice of a token depends on."""

    @property
    def settings(self) -> Settings:
        """Settings of the request."""
        ...

    @property
    def prompt_ids(self) -> Tensor:
        """int64 (T,), on the CPU."""
        ...

    @property
    def generated(self) -> Sequence[int]:
        """Tokens so far."""
        ...

    @property
    def generator(self) -> torch.Generator | None:
        """Draws its samples, on the logits' device; None for torch's global one."""
        ...


def is_plain(request: Answering) -> bool:
    """True if the next token is the likeliest one, whatever came before."""
    settings = request.settings
    wants_more = len(request.generated) < settings.min_new_tokens
    return not (settings.samples or wants_more or settings.repetition_penalty != 1)


def choose(logits: Tensor, requests: Sequence[Answering], end_id: int) -> Tensor:
    """Returns the next token of each request, int64 (N,), on the logits' device.

    Sampling draws from each request's generator; requests without one draw in order.

    Args:
        logits: float32 (N, V); row n of request n.
        end_id: the token that ends an answer.
    """
    tokens = logits.argmax(-1)
    for row, request in enumerate(requests):
        if not is_plain(request):
            tokens[row] = _choose(logits[row].clone(), request, end_id)
    return tokens


def _choose(scores: Tensor, request: Answering, end_id: int) -> Tensor:
    """Returns the next token (); the order of the steps is that of `transformers`."""
    settings = request.settings
    if settings.repetition_penalty != 1:
        # The prompt counts, placeholders of images included, as in `transformers`.
        seen = torch.cat([request.prompt_ids, torch.tensor(request.generated, dtype=torch.long)])
        seen = seen.unique().to(scores.device)
        values, penalty = scores[seen], settings.repetition_penalty
        scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if len(request.generated) < settings.min_new_tokens:
        scores[end_id] = -torch.inf
    # The second for type checkers: None samples nothing.
    if not settings.samples or settings.temperature is None:
        return scores.argmax()
    scores = scores / settings.temperature
    if 0 < settings.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(settings.top_k).values[-1], -torch.inf)
    if settings.top_p < 1:
        ascending, order = scores.sort()
        is_tail = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        is_tail[-1] = False  # the likeliest token stays, however small top_p is
        scores = scores.masked_fill(
            torch.zeros_like(is_tail).scatter(0, order, is_tail), -torch.inf
        )
    if settings.min_p:
        probabilities = scores.softmax(-1)
        is_rare = probabilities < settings.min_p * probabilities.max()
        scores = scores.masked_fill(is_rare, -torch.inf)
    probabilities = scores.softmax(-1)
    # NaN of one request, such as a float16 overflow, must not end the engine for all: multinomial
    # raises, on a GPU with a device-side assert. On the device: asking here would wait for it.
    is_broken = probabilities.isnan().any()
    probabilities = torch.where(is_broken, torch.ones_like(probabilities), probabilities)
    token = torch.multinomial(probabilities, 1, generator=request.generator)[0]
    return torch.where(is_broken, scores.argmax(), token)


def likelihoods(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Returns the log-probability of a token, and the `count` likeliest tokens with theirs.

    They are the model's own, before penalties and temperature.

    Args:
        logits: float32 (V,).
    """
    values = logits.log_softmax(-1)
    likeliest = values.topk(count)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return values[token].item(), list(pairs)
