"""Recipes that come with the package, by name: `internvl2_2b_lora_coco`."""

import difflib
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "zoo" / "recipes"
"""The folder that a checkout shows as `recipes/`."""


@cache
def paths() -> dict[str, Path]:
    """Returns the package's recipes: name (of the file, without .yaml) -> path."""
    return {path.stem: path for path in sorted(FOLDER.rglob("*.yaml"))}


@cache
def scripts() -> dict[str, str]:
    """Returns scripts of the original, without .sh -> the recipe whose head names it."""
    names: dict[str, str] = {}
    for name, path in paths().items():
        script = re.search(
            r"^# original: (\S+)\.sh", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        # The first: of one script for two numbers of GPUs, that of its own number.
        if script is not None:
            names.setdefault(script[1], name)
    return names


def of_run(run: str | Path) -> str | None:
    """Returns the recipe whose run folder is `run`, as written there; None if it is none's."""
    path = Path(run)
    name = path.name if path.parent == Path("runs") else ""
    return name if name in paths() else None


def locate(recipe: str | Path) -> Path:
    """Returns the path itself if the file exists, else the package's recipe of this name.

    The name may be that of the original's script, with or without the folders that it lies in there
    and .sh. A path that begins with `recipes/` works outside of a checkout too.
    """
    path = Path(recipe)
    if path.suffix == ".sh" and not path.is_file():
        return paths().get(scripts().get(path.stem, ""), path)
    # A file in the working directory goes first: a name must never hide a user's own recipe.
    if path.is_file() or (len(path.parts) > 1 and path.parts[0] != "recipes"):
        return path
    if len(path.parts) > 1:
        shipped = FOLDER.joinpath(*path.parts[1:])
        return shipped if shipped.is_file() else path
    # Not `stem`: it would cut a name such as sft-v1.2 at its dot.
    name = path.name.removesuffix(".yaml")
    # Scripts last: their names are in heads, which take a while to read.
    return paths()[name] if name in paths() else paths().get(scripts().get(name, ""), path)


def nearest(recipe: str | Path) -> str | None:
    """Returns the name of the package's recipe closest to a path or name; None if none is close."""
    path = Path(recipe)
    # `runs/nope` is a path of the user's, and no misspelled name.
    if len(path.parts) > 1 and path.parts[0] != "recipes" and path.suffix not in (".yaml", ".sh"):
        return None
    name = path.name.removesuffix(".yaml")
    name = name.removesuffix(".sh")
    return next(iter(difflib.get_close_matches(name, [*paths(), *scripts()], n=1)), None)
