"""Beam search in the engine's slots: the beams of a request share one slot of the cache.

A slot holds the prompt once, and then one key a beam for every step. A mask says which keys a beam
descends from, so keys are never reordered or copied. All state is on the device and has one shape,
so that a step of the search is part of a captured graph. Texts equal those of `transformers`.

Shapes: B slots, K beams, V vocabulary, T most new tokens, L length of a slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from internvl.inference.settings import Settings


@dataclass(frozen=True)
class Search:
    """State of the searches of B requests; a search that is done goes on unread."""

    scores: Tensor
    """Sums of log-probabilities of the running beams, float32 (B, K), best first."""
    running: Tensor
    """Their tokens, int64 (B, K, T), padded with the end."""
    best: Tensor
    """Scores of the finished texts, float32 (B, K), best first; minus infinity for none."""
    finished: Tensor
    """Their tokens, int64 (B, K, T), padded with the end."""
    done: Tensor
    """bool (B,)."""
    count: Tensor
    """Tokens of every running beam, int64 (B,)."""
    most: Tensor
    """`max_new_tokens`, int64 (B,)."""
    least: Tensor
    """`min_new_tokens`, int64 (B,)."""
    divisors: Tensor
    """What a text of 1, 2, … tokens has its score divided by, float32 (B, T)."""

    @classmethod
    def empty(cls, slots: int, beams: int, longest: int, end_id: int) -> "Search":
        """Makes searches without a token, on the CPU."""
        tokens = torch.full((slots, beams, longest), end_id)
        whole = torch.zeros(slots, dtype=torch.long)
        return cls(
            scores=torch.zeros(slots, beams),
            running=tokens,
            best=torch.full((slots, beams), -torch.inf),
            finished=tokens.clone(),
            done=torch.zeros(slots, dtype=torch.bool),
            count=whole,
            most=whole.clone(),
            least=whole.clone(),
            divisors=torch.ones(slots, longest),
        )

    def tensors(self) -> list[Tensor]:
        """Returns the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: torch.device) -> "Search":
        """Returns a copy on a device."""
        return Search(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))


def extend(search: Search, logits: Tensor, end_id: int) -> tuple[Search, Tensor]:
    """Adds a token to every beam: (search, the beam that each new one descends from, (B, K)).

    Args:
        logits: (B, k, V) of the next token; k is K, or 1 for the first token of all beams.
    """
    beams, vocabulary = search.best.shape[1], logits.shape[-1]
    count = search.count + 1
    log_probabilities = logits.float().log_softmax(-1)
    is_short = (count <= search.least)[:, None]
    ending = log_probabilities[..., end_id].masked_fill(is_short, -torch.inf)
    log_probabilities[..., end_id] = ending
    # One beam at first: K equal ones would give every candidate K times.
    scores = search.scores[:, : logits.shape[1], None] + log_probabilities
    # 2 K candidates: at most K of them end, so K can go on.
    scores, flat_indices = scores.flatten(1).topk(2 * beams)
    parents, chosen = flat_indices // vocabulary, flat_indices % vocabulary
    # A search that is done stays within the tensors.
    column = search.count.clamp(max=search.running.shape[2] - 1)
    candidates = _gather_rows(parents, search.running).scatter(
        2, column[:, None, None].expand(-1, 2 * beams, 1), chosen[..., None]
    )

    is_last = count >= search.most
    ends = (chosen == end_id) | is_last[:, None]
    divisor = search.divisors.gather(1, column[:, None])
    # Only the best K may finish, as in transformers: a worse end waits for its own step.
    final_scores = (scores / divisor).masked_fill(~ends | search.done[:, None], -torch.inf)
    best, rows = torch.cat([search.best, final_scores[:, :beams]], dim=1).topk(beams)
    finished = _gather_rows(rows, torch.cat([search.finished, candidates[:, :beams]], dim=1))

    running, rows = scores.masked_fill(chosen == end_id, -torch.inf).topk(beams)
    # Done if the best running beam, ended now, could not beat the worst finished text.
    done = search.done | is_last | (best[:, -1] >= running[:, 0] / divisor[:, 0])
    extended = Search(
        scores=running,
        running=_gather_rows(rows, candidates),
        best=best,
        finished=finished,
        done=done,
        count=count,
        most=search.most,
        least=search.least,
        divisors=search.divisors,
    )
    return extended, parents.gather(1, rows)


