"""Recipes that come with the package, by name: `internvl2_2b_lora_coco`."""

import difflib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "zoo" / "recipes"
"""The folder that a checkout shows as `recipes/`."""


@cache
def paths() -> dict[str, Path]:
    """Returns the package's recipes: name (of the file, without .yaml) -> path."""
    return {path.stem: path for path in sorted(FOLDER.rglob("*.yaml"))}


def locate(recipe: str | Path) -> Path:
    """Returns the path itself if the file exists, else the package's recipe of this name.

    A path that begins with `recipes/` works outside of a checkout too.
    """
    path = Path(recipe)
    # A file in the working directory goes first: a name must never hide a user's own recipe.
    if path.is_file() or (len(path.parts) > 1 and path.parts[0] != "recipes"):
        return path
    if len(path.parts) > 1:
        shipped = FOLDER.joinpath(*path.parts[1:])
        return shipped if shipped.is_file() else path
    # Not `stem`: it would cut a name such as sft-v1.2 at its dot.
    return paths().get(path.name.removesuffix(".yaml"), path)


def nearest(recipe: str | Path) -> str | None:
    """Returns the name of the package's recipe closest to a path or name; None if none is close."""
    path = Path(recipe)
    # `runs/nope` is a path of the user's, and no misspelled name.
    if len(path.parts) > 1 and path.parts[0] != "recipes" and path.suffix != ".yaml":
        return None
    name = path.name.removesuffix(".yaml")
    return next(iter(difflib.get_close_matches(name, paths(), n=1)), None)
