"""Beam search that keeps all beams of an image in one row of the key-value cache.

The shared prefix (queries and prompt) is cached once, and so is every token of a beam. A mask says
which cached tokens a beam descends from, so the cache is never reordered or copied. Scores equal
`transformers`' beam search.

Shapes: B images, K beams, V vocabulary, T new tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
"""(tokens int64 (B, K), ancestors bool (B, K, slots)) -> logits (B, K, V) of the next token.

Each call appends K slots to the cache, one per beam; `ancestors` marks the slots that a beam
descends from, its new one included.
"""


@dataclass(frozen=True)
class BeamSearchConfig:
    """Beam-search settings."""

    num_beams: int
    """1: greedy decoding."""
    max_new_tokens: int
    min_new_tokens: int
    end_id: int
    length_penalty: float = 1.0
    """A finished text scores sum(log probabilities) / length ** length_penalty, end included."""
    ends: Callable[[bool], bool] = bool
    """Whether the search ends, from whether all its texts are finished; asked after each token.
    Ranks that share weights must all go on until the last of them is done."""


def search(first: Tensor, step: Step, config: BeamSearchConfig) -> Tensor:
    """Returns the best text of each image: int64 (B, T), padded with the end id.

    Args:
        first: logits (B, V) of the first new token.
    """
    return _greedy(first, step, config) if config.num_beams == 1 else _beams(first, step, config)


def _greedy(first: Tensor, step: Step, config: BeamSearchConfig) -> Tensor:
    logits, tokens = first, first.new_empty(len(first), 0, dtype=torch.long)
    done = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    ancestors = done.new_empty(len(first), 1, 0)
    for length in range(1, config.max_new_tokens + 1):
        chosen = _log_probabilities(logits, length, config).argmax(-1)
        # A finished row goes on in the batch, padded with the end.
        chosen = chosen.masked_fill(done, config.end_id)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        done = done | (chosen == config.end_id)
        if length == config.max_new_tokens or config.ends(bool(done.all())):
            break
        ancestors = torch.cat([ancestors, ancestors.new_ones(len(ancestors), 1, 1)], dim=2)
        logits = step(chosen[:, None], ancestors)[:, 0]
    return tokens


def _beams(first: Tensor, step: Step, config: BeamSearchConfig) -> Tensor:
    images, beams = len(first), config.num_beams
    vocabulary, device = first.shape[-1], first.device
    diagonal = torch.eye(beams, dtype=torch.bool, device=device).expand(images, -1, -1)
    ancestors = diagonal[:, :, :0]
    # One beam at first: K equal ones would give every candidate K times.
    running = first.new_zeros(images, 1, dtype=torch.float32)
    tokens = torch.zeros(images, 1, 0, dtype=torch.long, device=device)
    best = first.new_full((images, beams), -torch.inf, dtype=torch.float32)
    texts = torch.full((images, beams, config.max_new_tokens), config.end_id, device=device)
    done = torch.zeros(images, dtype=torch.bool, device=device)
    logits = first[:, None]
    for length in range(1, config.max_new_tokens + 1):
        scores = running[..., None] + _log_probabilities(logits, length, config)
        # 2 K candidates: at most K of them end, so K can go on.
        scores, flat_indices = scores.flatten(1).topk(2 * beams)
        parents, chosen = flat_indices // vocabulary, flat_indices % vocabulary
        candidates = torch.cat([_gather_rows(parents, tokens), chosen[..., None]], dim=2)

        ends = (chosen == config.end_id) | (length == config.max_new_tokens)
        # Only the best K may finish, as in transformers: a worse end waits for its own step.
        final_scores = scores / length**config.length_penalty
        final_scores = final_scores.masked_fill(~ends | done[:, None], -torch.inf)[:, :beams]
        padding = texts[:, :, length:].new_full(
            (images, beams, config.max_new_tokens - length), config.end_id
        )
        finished = torch.cat([candidates[:, :beams], padding], dim=2)
        best, rows = torch.cat([best, final_scores], dim=1).topk(beams)
        texts = _gather_rows(rows, torch.cat([texts, finished], dim=1))

        running, rows = scores.masked_fill(chosen == config.end_id, -torch.inf).topk(beams)
        parents, tokens = parents.gather(1, rows), _gather_rows(rows, candidates)
        # Done if the best running beam, ended now, could not beat the worst finished text.
        done = done | (best[:, -1] >= running[:, 0] / length**config.length_penalty)
        if length == config.max_new_tokens or config.ends(bool(done.all())):
            break
        ancestors = torch.cat([_gather_rows(parents, ancestors), diagonal], dim=2)
        logits = step(tokens[:, :, -1], ancestors)
    return texts[:, 0]


def _log_probabilities(logits: Tensor, length: int, config: BeamSearchConfig) -> Tensor:
    """Returns float32 log probabilities of the new token number `length`, from 1."""
    log_probabilities = logits.float().log_softmax(-1)
    if length <= config.min_new_tokens:
        log_probabilities[..., config.end_id] = -torch.inf
    return log_probabilities


def _gather_rows(rows: Tensor, values: Tensor) -> Tensor:
    """Gathers values (B, K, n) at rows int64 (B, M): (B, M, n)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))