class Beams:
    """The search of every slot, and the keys that each of its beams descends from."""

    def __init__(
        self, slots: int, length: int, beams: int, end_id: int, device: torch.device
    ) -> None:
        """
        Args:
            slots: of the cache, of `length` tokens each.
        """
        self.beams = beams
        self.length = length
        self.end_id = end_id
        self.search = Search.empty(slots, beams, longest(length, beams), end_id).to(device)
        self.prompt = torch.zeros(slots, dtype=torch.long, device=device)
        """Tokens of every slot's prompt, (B,)."""
        self.seen = torch.zeros(slots, beams, length, dtype=torch.bool, device=device)
        """Keys that a beam sees, its own next one included, (B, K, L)."""
        # A query that sees no key is NaN, which an empty slot would keep.
        self.seen[:, :, 0] = True
        self.keys = torch.arange(length, device=device)
        self.order = torch.arange(beams, device=device)

    @property
    def tokens(self) -> Tensor:
        """The last token of every beam, whose keys are not in the cache yet, int64 (B, K)."""
        column = (self.search.count - 1).clamp(0, self.search.running.shape[2] - 1)
        cells = column[:, None, None].expand(-1, self.beams, 1)
        return self.search.running.gather(2, cells).squeeze(2)

    @property
    def positions(self) -> Tensor:
        """Their position in the text, the same for all beams, int64 (B, K)."""
        position = self.prompt + self.search.count - 1
        return position.clamp(0, self.length - 1)[:, None].expand(-1, self.beams)

    @property
    def cells(self) -> Tensor:
        """Where in the slot their keys belong, int64 (B, K)."""
        return _cells(self.prompt, self.search.count, self.order, self.length)

    def begin(
        self, slots: Tensor, prompts: Sequence[int], settings: Sequence[Settings], logits: Tensor
    ) -> None:
        """Begins searches with their first tokens.

        Args:
            slots: int64 (N,), on the device. prompts: tokens of each. logits: (N, V) after each.
        """
        device, longest = logits.device, self.search.running.shape[2]
        # Built on the host and copied: their numbers are the requests' own.
        search = Search.empty(len(prompts), self.beams, longest, self.end_id)
        for row, chosen in enumerate(settings):
            search.most[row] = chosen.max_new_tokens
            search.least[row] = chosen.min_new_tokens
            # Powers of the host, in double precision, as transformers takes them.
            powers = [n**chosen.length_penalty for n in range(1, chosen.max_new_tokens + 1)]
            search.divisors[row, : len(powers)] = torch.tensor(powers)
        begun, _ = extend(search.to(device), logits[:, None], self.end_id)
        for whole, some in zip(self.search.tensors(), begun.tensors(), strict=True):
            whole.index_copy_(0, slots, some)
        prompt = torch.tensor(prompts).to(device, non_blocking=True)
        self.prompt.index_copy_(0, slots, prompt)
        cells = _cells(prompt, begun.count, self.order, self.length)
        seen = (self.keys < prompt[:, None])[:, None].expand(-1, self.beams, -1)
        self.seen.index_copy_(0, slots, seen.scatter(2, cells[..., None], True))

    def advance(self, logits: Tensor) -> None:
        """Adds a token to every beam from logits (B, K, V); all tensors keep their memory."""
        extended, parents = extend(self.search, logits, self.end_id)
        # Copied: a captured graph reads and writes the same addresses every time.
        for tensor, new in zip(self.search.tensors(), extended.tensors(), strict=True):
            if new is not tensor:
                tensor.copy_(new)
        seen = _gather_rows(parents, self.seen)
        self.seen.copy_(seen.scatter(2, self.cells[..., None], True))

    def outcome(self) -> Tensor:
        """Returns whether each search is done, and its best text: int64 (B, 1 + T)."""
        return torch.cat([self.search.done[:, None].long(), self.search.finished[:, 0]], dim=1)

    def saved(self) -> list[Tensor]:
        """Returns copies of all state, for `restore`."""
        return [tensor.clone() for tensor in (*self.search.tensors(), self.seen)]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Sets the state back."""
        for tensor, before in zip((*self.search.tensors(), self.seen), saved, strict=True):
            tensor.copy_(before)


def longest(length: int, beams: int) -> int:
    """Returns the most new tokens (T) that a request in a slot of `length` tokens can have."""
    return (length - 1) // beams + 1


def until_end(ids: list[int], end_id: int) -> list[int]:
    """Cuts a text after its first end."""
    return ids[: ids.index(end_id) + 1] if end_id in ids else ids


def _cells(prompt: Tensor, count: Tensor, order: Tensor, length: int) -> Tensor:
    # Slots without a request, or whose search is done, stay within theirs.
    first = (prompt + (count - 1) * len(order)).clamp(0, length - len(order))
    return first[:, None] + order


def _gather_rows(rows: Tensor, values: Tensor) -> Tensor:
    """Gathers values (B, K, n) at rows int64 (B, M): (B, M, n)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))
