"""Steps and samples of a run, where it ended, and how a finished run is made longer.

A longer run continues the finished one: its weights, moments and guard, the next epochs of its
order, the random numbers of its next steps. Only the learning rate may differ from that of a run
that was as long from the start, because a schedule depends on the length of the whole run.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from internvl.config import OptimConfig, Recipe
from internvl.data.sampler import Ending, Order, SampleOrder, step_bounds
from internvl.data.sources import open_sources
from internvl.errors import RunError, counted
from internvl.files import read_run_json, write_json
from internvl.training import optim

KEYS = {"epochs", "steps"}
"""Keys of a recipe that a finished run may be continued with."""
_FINISHED = "finished.json"
_ENDINGS = "endings.json"
_RESTORE = "restore it, for it tells the samples of later steps, or choose another `run`"


def of_run(recipe: Recipe, order: Order, ended: Sequence[Ending] = ()) -> tuple[int, int]:
    """Returns (steps, samples) of a whole run; 0 samples if a step is counted in rows.

    Args:
        ended: earlier ends of the run, where batches begin anew.
    """
    size = order.epoch_size(recipe.epochs)
    # The position that a checkpoint of such a run holds goes on across an end.
    if recipe.global_batch_rows is not None:
        return recipe.num_steps(size), 0
    if not ended:
        return recipe.num_steps(size), recipe.num_samples(size)
    last = ended[-1]
    if recipe.steps is not None:
        return recipe.steps, last.samples + (recipe.steps - last.step) * recipe.batch_samples
    total = recipe.num_samples(size)
    whole, rest = divmod(total - last.samples, recipe.batch_samples)
    return last.step + whole + (rest > 0), total


def no_step(recipe: Recipe, size: float) -> str | None:
    """Returns why a run on `size` samples per epoch would train nothing; None if it trains."""
    if recipe.num_steps(size) > 0:
        return None
    total = round(size * (recipe.epochs or 0))
    if total == 0:
        return f"epochs = {recipe.epochs:g} of {size:g} samples are none; raise epochs"
    return (
        f"{counted(total, 'sample')} in all are less than a step of {recipe.batch_samples:,}, and "
        f"drop_last leaves such a rest out, so nothing would be trained; set global_batch={total} "
        "or less, or drop_last=false"
    )


def finished(folder: Path) -> bool:
    """True if the run in `folder` reached its end."""
    return (folder / _FINISHED).exists()


def finish(recipe: Recipe, step: int, total: int, why: str) -> None:
    """Marks a run as done at `step`.

    Args:
        total: samples of the whole run, of which an early end has seen fewer.
    """
    samples = None
    if recipe.global_batch is not None:
        bounds = step_bounds(step - 1, recipe.global_batch, total, endings(recipe.run))
        samples = bounds[1] if step else 0
    end = {"step": step, "samples": samples, "why": why}
    write_json(recipe.run / _FINISHED, end)


def endings(folder: Path) -> tuple[Ending, ...]:
    """Returns the earlier ends of a run that was made longer. Raises RunError if damaged."""
    path = folder / _ENDINGS
    if not path.exists():
        return ()
    try:
        saved = read_run_json(path, _RESTORE).get("endings")
        return TypeAdapter(tuple[Ending, ...]).validate_python(saved)
    except ValidationError:
        reason = "it is not what a run writes there"
        raise RunError(f"{path} is damaged ({reason}); {_RESTORE}") from None


def extend(before: Recipe, recipe: Recipe, change: str) -> None:
    """Turns a finished run into one that has steps left, as `recipe` says.

    Raises:
        RunError: it is not finished, or would not become longer.
        DataError: its data cannot be opened.
    """
    folder = recipe.run
    if not finished(folder):
        # Its steps so far would have had another learning rate.
        raise RunError(
            f"{folder} holds a run of another length that is not finished ({change}); let it end "
            f"first, by `internvl train {folder}`, then make it longer"
        )
    step, samples = _end(folder)
    if recipe.global_batch_rows is not None:
        samples = None
        is_longer = recipe.num_steps(0) > step
    else:
        files = open_sources(recipe.data)
        size = len(SampleOrder(files, share_prefix=recipe.shares_prefix, seed=recipe.seed))
        # Earlier versions wrote no samples.
        samples = before.num_samples(size) if samples is None else samples
        is_longer = recipe.num_samples(size) > samples
    if not is_longer:
        raise RunError(
            f"{folder} is finished after {counted(step, 'step')}, and the new length is not longer "
            f"({change}); ask for more, or choose another `run`"
        )
    # Rows need none: their checkpoint holds the position in the data. Written before the mark is
    # removed, so that a run that is killed in between is still finished, at its old length.
    if samples is not None:
        # By step: a run that was killed below, or stopped at once, has this one already.
        reached = {ending.step: ending for ending in [*endings(folder), Ending(step, samples)]}
        write_json(folder / _ENDINGS, {"endings": [*map(asdict, reached.values())]})
    (folder / _FINISHED).unlink()


def _end(folder: Path) -> tuple[int, int | None]:
    """Returns the (step, samples) at which a finished run ended. Raises RunError if damaged."""
    path, remedy = folder / _FINISHED, "remove it and start the same command again"
    end = read_run_json(path, remedy)
    step, samples = end.get("step"), end.get("samples")
    if not isinstance(step, int) or not isinstance(samples, int | None):
        raise RunError(f"{path} is damaged (step {step!r}, samples {samples!r}); {remedy}")
    return step, samples


def how_to_go_on(recipe: Recipe) -> str:
    """Returns the command that makes a finished run longer, and the other choice."""
    key, value = ("steps", recipe.steps) if recipe.epochs is None else ("epochs", recipe.epochs)
    longer = f"`internvl train {recipe.run} {key}={(value or 0) * 2:g}` goes on with it"
    return f"{longer}, another `run` trains anew"


def continuation(config: OptimConfig, ended: Sequence[Ending], num_steps: int) -> str:
    """Describes what a finished run does that was made longer, to `num_steps`."""
    lr_of = partial(optim.lr_at, config=config)
    before = ended[-1].step
    begun = f"the run goes on from step {before:,} to {num_steps:,}"
    if all(lr_of(step, before) == lr_of(step, num_steps) for step in range(before)):
        return f"{begun}; its learning rates so far were those of the longer run"
    return (
        f"{begun}. Its learning rates so far were those of a run of {counted(before, 'step')}; "
        f"from here on they are those of one of {num_steps:,}: {lr_of(before, num_steps):.3g} now, "
        f"after {lr_of(before - 1, before):.3g}"
    )
