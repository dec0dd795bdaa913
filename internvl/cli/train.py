"""`internvl train`: a run from its recipe, on all GPUs of this machine."""

import argparse
import shlex

from internvl.cli.common import (
    Arguments,
    add_rank_arguments,
    add_recipe_arguments,
    loading,
    run_as_ranks,
)
from internvl.config import Recipe
from internvl.config.recipes import load_recipe
from internvl.errors import Interrupted


def run(args: Arguments) -> int:
    """Train a recipe; if its run folder exists, resume where the run stopped."""
    recipe = open_recipe(args)
    from internvl.launch import local

    with loading(recipe.model.name):
        num_ranks = local.choose_ranks(args.gpus, args.processes, recipe.device)
        if num_ranks == 1:
            from internvl import dist, train
    if num_ranks > 1:
        return run_as_ranks(args, num_ranks)
    try:
        train.run(recipe)
    except Interrupted:
        if dist.is_main():
            print(_next_commands(recipe, "what it has learned so far"))
        raise
    if dist.is_main():
        print(_next_commands(recipe, "the trained model"))
    return 0


def open_recipe(args: Arguments) -> Recipe:
    """Reads the recipe to train, whose model and data files are here."""
    recipe = load_recipe(args.recipe, args.overrides)
    from internvl.data import sources
    from internvl.inference import opened
    from internvl.training import saved_steps

    # A run that goes on holds its weights: its base may be gone.
    if not opened.is_run(recipe.run) or not saved_steps.has_begun(recipe.run):
        opened.check_start(recipe, weights=True)
    sources.check_files(recipe.data)
    return recipe


def _next_commands(recipe: Recipe, model: str) -> str:
    """Returns the commands that use a run's model, which is described in words."""
    run = shlex.quote(str(recipe.run))
    exported = shlex.quote(f"{recipe.run}-exported")
    commands = [f"internvl evaluate {run}" if recipe.evals else None]
    if recipe.objective.family == "chat":
        commands += [
            None if recipe.evals else f"internvl evaluate {run} --annotations FILE",
            f"internvl chat {run} --image FILE",
        ]
    else:
        commands += [f"internvl evaluate {run} retrieval-folder --annotations FILE"]
    commands += [f"internvl export {run} --to {exported}"]
    return "\n  ".join([f"To use {model}:", *filter(None, commands)])


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_recipe_arguments(sub)
    add_rank_arguments(sub)
