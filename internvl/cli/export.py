"""`internvl export`, and what `internvl merge` shares with it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from internvl import log
from internvl.cli.common import Arguments, add_run_arguments, loading, open_named
from internvl.errors import UserError


def run(args: Arguments) -> int:
    """Export a self-contained model folder, reload it and compare its outputs."""
    return write(exporter_of(args), args)


def exporter_of(args: Arguments) -> ModuleType:
    """Imports `internvl.export`, after a check that the model is there."""
    if not args.push and (args.public or args.update):
        raise UserError("--public and --update are options of --push ID; add it")
    open_named(args, args.step)
    with loading(args.model):
        from internvl import export

    return export


def write(exporter: ModuleType, args: Arguments) -> int:
    """Exports as the command line says, and prints where to."""
    if args.push:
        # A run that goes on meanwhile has a newer step when its card is written.
        args.step = open_named(args, args.step).step
    chosen = {"code_from": args.code_from, "step": args.step, "base": args.base}
    send = _open_repository(exporter, args) if args.push else None
    folder = exporter.run(args.model, args.to, args.format, **chosen)
    # Flushed, for the lines below go to another stream and would overtake it.
    print(folder, flush=True)
    from internvl.export import servers

    # Standard error: a script reads the folder's path alone.
    log.get_logger().info("commands that serve it:")
    for line in servers.lines(servers.describe(folder, args.format)):
        log.get_logger().info("  %s", line)
    if send is not None:
        print(send(folder))
    return 0


def _open_repository(exporter: ModuleType, args: Arguments) -> Callable[[Path], str]:
    """Opens the repository of --push; returns what sends a folder there and says its address."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as progress

    from internvl.export import card, push

    # An upload takes minutes and shows how far it is; loading the model takes a second.
    progress.disable_progress_bar()
    # Before the hub creates anything.
    exporter.check_free(args.to)
    repository = push.open_repository(args.push, public=args.public, update=args.update)
    log.get_logger().info("pushing to %s", repository.address)

    def send(folder: Path) -> str:
        # Opened again: the exporter takes a name, and this reads no weights.
        opened = open_named(args, args.step)
        written = card.write(folder, repository.id, opened, args.format)
        # The hub takes a card without one; who shares the model should know.
        if not card.license_of(folder):
            log.get_logger().warning(
                "%s: the base model's folder states no licence; add `license:` on the "
                "repository's page",
                written,
            )
        step = "" if opened.step is None else f", step {opened.step}"
        enable_progress_bars()
        return push.send(repository, folder, f"Exported by internvl{step}")

    return send


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
    sub.add_argument(
        "--push",
        metavar="ID",
        help="also send the folder, with a model card, to the hub as the private repository ID "
        "(owner/name); nothing is sent without this option",
    )
    sub.add_argument("--public", action="store_true", help="with --push: everybody may read it")
    sub.add_argument(
        "--update",
        action="store_true",
        help="with --push: replace the files of a repository that is there",
    )
