"""`internvl merge`: an export whose adapters must be there."""

import argparse

from internvl.cli import export
from internvl.cli.common import Arguments
from internvl.errors import UserError


def run(args: Arguments) -> int:
    """Merge adapters into their base model and export it as a self-contained folder."""
    exporter = export.exporter_of(args)
    # Without adapters it would be a plain export, which is probably not what the user meant.
    if not exporter.has_adapters(args.model, step=args.step, base=args.base):
        raise UserError(
            f"{args.model}: has no adapters to merge; `internvl export` writes a model as it is"
        )
    return export.write(exporter, args)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options, which are those of an export."""
    export.add_arguments(sub)
