"""Beam search in which all beams of an image are branches of one row.

What the beams share (queries and prompt) is in the cache once, and every token they try is added
once: which of them a beam descends from is a mask, so that nothing in the cache is ever copied
from beam to beam. Scores are those of `transformers`' beam search.

Shapes: B images, K beams, V vocabulary, T new tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
"""(tokens int64 (B, K), seen bool (B, K, slots)) -> logits (B, K, V) of what follows.

Each call fills K more slots of the cache, one per beam; `seen` says which slots, those included, a
beam descends from.
"""


@dataclass(frozen=True)
class Search:
    """How a text is looked for."""

    num_beams: int
    """1: the likeliest token at every place."""
    max_new_tokens: int
    min_new_tokens: int
    end_id: int
    length_penalty: float = 1.0
    """A finished text's score is the sum of its log probabilities over its length, the end counted,
    to this power."""


def search(first: Tensor, step: Step, how: Search) -> Tensor:
    """The best text of each image: int64 (B, T), filled up with the end.

    Args:
        first: logits (B, V) of the first new token.
    """
    return _greedy(first, step, how) if how.num_beams == 1 else _beams(first, step, how)


def _greedy(first: Tensor, step: Step, how: Search) -> Tensor:
    logits, tokens = first, first.new_empty(len(first), 0, dtype=torch.long)
    done = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    seen = done.new_empty(len(first), 1, 0)
    for length in range(1, how.max_new_tokens + 1):
        chosen = _log_probabilities(logits, length, how).argmax(-1).masked_fill(done, how.end_id)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        done = done | (chosen == how.end_id)
        if length == how.max_new_tokens or done.all():
            break
        seen = torch.cat([seen, seen.new_ones(len(seen), 1, 1)], dim=2)
        logits = step(chosen[:, None], seen)[:, 0]
    return tokens


def _beams(first: Tensor, step: Step, how: Search) -> Tensor:
    images, beams = len(first), how.num_beams
    vocabulary, device = first.shape[-1], first.device
    own = torch.eye(beams, dtype=torch.bool, device=device).expand(images, -1, -1)
    seen = own[:, :, :0]
    running = first.new_zeros(images, 1, dtype=torch.float32)  # at first there is one beam
    tokens = torch.zeros(images, 1, 0, dtype=torch.long, device=device)
    best = first.new_full((images, beams), -torch.inf, dtype=torch.float32)
    texts = torch.full((images, beams, how.max_new_tokens), how.end_id, device=device)
    done = torch.zeros(images, dtype=torch.bool, device=device)
    logits = first[:, None]
    for length in range(1, how.max_new_tokens + 1):
        scores = running[..., None] + _log_probabilities(logits, length, how)
        # Twice as many as beams: should all the best end, as many go on.
        scores, places = scores.flatten(1).topk(2 * beams)
        parents, chosen = places // vocabulary, places % vocabulary
        tried = torch.cat([_of(parents, tokens), chosen[..., None]], dim=2)

        ends = (chosen == how.end_id) | (length == how.max_new_tokens)
        worth = scores / length**how.length_penalty
        worth = worth.masked_fill(~ends | done[:, None], -torch.inf)[:, :beams]
        filled = texts[:, :, length:].new_full(
            (images, beams, how.max_new_tokens - length), how.end_id
        )
        found = torch.cat([tried[:, :beams], filled], dim=2)
        best, kept = torch.cat([best, worth], dim=1).topk(beams)
        texts = _of(kept, torch.cat([texts, found], dim=1))

        running, kept = scores.masked_fill(chosen == how.end_id, -torch.inf).topk(beams)
        parents, tokens = parents.gather(1, kept), _of(kept, tried)
        done = done | (best[:, -1] >= running[:, 0] / length**how.length_penalty)
        if length == how.max_new_tokens or done.all():
            break
        seen = torch.cat([_of(parents, seen), own], dim=2)
        logits = step(tokens[:, :, -1], seen)
    return texts[:, 0]


def _log_probabilities(logits: Tensor, length: int, how: Search) -> Tensor:
    """float32, of what may stand at place `length`, counted from 1."""
    found = logits.float().log_softmax(-1)
    if length <= how.min_new_tokens:
        found[..., how.end_id] = -torch.inf
    return found


def _of(rows: Tensor, values: Tensor) -> Tensor:
    """values (B, K, n) at rows int64 (B, M) -> (B, M, n)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))
