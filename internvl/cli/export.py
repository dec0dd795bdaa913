"""`internvl export`, and what `internvl merge` shares with it."""

import argparse
from pathlib import Path
from types import ModuleType

from internvl import log
from internvl.cli.common import Arguments, add_run_arguments, loading, open_named


def run(args: Arguments) -> int:
    """Export a self-contained model folder, reload it and compare its outputs."""
    return write(exporter_of(args), args)


def exporter_of(args: Arguments) -> ModuleType:
    """Imports `internvl.export`, after a check that the model is there."""
    open_named(args, args.step)
    with loading(args.model):
        from internvl import export

    return export


def write(exporter: ModuleType, args: Arguments) -> int:
    """Exports as the command line says, and prints where to."""
    chosen = {"code_from": args.code_from, "step": args.step, "base": args.base}
    folder = exporter.run(args.model, args.to, args.format, **chosen)
    # Flushed, for the lines below go to another stream and would overtake it.
    print(folder, flush=True)
    from internvl.export import servers

    # Standard error: a script reads the folder's path alone.
    log.get_logger().info("commands that serve it:")
    for line in servers.lines(servers.describe(folder, args.format)):
        log.get_logger().info("  %s", line)
    return 0


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the options of both verbs."""
    sub.add_argument("model", help="run, adapter or model folder, or hub id")
    sub.add_argument("--to", type=Path, required=True, help="folder to create")
    sub.add_argument(
        "--format",
        choices=("hf", "official"),
        default="hf",
        help="hf: for transformers (default); official: for the original's code",
    )
    sub.add_argument(
        "--code-from",
        type=Path,
        help="with --format official: copy the original's Python files from this folder",
    )
    add_run_arguments(sub)
