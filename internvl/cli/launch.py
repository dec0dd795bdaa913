"""`internvl launch`: jobs for Slurm."""

import argparse
import shlex
from pathlib import Path

from internvl.cli.common import Arguments, open_named
from internvl.cli.train import open_recipe
from internvl.errors import ConfigError
from internvl.launch import options as launch_options


def run(args: Arguments) -> int:
    """Write a Slurm job that trains or evaluates on several nodes, and submit it if asked."""
    from internvl.launch import slurm

    inner: Arguments = args.command
    run = None
    num_ranks = args.nodes * launch_options.per_node(args)
    if inner.verb == "train":
        run, device = _check_training(inner, num_ranks)
    else:
        _check_evaluation(inner)
        device = inner.device
    launch_options.check_device(args, device)
    job, file = launch_options.job_of(args, Path(inner.recipe if run else inner.model).stem, run)
    if args.dry_run:
        print(slurm.render(job), end="")
        return 0
    slurm.write(job, file)
    if args.submit:
        log_file = str(job.log).replace("%j", slurm.submit(file))
        print(f"Submitted {file}; its output will be in {log_file}.")
    else:
        print(f"Written: {file}. To submit it:\n  sbatch {shlex.quote(str(file))}")
    return 0


def _check_training(args: Arguments, num_ranks: int) -> tuple[Path, str | None]:
    """Refuses what the run would refuse when it starts; returns its folder and device."""
    recipe = open_recipe(args)
    # Of one machine; how many a node starts is the job's to say.
    if args.gpus is not None or args.processes is not None:
        raise ConfigError("--gpus, --processes: give --gpus-per-node instead")
    problem = recipe.parallel.unfit(num_ranks)
    if problem is not None:
        raise ConfigError(problem)
    # A new folder holds nothing to compare with, which would cost the seconds of torch's import.
    if recipe.run.is_dir():
        from internvl.training import run_folder

        run_folder.changed_length(recipe)
    return recipe.run, recipe.device


def _check_evaluation(args: Arguments) -> None:
    """Refuses models and options that `evaluate` would refuse."""
    if args.model is None or args.answers is not None:
        raise ConfigError("launch evaluate: name a model or run; answers are scored without GPUs")
    from internvl.models import hub

    if not hub.is_hub_id(args.model):
        for step in args.step or [None]:
            open_named(args, step)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    launch_options.add_arguments(sub)
