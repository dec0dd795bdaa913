"""What a step of a recipe loads a GPU with, counted by `check` or assumed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from internvl.compute import backends
from internvl.config import ComputeConfig, Recipe
from internvl.errors import counted
from internvl.models.attention import packed
from internvl.models.chat import model as chat_model
from internvl.plan.work import FirstStep, Sequences, Work, padded
from internvl.zoo.gpus import CALIBRATION

RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}
"""Share of the blocks that run forward twice, by `compute.checkpointing`. Compiled ones leave out
their last product then, a quarter, which is counted all the same."""
_TEXT_TOKENS, _SUPERVISED = 64, 16  # of an assumed sample of a conversation
_CAPTION, _PADDED_CAPTION = 24, 40  # tokens of an assumed caption, and of the longest beside it


@dataclass(frozen=True)
class Load:
    """A step of the run."""

    work: Work
    """Of a whole step, over all GPUs; padding left out."""
    computed: Work
    """The same as kernels compute it: padding, and pairs of tokens that a mask hides."""
    largest: Work
    """The micro-batch with the highest peak memory, padded."""
    micro_batches: float
    """Of a step, over all GPUs; rows of a chat model."""
    samples: int | None
    """In an epoch; None if the data are not known."""
    source: str
    """Where these numbers are from, for the reader."""

    def per_gpu(self, num_gpus: int) -> int:
        """Returns the micro-batches of the GPU that has most."""
        return max(1, math.ceil(self.micro_batches / num_gpus - 1e-6))

    @property
    def largest_text(self) -> str:
        """The largest micro-batch in words."""
        batch = self.largest
        if batch.rows.count:
            return f"row: {batch.rows.length:,} tokens, {batch.tiles:.0f} tiles"
        longest = max(batch.texts.length, batch.matches.length, batch.written.length)
        return f"micro-batch: {batch.samples:,.0f} pairs, captions of {longest} tokens"


def load_of(recipe: Recipe, model: Any, step: FirstStep | None, num_gpus: int = 1) -> Load:
    """The load of a step of `recipe`.

    Args:
        model: on the meta device.
        step: what `check` counted; None goes by assumptions.
    """
    make = _rows if recipe.objective.rows_are_packed else _pairs
    return make(recipe, model, step, num_gpus)


def attention_of(recipe: Recipe) -> str:
    """The attention a GPU computes with: flex, dense or eager."""
    attention = recipe.compute.attention
    if not recipe.objective.rows_are_packed:  # QLLaMA has a mask of its own, for any backend
        return "eager" if attention == "eager" else "dense"
    return "flex" if attention in ("auto", "flash") else attention


def runs_flash(compute: ComputeConfig) -> bool:
    """Whether rows are computed by FlashAttention 4: by `auto`, if this machine has it."""
    if compute.attention == "auto" and torch.cuda.is_available():
        return packed.has_flash(torch.device("cuda"))
    return compute.attention == "flash"


def is_compiled(compute: ComputeConfig) -> bool:
    """Whether a GPU runs compiled blocks."""
    # Not backends.is_compiled, which asks whether this machine's device is one.
    return compute.compile is None or compute.compile


def _rows(recipe: Recipe, model: Any, step: FirstStep | None, num_gpus: int) -> Load:
    data = recipe.data
    lengths = backends.row_lengths(recipe.compute, torch.device("cuda"), data)
    limit = lengths[-1] if lengths else data.row_tokens or data.max_tokens
    if step is None:
        work, samples = _assumed_rows(recipe, model, limit), None
        tokens = work.rows.tokens / CALIBRATION.fill
        rows = tokens / limit
        source = (
            f"assumed, for the data were not read: {counted(_tiles(recipe), 'tile')}, "
            f"{_TEXT_TOKENS} tokens of text and {_SUPERVISED} supervised ones a sample, "
            "nothing shared"
        )
    else:
        work, samples, rows = step.work, step.samples_per_epoch, len(step.micro_batches)
        counts = [row.rows.tokens for row in step.micro_batches]
        # Compiled blocks exist for a few lengths only: a row takes the next one.
        tokens = sum(next((n for n in lengths if n >= count), count) for count in counts)
        full = f"{work.rows.tokens / tokens:.1%} full"
        source = f"counted in the first step: {counted(len(step.micro_batches), 'row')}, {full}"
    longest = limit
    if rows <= num_gpus:  # every GPU has one row or none, which need not be full
        # Evened out, each has as many tokens as any other.
        share = tokens / num_gpus
        longest = next((n for n in lengths if n >= share), math.ceil(share))
        if num_gpus > 1:
            rows, tokens = num_gpus, longest * num_gpus
    share = longest / work.rows.tokens
    largest = Work(
        tiles=min(data.max_tiles, math.ceil(work.tiles * share)),
        supervised=math.ceil(work.supervised * share),
        rows=padded(1, min(limit, longest)),
    )
    attended = work.rows.attended_pairs
    if attention_of(recipe) != "flex":  # the others compute what the mask hides as well
        attended = (tokens / max(1.0, rows)) ** 2 * rows
    computed = replace(work, rows=Sequences(rows, tokens, attended))
    return Load(work, computed, largest, rows, samples, source)


def _assumed_rows(recipe: Recipe, model: Any, limit: int) -> Work:
    """A step of samples that are alike."""
    data, tiles = recipe.data, _tiles(recipe)
    per_tile = chat_model.tokens_per_tile(model.config, data.tiling.size)
    tokens = min(data.max_tokens, tiles * per_tile + _TEXT_TOKENS)
    batch = float(recipe.global_batch or 0)
    if recipe.global_batch_rows is not None:  # as full as other runs' rows are
        batch = recipe.global_batch_rows * limit * CALIBRATION.fill / tokens
    row = Sequences(1, tokens, tokens * (tokens + 1) / 2)
    return Work(1, tiles, _SUPERVISED, row) * batch


def _tiles(recipe: Recipe) -> int:
    tiling = recipe.data.tiling
    return tiling.max + (tiling.thumbnail and tiling.max > 1)


def _pairs(recipe: Recipe, model: Any, step: FirstStep | None, num_gpus: int) -> Load:
    batch = recipe.batch_samples
    share = math.ceil(batch / num_gpus)
    size = min(share, recipe.pairs.micro_batch or share)
    micro_batches = num_gpus * math.ceil(share / size)
    if step is None:
        work = _as_computed(_assumed_pair(recipe, _CAPTION), model) * float(batch)
        pair, samples = _assumed_pair(recipe, _PADDED_CAPTION), None
        source = (
            f"assumed, for the data were not read: captions of {_CAPTION} tokens, "
            f"{_PADDED_CAPTION} padded"
        )
    else:
        work, samples = step.work, step.samples_per_epoch
        pair = _longest_pair(step)
        source = "counted in the first step, captions padded to its longest"
    pair = _as_computed(pair, model)
    return Load(work, pair * work.samples, pair * size, micro_batches, samples, source)


def _assumed_pair(recipe: Recipe, tokens: int) -> Work:
    terms = recipe.objective.term_weights
    matches = 2 if recipe.objective.name == "retrieval" else 1  # its caption, and another
    return Work(
        samples=1,
        tiles=1,
        supervised=_CAPTION * ("itg" in terms),
        texts=padded("itc" in terms, tokens),
        queried="itc" in terms,
        matches=padded(matches * ("itm" in terms), tokens),
        written=padded("itg" in terms, tokens),
    )


def _longest_pair(step: FirstStep) -> Work:
    """A pair of the step on average, each caption as long as the longest micro-batch's."""

    def longest(name: str, count: float) -> Sequences:
        forms = [getattr(batch, name).length for batch in step.micro_batches]
        return padded(count, max(forms))

    work = step.work
    return Work(
        samples=1,
        tiles=1,
        supervised=work.supervised / work.samples,
        texts=longest("texts", bool(work.texts.count)),
        queried=bool(work.queried),
        matches=longest("matches", round(work.matches.count / work.samples)),
        written=longest("written", bool(work.written.count)),
    )


def _as_computed(pair: Work, model: Any) -> Work:
    """With the products of queries and written tokens, which their mask hides from the queries."""
    written = pair.written
    hidden = Sequences(attended_pairs=written.tokens * model.num_queries)
    return replace(pair, written=written + hidden)


def forms(work: Work) -> Iterator[tuple[str, Sequences]]:
    """(name, sequences) of what QLLaMA reads."""
    for name in ("texts", "matches", "written"):
        sequences: Sequences = getattr(work, name)
        if sequences.count:
            yield name, sequences
