"""`internvl demo`: models that learn in minutes on a CPU."""

import argparse
from pathlib import Path

from internvl.cli.common import Arguments, loading, run_as_ranks
from internvl.launch import launchers


def run(args: Arguments) -> int:
    """Train, evaluate, export and reload tiny models on a CPU; writes report.html."""
    # Two from the start: each imports what trains and exports once, and this process nothing.
    if not launchers.has_parent():
        if not args.serve:
            return run_as_ranks(args, 2)
        # Here: it imports torch, which takes seconds.
        from internvl.demo import serving

        serving.check(args.port)
        return run_as_ranks(args, 2) or serving.serve(args.to, args.port)
    with loading("the demo"):
        from internvl import demo, dist

    page = demo.run(args.to, short=args.short, port=args.port)
    if dist.is_main():
        print(f"The report is {page.resolve()}; open it in a browser.")
    return 0


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    sub.add_argument(
        "--to", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)"
    )
    sub.add_argument(
        "--short", action="store_true", help="train for about a minute, only to see that it works"
    )
    sub.add_argument(
        "--serve",
        action="store_true",
        help="at the end serve two pages until Ctrl-C: talk to the model, search the images",
    )
    sub.add_argument(
        "--port",
        type=int,
        default=8600,
        help="of the chat page; the search page is at the next one (default: 8600)",
    )
