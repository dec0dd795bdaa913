"""What a training step holds: one description for rows of conversations and for pairs.

A chat model reads `rows`. QLLaMA reads queries with a caption, in up to three forms: `texts` (the
features), `matches` (beside the image) and `written` (captioning). What a family does not have is
zero.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch

from internvl.data.records import PackedBatch, PairBatch
from internvl.models.attention.packed import last_queries


class Summable:
    """A dataclass of numbers that is added and scaled field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, factor: float) -> Self:
        return type(self)(*(value * factor for value in self._values()))

    def _values(self) -> list[Any]:
        return [getattr(self, name.name) for name in fields(self)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sequences(Summable):
    """Sequences of one form; totals over all of them."""

    count: float = 0.0
    tokens: float = 0.0
    attended_pairs: float = 0.0
    """Queries and keys that see each other; the queries of QLLaMA come on top."""

    @property
    def length(self) -> int:
        """Tokens of each, if all are padded to the same length."""
        return round(self.tokens / self.count) if self.count else 0


def padded(count: float, length: int) -> Sequences:
    """Sequences of `length` tokens in which every token attends to every other."""
    return Sequences(count, count * length, count * length**2)


@dataclass(frozen=True)
class Work(Summable):
    """What a step, a micro-batch or a batch to encode holds."""

    samples: float = 0.0
    """Conversations, or pairs of an image and a caption."""
    tiles: float = 0.0
    supervised: float = 0.0
    """Tokens that the output matrix predicts."""
    rows: Sequences = field(default_factory=Sequences)
    texts: Sequences = field(default_factory=Sequences)
    queried: float = 0.0
    """Images that QLLaMA's queries read without a caption."""
    matches: Sequences = field(default_factory=Sequences)
    written: Sequences = field(default_factory=Sequences)


@dataclass(frozen=True)
class FirstStep:
    """Counts of the first step of a run."""

    micro_batches: tuple[Work, ...]
    """Rows without padding; captions padded to the longest of their micro-batch."""
    work: Work
    """Of the whole step, without padding."""
    samples_per_epoch: int


def first_step(batches: Sequence[Any], terms: Collection[str], samples_per_epoch: int) -> FirstStep:
    """Counts the batches of a step.

    Args:
        batches: of one objective, PackedBatch or PairBatch.
        terms: of the loss.
    """
    work = sum((work_of(batch, terms) for batch in batches), start=Work())
    return FirstStep(tuple(_as_padded(batch, terms) for batch in batches), work, samples_per_epoch)


def work_of(batch: PackedBatch | PairBatch, terms: Collection[str] = ()) -> Work:
    """Counts what a batch asks for; padding asks for nothing.

    Args:
        terms: of the loss of a PairBatch: itc, itm, itg.
    """
    return _rows(batch) if isinstance(batch, PackedBatch) else _pairs(batch, terms)


def _rows(batch: PackedBatch) -> Work:
    real = batch.document >= 0
    # A token attends to itself and those before it, so its keys' last queries count every pair
    # once: O(tokens), where the mask itself would be tokens² numbers.
    seen_by = last_queries(batch.document, batch.branch) - torch.arange(len(batch.document)) + 1
    row = Sequences(1, batch.num_tokens, int(seen_by[real].sum()))
    return Work(batch.num_samples, batch.num_tiles, len(batch.targets), row)


def _pairs(batch: PairBatch, terms: Collection[str]) -> Work:
    work = Work(samples=batch.num_samples, tiles=batch.num_samples)
    if "itc" in terms:
        lengths = batch.text_mask.sum(1)
        causal = int((lengths * (lengths + 1) // 2).sum())
        texts = Sequences(len(lengths), int(lengths.sum()), causal)
        work += Work(texts=texts, queried=batch.num_samples)
    if "itm" in terms:
        # Matching alone has no causal mask: every token of a caption attends to every other.
        lengths = batch.match_mask.sum(1)
        matches = Sequences(len(lengths), int(lengths.sum()), int((lengths**2).sum()))
        work += Work(matches=matches)
    if "itg" in terms:
        lengths = batch.written_mask.sum(1)
        causal = int((lengths * (lengths + 1) // 2).sum())
        written = Sequences(len(lengths), int(lengths.sum()), causal)
        work += Work(supervised=len(batch.targets), written=written)
    return work


def _as_padded(batch: PackedBatch | PairBatch, terms: Collection[str]) -> Work:
    """A micro-batch with the padding that it has already."""
    work = work_of(batch, terms)
    if isinstance(batch, PackedBatch):  # padded later, to one of the lengths that are compiled
        return work
    return Work(
        samples=work.samples,
        tiles=work.tiles,
        supervised=work.supervised,
        texts=padded(work.texts.count, batch.text_ids.shape[1]),
        queried=work.queried,
        matches=padded(work.matches.count, batch.match_ids.shape[1]),
        written=padded(work.written.count, batch.written_ids.shape[1]),
    )
