"""The run folder: whose it is, which recipe and data it holds, and whether its run is finished."""

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from internvl import dist, log
from internvl.config import Recipe, recipes
from internvl.data import changes
from internvl.data.sampler import Earlier, GrownOrder, Order, Prefix, SampleOrder
from internvl.data.sources import Source
from internvl.errors import DataError, RunError


def finished(folder: Path) -> bool:
    """Whether the run in `folder` reached its end."""
    return (folder / "finished.json").exists()


def finish(folder: Path, step: int, why: str) -> None:
    """Marks the run in `folder` as done at `step`."""
    text = json.dumps({"step": step, "why": why})
    (folder / "finished.json").write_text(text, encoding="utf-8")


@contextmanager
def owned(recipe: Recipe) -> Iterator[None]:
    """The run folder, locked for this run and holding exactly this recipe.

    Raises:
        RunError: on every rank alike: another run trains in it, or it holds something else.
    """
    with ExitStack() as held:
        problem = None
        if dist.is_main():
            try:
                held.enter_context(_locked(recipe))
            except RunError as error:
                problem = str(error)
        problem = dist.from_main(problem)
        if problem is not None:
            raise RunError(problem)
        yield


@contextmanager
def _locked(recipe: Recipe) -> Iterator[None]:
    folder, text = recipe.run, recipes.to_yaml(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "recipe.yaml"
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is training in {folder}; wait for it or choose another `run`"
            ) from None
        others = [e.name for e in folder.iterdir() if e.name not in (".lock", "recipe.yaml")]
        if not saved.exists() and others:
            raise RunError(f"{folder} is not empty and no run; choose another `run`")
        if saved.exists() and others:
            changed = recipes.differences(recipes.load_recipe(saved), recipe)
            if changed:
                raise RunError(
                    f"{folder} holds a run of another recipe ({'; '.join(changed)}); "
                    "set it back to go on, or choose another `run`"
                )
        saved.write_text(text, encoding="utf-8")
        yield


def order_of(recipe: Recipe, files: Sequence[Source], done: int) -> Order:
    """The order of a run's samples, whose data must be those it began with.

    Notes in the run folder what the data are.

    Args:
        done: samples that the run has been trained on.

    Raises:
        RunError: on every rank alike: the data are others, on this machine or on another rank's.
    """
    found = changes.note(recipe, files)
    earlier: tuple[Earlier, ...] = ()
    problem = None
    if dist.is_main():
        try:
            earlier = _earlier(recipe, files, done)
        except (RunError, DataError) as error:
            problem = str(error)
    earlier, problem, of_main = dist.from_main((earlier, problem, found))
    if problem is None and found != of_main:
        problem = f"rank {dist.rank()} reads other annotations than rank 0; give all the same files"
    problem = next(filter(None, dist.gather_objects(problem)), None)
    if problem is not None:
        raise RunError(problem)
    if dist.is_main():
        evals = changes.of_evals(recipe.evals)
        changes.write(recipe.run, replace(found, evals=evals, earlier=earlier))
    share, seed = recipe.shares_prefix, recipe.seed
    if earlier:
        return GrownOrder(files, earlier, share_prefix=share, seed=seed)
    return SampleOrder(files, share_prefix=share, seed=seed)


def _earlier(recipe: Recipe, files: Sequence[Source], done: int) -> tuple[Earlier, ...]:
    """How much the sources held in earlier epochs. Raises RunError where they may not differ."""
    if not done:  # nothing was trained yet, so any content is what the run begins with
        return ()
    folder, logger = recipe.run, log.get_logger()
    before = changes.read(folder)
    if before is None:
        logger.warning(
            "%s does not say what its annotations held when it began; it goes on, "
            "and whether they were changed is not known",
            folder,
        )
        return ()
    meta = list(changes.of_meta(before, changes.note(recipe, files)))
    if meta:
        raise RunError(
            f"{folder} holds a run of another meta file than {recipe.data.meta} now is "
            f"({'; '.join(meta)}); set it back to go on, or choose another `run`"
        )
    for path in changes.of_evals_changed(before, recipe.evals):
        logger.warning(
            "%s was changed since the run began; scores before and after are not comparable", path
        )
    changed = changes.of_sources(before, files)
    if not changed:
        return before.earlier
    what = "; ".join(changed)
    if recipe.data.changed == "refuse":
        raise RunError(
            f"{folder} holds a run on other data ({what}); put the file back to go on, choose "
            "another `run` to start anew, or set data.changed=accept to go on with what it holds"
        )
    if not all(changed.values()):
        logger.warning(
            "%s: it goes on in a new order, and samples may come twice or not at all in this epoch",
            what,
        )
        return ()
    had = tuple(before.sources[file.config.name].samples for file in files)
    parts = [Prefix(file, samples) for file, samples in zip(files, had, strict=True)]
    order = GrownOrder(parts, before.earlier, share_prefix=recipe.shares_prefix, seed=recipe.seed)
    until = order.end_of_epoch(done)
    logger.warning(
        "%s: this epoch goes on with the samples it began with, each once; "
        "the new ones come from sample %s of the run on, if it is that long",
        what,
        f"{until + 1:,}",
    )
    if before.earlier and until <= before.earlier[-1].until:
        return before.earlier
    return (*before.earlier, Earlier(until, had))
