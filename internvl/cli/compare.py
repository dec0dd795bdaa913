"""`internvl compare`: two evaluations beside each other."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from internvl.cli.common import Arguments


def run(args: Arguments) -> int:
    """Compare two result folders: differences with intervals, and the items that changed."""
    # Here: numpy and Pillow would slow every --help.
    from internvl import report
    from internvl.report import results
    from internvl.report.results import listing, pages
    from internvl.report.results.compare import compare

    first, second = results.read(args.first), results.read(args.second)
    compared = compare(first, second, args.task, resamples=args.resamples)
    if args.html is not None:
        report.write(pages.comparison_page(first, second, compared), args.html)
    # Alone on standard output, for a program to read.
    if args.json:
        tree = {
            "a": str(first.metrics_file),
            "b": str(second.metrics_file),
            "evaluations": {of_name.name: listing.as_json(of_name) for of_name in compared},
        }
        print(json.dumps(tree, indent=1, ensure_ascii=False))
        return 0
    print(f"A  {first.model}  ({first.metrics_file})\nB  {second.model}  ({second.metrics_file})")
    for of_name in compared:
        print("\n" + "\n".join(listing.lines(of_name, args.show)))
    if args.html is not None:
        print(f"\npage: {args.html}")
    return 0


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    text = "folder of `internvl evaluate`, run folder (its newest step), or RUN/evals/STEP.json"
    sub.add_argument("first", metavar="A", type=Path, help=text)
    sub.add_argument("second", metavar="B", type=Path, help="likewise")
    sub.add_argument("--task", metavar="NAME", help="compare this evaluation alone")
    sub.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    sub.add_argument("--json", action="store_true", help="print everything as JSON")
    sub.add_argument(
        "--show",
        type=_at_least(0),
        default=3,
        metavar="N",
        help="changed items to print (default: 3)",
    )
    sub.add_argument(
        "--resamples",
        type=_at_least(100),  # percentiles of fewer say nothing
        default=2000,
        metavar="N",
        help="resampled test sets of an interval (default: 2000)",
    )


def _at_least(least: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers from `least` on."""

    def parse(text: str) -> int:
        # argparse's own message would name this function.
        if not text.lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"a number of {least} or more is expected")
        return int(text)

    return parse
