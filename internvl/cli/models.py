"""`internvl models`: the released models, and their downloads."""

import argparse
from pathlib import Path

from internvl.cli.common import Arguments
from internvl.errors import ConfigError, UnknownModel


def run(args: Arguments) -> int:
    """List the released models, or describe one: parts, size, memory, published scores."""
    from internvl import zoo

    if args.name is None:
        print(zoo.render_table())
        return 0
    try:
        text = zoo.describe(args.name)
        repository = zoo.repository(args.name) if args.download else ""
    except UnknownModel as error:
        # Exit code 2: the name is part of the command.
        raise ConfigError(str(error)) from None
    if args.download:
        from internvl.models import hub

        text = str(hub.download(repository, args.to))
    print(text)
    return 0


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    sub.add_argument("name", nargs="?", help="describe this model or part, such as InternVL2-2B")
    sub.add_argument(
        "--download", action="store_true", help="download its files from the Hugging Face hub"
    )
    sub.add_argument("--to", type=Path, help="folder for the download (default: the hub's cache)")
