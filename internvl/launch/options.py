"""Options of `internvl launch`."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from internvl.errors import ConfigError
from internvl.launch import launchers
from internvl.launch.slurm import Job


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the options to a verb's parser."""
    sub.usage = (
        "internvl launch RECIPE [key=value …] --nodes N --gpus-per-node G [options]\n"
        "       internvl launch evaluate MODEL [TASK …] --nodes N --gpus-per-node G [options]"
    )
    sub.epilog = "Other words and options are those of `internvl train` or `internvl evaluate`."
    # Shortened options would be taken from those of `evaluate`.
    sub.allow_abbrev = False
    sub.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    sub.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="GPUs on a node, a process each"
    )
    sub.add_argument(
        "--processes-per-node", type=int, metavar="N", help="processes on a node without GPUs"
    )
    sub.add_argument("--partition", metavar="P", help="partition (default: Slurm's own)")
    sub.add_argument("--time", metavar="H:MM:SS", help="time limit (default: the partition's)")
    sub.add_argument(
        "--cpus-per-node", type=int, metavar="N", help="CPU cores (default: whole nodes)"
    )
    sub.add_argument("--name", help="name of the job (default: internvl- and the recipe's)")
    for tool in ("sbatch", "srun"):
        sub.add_argument(
            f"--{tool}-args",
            action="append",
            default=[],
            metavar="OPTIONS",
            help=f"more options of {tool}, such as --{tool}-args=--account=mine",
        )
    sub.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="line of shell before the start, such as 'module load cuda'; repeat it for more",
    )
    sub.add_argument(
        "--file", type=Path, help=f"file to write (default: RUN/{launchers.BATCH_FILE})"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the file, write nothing")
    sub.add_argument("--submit", action="store_true", help="submit it with sbatch")


def per_node(args: argparse.Namespace) -> int:
    """Returns the ranks on a node. Raises ConfigError: none, both or no positive numbers given."""
    options = {
        "--gpus-per-node": args.gpus_per_node,
        "--processes-per-node": args.processes_per_node,
    }
    counts = {name: count for name, count in options.items() if count is not None}
    if len(counts) != 1:
        raise ConfigError("--gpus-per-node N, or --processes-per-node N without GPUs: give one")
    for name, count in (("--nodes", args.nodes), *counts.items()):
        if count < 1:
            raise ConfigError(f"{name}: at least 1, not {count}")
    return int(*counts.values())


def check_device(args: argparse.Namespace, device: str | None) -> None:
    """Raises ConfigError for ranks on GPUs of a command for a CPU, and the other way round."""
    if args.gpus_per_node is not None and device == "cpu":
        raise ConfigError(
            "--gpus-per-node: the device is cpu; use --processes-per-node N, or device=auto"
        )
    if args.processes_per_node is not None and device not in ("cpu", "auto", None):
        raise ConfigError(
            f"--processes-per-node: ranks on the CPU, and the device is {device}; set it to cpu, "
            "or use --gpus-per-node N"
        )


def job_of(args: argparse.Namespace, name: str, run: Path | None) -> tuple[Job, Path]:
    """Returns the job that is asked for and the file to write it to.

    Args:
        name: of the recipe or model.
        run: run folder of a training.
    """
    folder = Path() if run is None else run
    job = Job(
        words=args.command.argv,
        nodes=args.nodes,
        per_node=per_node(args),
        on_gpus=args.gpus_per_node is not None,
        run=run,
        name=args.name or f"internvl-{name}",
        log=folder / launchers.BATCH_LOG,
        partition=args.partition,
        time=args.time,
        cpus_per_node=args.cpus_per_node,
        sbatch_args=_words("--sbatch-args", args.sbatch_args),
        srun_args=_words("--srun-args", args.srun_args),
        setup=args.setup,
    )
    default = launchers.BATCH_FILE if run else f"evaluate-{name}.sbatch"
    return job, args.file or folder / default


def _words(option: str, texts: Sequence[str]) -> list[str]:
    """Splits what an option was given into words, as a shell does. Raises ConfigError."""
    try:
        return [word for text in texts for word in shlex.split(text)]
    except ValueError:
        raise ConfigError(f"{option}: a quote is not closed in {' '.join(texts)}") from None
