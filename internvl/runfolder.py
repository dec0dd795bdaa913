"""The run folder: whose it is, which recipe it holds, and whether its run is finished."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from internvl import dist, recipes
from internvl.config import Recipe
from internvl.guards import RunError


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
