"""`internvl check`: data, plan, parity, rehearsal."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl import log
from internvl.cli.common import Arguments, add_recipe_arguments, loading
from internvl.config import Recipe
from internvl.config.recipes import load_recipe, text_of
from internvl.errors import ConfigError, UnknownGpu
from internvl.files import write_text


def run(args: Arguments) -> int:
    """Check a recipe, every sample and every image; with --plan, predict memory and time.

    With --parity, check that a model is asked as it was trained, here and elsewhere.
    """
    if args.parity:
        return _parity(args)
    recipe = load_recipe(args.recipe, args.overrides)
    if args.copy is not None:
        return _copy(args)
    if args.rehearse:
        return _rehearse(recipe, args)
    if args.plan:
        return _plan(recipe, args)
    from internvl.inference import opened

    # Before the import below: a folder that is not there is answered at once.
    opened.check_start(recipe, weights=False)
    with loading(recipe.model.name):
        from internvl import check

    checked = check.run(recipe, report=args.report)
    print(checked.render())
    return int(bool(checked.problems))


def _copy(args: Arguments) -> int:
    """Writes the recipe's file under another name, with its comments, to be edited."""
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: --copy takes the file as it is; edit the copy")
    if args.copy.exists():
        raise ConfigError(f"{args.copy}: exists; choose another name for the copy")
    text = text_of(args.recipe)
    write_text(args.copy, text)
    print(f"{args.copy} written; edit it, then: internvl check {args.copy}")
    return 0


def _parity(args: Arguments) -> int:
    """Prints how training, inference and an export render the same samples; 1 if they differ."""
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: --parity takes a model, which has no keys to set")
    with loading(args.recipe):
        from internvl.check import parity

    compared = parity.run(str(args.recipe), annotations=args.annotations, images=args.images)
    print(compared.render())
    return int(compared.num_different > 0)


def _plan(recipe: Recipe, args: Arguments) -> int:
    """Prints the check and the plan; only the plan if the model's files are not on this machine."""
    gpu = _gpu_to_plan_for(args.gpu)
    if args.gpus < 1:
        raise ConfigError(f"--gpus: at least 1, not {args.gpus}")
    with loading(recipe.model.name):
        from internvl import plan

        # Its model may be a released one that was never downloaded.
        is_here = plan.is_here(recipe)
        if is_here:
            from internvl import check

    checked = None
    if is_here:
        checked = check.run(recipe, report=args.report)
        print(checked.render() + "\n")
    else:
        # The tokenizer is among them, so no sample can be encoded.
        message = "the files of %s are not on this machine, so the data is not checked"
        log.get_logger().warning(message, recipe.model.name)
    planned = plan.make(recipe, gpu, None if checked is None else checked.step, args.gpus)
    if checked is not None:
        planned = replace(planned, inherited="")  # printed by the check already
    print(planned.render())
    # A script that submits the job reads the code alone.
    return int(not planned.fits or (checked is not None and bool(checked.problems)))


def _rehearse(recipe: Recipe, args: Arguments) -> int:
    """Prints what one rank of `--gpus` takes here, beside the plan."""
    if args.gpus < 1:
        raise ConfigError(f"--gpus: at least 1, not {args.gpus}")
    from internvl.data import sources
    from internvl.inference import opened

    opened.check_start(recipe, weights=False)
    sources.check_files(recipe.data)
    with loading(recipe.model.name):
        import torch

        from internvl.check import rehearse

    # Without a GPU of the table there is nothing to plan for, and memory is measured all the same.
    is_meant = args.gpu != "auto" or torch.cuda.is_available()
    rehearsed = rehearse.run(recipe, args.gpus, _gpu_to_plan_for(args.gpu) if is_meant else None)
    print(rehearsed.render())
    return int(not rehearsed.fits)


def _gpu_to_plan_for(name: str) -> Any:
    """Returns the GPU of this name, or for "auto" this machine's.

    Raises:
        ConfigError: no such GPU, or this machine has none that the table lists.
    """
    from internvl.zoo import gpus

    try:
        if name != "auto":
            return gpus.find(name)
    except UnknownGpu as error:
        raise ConfigError(f"--gpu: {error}") from None
    # Only now: a plan for a named GPU needs no CUDA.
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = gpus.recognize(properties.name, properties.total_memory / 2**30)
    if gpu is None:
        names = ", ".join(gpus.GPUS)
        raise ConfigError(f"--gpu: this machine has no GPU of a known kind; name one of {names}")
    return gpu


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    add_recipe_arguments(sub)
    sub.add_argument("--report", type=Path, help="also write an HTML report to this file")
    sub.add_argument(
        "--copy",
        type=Path,
        metavar="FILE",
        help="write the recipe, which may be one of the package, to this file, to be edited",
    )
    sub.add_argument("--plan", action="store_true", help="predict memory use and training time")
    sub.add_argument(
        "--parity",
        action="store_true",
        help="compare how training, inference and an export render samples for a MODEL, which is "
        "named in place of the recipe",
    )
    sub.add_argument(
        "--annotations",
        type=Path,
        help="chat JSONL to compare with --parity, instead of drawn ones",
    )
    sub.add_argument(
        "--images", type=Path, default=Path(), help="folder of its images (default: here)"
    )
    sub.add_argument(
        "--gpu",
        default="auto",
        help="GPU to plan for: H200, A100-40, 4090 … (default: this machine's)",
    )
    sub.add_argument("--gpus", type=int, default=1, help="number of GPUs to plan for")
    sub.add_argument(
        "--rehearse",
        action="store_true",
        help="run a few steps as one of --gpus GPUs on the one that is here: memory and time",
    )
