"""The run folder: its lock, and the recipe and data that it holds."""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from internvl import dist, log
from internvl.config import Recipe, recipes
from internvl.data import changes
from internvl.data.sampler import Earlier, GrownOrder, Order, Prefix, SampleOrder
from internvl.data.sources import Source
from internvl.errors import DataError, RunError, UserError
from internvl.launch import launchers
from internvl.models import bases
from internvl.training import length, saved_steps


@contextmanager
def owned(recipe: Recipe) -> Iterator[None]:
    """Locks the run folder for this run and checks that it holds exactly this recipe.

    Raises:
        RunError: on every rank alike: another run trains in it, or it holds something else.
    """
    with ExitStack() as held:
        problem = None
        # One rank holds the lock, and all raise: a rank that waits for a dead one would hang.
        if dist.is_main():
            try:
                held.enter_context(_locked(recipe))
            # Any: a run that is made longer reads its files and its data.
            except UserError as error:
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
    # A lock of the kernel's, which ends with the process, however that ends.
    with (folder / ".lock").open("a+", encoding="utf-8") as lock:
        # A reader process that outlives a killed run for seconds would hold the lock as well.
        os.register_at_fork(after_in_child=lock.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = f" ({lock.readline().strip()})".replace(" ()", "")
            raise RunError(
                f"another process is training in {folder}{holder}; wait for it or end it, or "
                "choose another `run`"
            ) from None
        lock.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.write(f"process {os.getpid()} on {launchers.host()}, since {now}\n")
        lock.flush()
        changed = changed_length(recipe)
        if not saved_steps.has_begun(folder):
            # Its base may have been made anew since; the record would call that another's weights.
            (folder / bases.FILE).unlink(missing_ok=True)
        elif changed:
            length.extend(recipes.load_recipe(saved), recipe, "; ".join(changed.values()))
        # Even if equal: a file of an older version has not the keys that are new since then.
        saved.write_text(text, encoding="utf-8")
        yield


def changed_length(recipe: Recipe) -> dict[str, str]:
    """Returns how a recipe changes the length of the run that its folder holds: key -> sentence.

    Raises:
        RunError: the folder holds a run of another recipe, or somebody's files.
    """
    folder, saved = recipe.run, recipe.run / "recipe.yaml"
    if not folder.exists():
        return {}
    # Without a recipe these are somebody's files; with one, what a run has written.
    names = {entry.name for entry in folder.iterdir() if not launchers.is_of_launch(entry.name)}
    if not saved.exists() and names - {".lock", "recipe.yaml"}:
        raise RunError(f"{folder} is not empty and no run; choose another `run`")
    # One that failed before its first step takes the recipe that its message asked for.
    if not saved.exists() or not saved_steps.has_begun(folder):
        return {}
    changed = recipes.changes(recipes.load_recipe(saved), recipe)
    others = [text for key, text in changed.items() if key not in length.KEYS]
    if others:
        raise RunError(
            f"{folder} holds a run of another recipe ({'; '.join(others)}); set it back to go on, "
            "or choose another `run`"
        )
    return changed


def order_of(recipe: Recipe, files: Sequence[Source], done: int) -> Order:
    """Returns the order of a run's samples, whose data must be those that it began with.

    Writes fingerprints of the data to the run folder.

    Args:
        done: samples that the run has been trained on.

    Raises:
        RunError: on every rank alike: the data differ, from the run's or between ranks, or are
            less than a step.
    """
    fingerprints = changes.take_fingerprints(recipe, files)
    earlier: tuple[Earlier, ...] = ()
    problem = None
    if dist.is_main():
        try:
            earlier = _earlier(recipe, files, done)
        except (RunError, DataError) as error:
            problem = str(error)
    earlier, problem, of_main = dist.from_main((earlier, problem, fingerprints))
    if problem is None and fingerprints != of_main:
        problem = f"rank {dist.rank()} reads other annotations than rank 0; give all the same files"
    # Gathered: a rank that alone raised would leave the others waiting.
    problem = next(filter(None, dist.gather_objects(problem)), None)
    if problem is not None:
        raise RunError(problem)
    share, seed = recipe.shares_prefix, recipe.seed
    order: Order = SampleOrder(files, share_prefix=share, seed=seed)
    if earlier:
        order = GrownOrder(files, earlier, share_prefix=share, seed=seed)
    # Before the data are written: a folder without them takes the recipe that the message asks for.
    problem = None if done else length.no_step(recipe, order.epoch_size(recipe.epochs))
    if problem is not None:
        raise RunError(problem)
    if dist.is_main():
        evals = changes.eval_digests(recipe.evals)
        changes.write(recipe.run, replace(fingerprints, evals=evals, earlier=earlier))
    return order


def _earlier(recipe: Recipe, files: Sequence[Source], done: int) -> tuple[Earlier, ...]:
    """Returns what the sources held in earlier epochs. Raises RunError if they may not differ."""
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
    meta = list(changes.meta_changes(before, changes.take_fingerprints(recipe, files)))
    if meta:
        raise RunError(
            f"{folder} holds a run of another meta file than {recipe.data.meta} now is "
            f"({'; '.join(meta)}); set it back to go on, or choose another `run`"
        )
    for path in changes.changed_evals(before, recipe.evals):
        logger.warning(
            "%s was changed since the run began; scores before and after are not comparable", path
        )
    changed = changes.source_changes(before, files)
    if not changed:
        return before.earlier
    summary = "; ".join(changed)
    if recipe.data.changed == "refuse":
        raise RunError(
            f"{folder} holds a run on other data ({summary}); put the file back to go on, choose "
            "another `run` to start anew, or set data.changed=accept to go on with what it holds"
        )
    # Lines that were appended keep the order of those before them; any other change does not.
    if not all(changed.values()):
        logger.warning(
            "%s: it goes on in a new order, and samples may come twice or not at all in this epoch",
            summary,
        )
        return ()
    had = tuple(before.sources[file.config.name].samples for file in files)
    prefixes = [Prefix(file, samples) for file, samples in zip(files, had, strict=True)]
    order = GrownOrder(
        prefixes, before.earlier, share_prefix=recipe.shares_prefix, seed=recipe.seed
    )
    until = order.end_of_epoch(done)
    logger.warning(
        "%s: this epoch goes on with the samples it began with, each once; "
        "the new ones come from sample %s of the run on, if it is that long",
        summary,
        f"{until + 1:,}",
    )
    # Grown again within the same epoch: its samples are already written down.
    if before.earlier and until <= before.earlier[-1].until:
        return before.earlier
    return (*before.earlier, Earlier(until, had))
