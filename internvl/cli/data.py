"""`internvl data`: downloads become annotation files."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvl.cli.common import Arguments


def run(args: Arguments) -> int:
    """Prepare downloaded data sets for training, or convert boxes, captions and Parquet files."""
    if args.action == "convert":
        from internvl.datasets import convert

        converted = convert.run(args.name, args.source, args.target)
        print(_render_counts(converted.counts, converted.files))
        return 0
    from internvl.datasets import prepare

    prepared = prepare.run(args.name, args.root, download=args.download)
    print(_render_counts(prepared.counts, prepared.files))
    for missing in prepared.missing:
        print(missing, file=sys.stderr)
    return int(not prepared.ready)


def _render_counts(counts: Mapping[str, int], files: Sequence[Path]) -> str:
    return "\n".join([*(f"{name}: {n:,}" for name, n in counts.items()), *map(str, files)])


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    actions = sub.add_subparsers(dest="action", required=True, metavar="prepare|convert")
    prepare = actions.add_parser("prepare", help="turn downloaded files into annotation files")
    prepare.add_argument(
        "name", help="data set: coco-caption, flickr30k, flickr30k-cn, nocaps, sft-v1.2 …"
    )
    prepare.add_argument("--root", type=Path, required=True, help="folder of the downloads")
    prepare.add_argument("--download", action="store_true", help="download missing files")
    convert = actions.add_parser("convert", help="convert a file or folder to another format")
    convert.add_argument(
        "name", help="conversion: boxes-to-1000, boxes-to-unit, captions or parquet"
    )
    convert.add_argument("source", type=Path, help="file or folder to convert")
    convert.add_argument("target", type=Path, help="file or folder to write")
