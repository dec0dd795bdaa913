"""What to do when memory is short: the fall-back ladder, once, as data.

Rungs that leave what is learned as it is come first, the cheapest of them above; a run that was
stopped may go on with any of those. The others are for a new run. None changes how many samples a
step holds. What a rung saves and costs is counted or estimated, not measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

from internvl.config import PairsConfig, Recipe

_SHORTEST_ROW = 256  # tokens; below, rows hold next to nothing


@dataclass(frozen=True)
class Rung:
    """One setting: what it frees and what it costs."""

    key: str
    saves: str
    costs: str
    value: Callable[[Recipe], str | None]
    """What to set for a recipe, or None where it has that or cannot use it."""
    keeps_results: bool = True
    """Up to rounding; a run that was stopped may then go on with it."""


def _checkpointing(recipe: Recipe) -> str | None:
    return {"none": "selective", "selective": "full"}.get(recipe.compute.checkpointing)


def _micro_batch(recipe: Recipe) -> str | None:
    if not isinstance(recipe.objective, PairsConfig):
        return None
    now = recipe.objective.micro_batch or recipe.batch_samples
    return None if now == 1 else str(now // 2)


def _kept_micro_batches(recipe: Recipe) -> str | None:
    if not isinstance(recipe.objective, PairsConfig):
        return None
    return "1" if recipe.objective.kept_micro_batches > 1 else None


def _row_tokens(recipe: Recipe) -> str | None:
    if not recipe.objective.rows_are_packed:
        return None
    row, sample = recipe.data.row_tokens or recipe.data.max_tokens, recipe.data.max_tokens
    return str(max(sample, row // 2)) if row > sample else None


def _offload(recipe: Recipe) -> str | None:
    return None if recipe.compute.offload else "true"


def _offload_moments(recipe: Recipe) -> str | None:
    plain = recipe.optim.name == "adamw" and not recipe.optim.offload
    return "true" if plain and recipe.model.parts else None


def _quantize(recipe: Recipe) -> str | None:
    if not recipe.objective.rows_are_packed:
        return None
    frozen = recipe.model.lora is not None and "language_model" not in recipe.model.parts
    frozen = frozen and not recipe.compute.float8
    return "4bit" if frozen and recipe.model.quantize != "4bit" else None


def _max_tokens(recipe: Recipe) -> str | None:
    half = recipe.data.max_tokens // 2
    return str(half) if recipe.objective.rows_are_packed and half >= _SHORTEST_ROW // 2 else None


LADDER = (
    Rung(
        "objective.kept_micro_batches",
        "the graphs of all features but those of one micro-batch",
        "a second forward pass for the features of these micro-batches",
        _kept_micro_batches,
    ),
    Rung(
        "compute.checkpointing",
        "what every second block (selective) or every block (full) of a trained part keeps for "
        "its backward pass, but for the block's input",
        "a second forward pass of these blocks: about a sixth of the time, or a third",
        _checkpointing,
    ),
    Rung(
        "objective.micro_batch",
        "half of all that grows with the pairs that are encoded at once",
        "a forward pass without gradient, but of a frozen tower, once a step is cut at all",
        _micro_batch,
    ),
    Rung(
        "data.row_tokens",
        "half of all that grows with a row, and more of the dense mask of a CPU",
        "smaller matrix products and fuller padding: a few percent",
        _row_tokens,
    ),
    Rung(
        "compute.offload",
        "what the backward pass waits for, which is kept in the CPU's memory instead",
        "two copies over the bus of 2 bytes a token and hidden unit for every block",
        _offload,
    ),
    Rung(
        "optim.offload",
        "8 of the 16 bytes that a trained weight takes, which are in the CPU's memory instead",
        "16 bytes a trained weight over the bus in every step",
        _offload_moments,
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
        "longer samples are cut, or bad where an image would be",
        _max_tokens,
        keeps_results=False,
    ),
)


def next_rung(recipe: Recipe) -> tuple[Rung, str] | None:
    """The first rung that this recipe has not taken, and the value to set."""
    for rung in LADDER:
        value = rung.value(recipe)
        if value is not None:
            return rung, value
    return None


def advice(recipe: Recipe) -> str:
    """What to set when a row did not fit into memory, as a sentence."""
    found = next_rung(recipe)
    if found is None:
        return "Take a smaller model or a larger GPU: every setting that saves memory is in use"
    rung, value = found
    if rung.keeps_results:
        return f"Set {rung.key}={value}; the same command then goes on from the last checkpoint"
    return f"Set {rung.key}={value} in a new run (it costs {rung.costs})"
