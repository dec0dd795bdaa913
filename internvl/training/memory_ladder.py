"""Settings that save memory, in the order in which to try them: data for plans and error messages.

Rungs that keep the results come first, the cheapest at the top; a stopped run may resume with any
of them. The others are for a new run. No rung changes the number of samples in a step. Savings and
costs are counted or estimated, not measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

from internvl.config import PairsConfig, Recipe

# Enough for short texts; an image needs 256 tokens per tile.
_LEAST_TOKENS = 128
"""Smallest `data.max_tokens` that is suggested."""


@dataclass(frozen=True)
class Rung:
    """A setting that saves memory, with its saving and its cost."""

    key: str
    saves: str
    costs: str
    value: Callable[[Recipe], str | None]
    """Returns the value to set in a recipe, or None if it is in use or not applicable."""
    keeps_results: bool = True
    """True if results stay the same up to rounding, so that a stopped run may resume with it."""


def _checkpointing(recipe: Recipe) -> str | None:
    return {"none": "selective", "selective": "full"}.get(recipe.compute.checkpointing)


def _micro_batch(recipe: Recipe) -> str | None:
    if not isinstance(recipe.objective, PairsConfig):
        return None
    pairs = recipe.objective.micro_batch or recipe.batch_samples
    return None if pairs == 1 else str(pairs // 2)


def _kept_micro_batches(recipe: Recipe) -> str | None:
    if not isinstance(recipe.objective, PairsConfig):
        return None
    return "1" if recipe.objective.kept_micro_batches > 1 else None


def _row_tokens(recipe: Recipe) -> str | None:
    if not recipe.objective.rows_are_packed:
        return None
    row, sample = recipe.data.row_tokens or recipe.data.max_tokens, recipe.data.max_tokens
    # Not below a sample's limit: samples would be cut, which changes the results.
    return str(max(sample, row // 2)) if row > sample else None


def _offload(recipe: Recipe) -> str | None:
    return None if recipe.compute.offload else "true"


def _offload_moments(recipe: Recipe) -> str | None:
    # Other optimizers keep 8-bit moments or one moment; their states are not offloaded.
    plain = recipe.optim.name == "adamw" and not recipe.optim.offload
    # Shards have an offload of their own.
    plain = plain and recipe.parallel.shard == "none"
    return "true" if plain and recipe.model.parts else None


def _offload_shards(recipe: Recipe) -> str | None:
    parallel = recipe.parallel
    return "cpu" if parallel.shard != "none" and parallel.offload == "none" else None


def _quantize(recipe: Recipe) -> str | None:
    if not recipe.objective.rows_are_packed:
        return None
    # Weights in 4 bits have no gradients: only adapters can train on them.
    frozen = recipe.model.lora is not None and "language_model" not in recipe.model.parts
    frozen = frozen and not recipe.compute.float8 and recipe.parallel.shard == "none"
    return "4bit" if frozen and recipe.model.quantize != "4bit" else None


def _max_tokens(recipe: Recipe) -> str | None:
    half = recipe.data.max_tokens // 2
    return str(half) if recipe.objective.rows_are_packed and half >= _LEAST_TOKENS else None


# In order: a rung is suggested when those above it are in use or not applicable.
LADDER = (
    Rung(
        "objective.kept_micro_batches",
        "the graphs of all features but those of one micro-batch",
        "a second forward pass for the features of these micro-batches",
        _kept_micro_batches,
    ),
    Rung(
        "compute.checkpointing",
        "the activations of every second block (selective) or every block (full) of a trained "
        "part, except the block's input",
        # A forward pass is a third of forward and backward.
        "a second forward pass of these blocks: about a sixth of the time, or a third",
        _checkpointing,
    ),
    Rung(
        "objective.micro_batch",
        "half of all that grows with the pairs that are encoded at once",
        "one more forward pass without gradients (not of a frozen tower), if the step is cut",
        _micro_batch,
    ),
    Rung(
        "data.row_tokens",
        "half of all that grows with a row, and more of the dense mask of a CPU",
        "smaller matrix products and fuller padding: a few percent",
        _row_tokens,
    ),
    Rung(
        # After recomputation: the inputs of the blocks are then all that is left to move.
        "compute.offload",
        "the activations saved for the backward pass, which move to the CPU's memory",
        "two copies over the bus for every block: 2 bytes per token and hidden unit",
        _offload,
    ),
    Rung(
        "optim.offload",
        "8 of the 16 bytes of a trained weight: both AdamW moments move to the CPU's memory",
        "16 bytes per trained weight over the bus in every step",
        _offload_moments,
    ),
    Rung(
        "parallel.offload",
        "a GPU's shards of weights, gradients and moments, which move to the CPU's memory",
        "copies of them over the bus in every row, and the update on the CPU",
        _offload_shards,
    ),
    Rung(
        "model.quantize",
        "about 1.5 of the 2 bytes of a frozen weight of the language model and the tower",
        "the frozen weights rounded to 4 bits, and a third of the speed",
        _quantize,
        keeps_results=False,
    ),
    Rung(
        "data.max_tokens",
        "half of all that grows with a row",
        "longer samples are cut, or refused if the cut would fall into an image",
        _max_tokens,
        keeps_results=False,
    ),
)


def next_rung(recipe: Recipe) -> tuple[Rung, str] | None:
    """Returns the first rung that helps this recipe and the value to set; None if none is left."""
    for rung in LADDER:
        value = rung.value(recipe)
        if value is not None:
            return rung, value
    return None


def advice(recipe: Recipe) -> str:
    """Returns a sentence that says what to set after running out of memory."""
    rung_and_value = next_rung(recipe)
    if rung_and_value is None:
        return "Take a smaller model or a larger GPU: every setting that saves memory is in use"
    rung, value = rung_and_value
    if rung.keeps_results:
        return f"Set {rung.key}={value}; the same command then goes on from the last checkpoint"
    return f"Set {rung.key}={value} in a new run (it costs {rung.costs})"
