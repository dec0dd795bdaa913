"""`internvl data`: annotation files are made of downloads, other files, and a model's answers."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl.cli.common import (
    Arguments,
    add_loading_arguments,
    add_rank_arguments,
    add_run_arguments,
    loading,
    open_named,
    run_as_ranks,
)
from internvl.errors import UserError, counted


def run(args: Arguments) -> int:
    """Prepare downloaded data sets, convert other files, or make preference pairs of answers."""
    if args.action == "make-pairs":
        return _make_pairs(args)
    if args.action == "convert":
        from internvl.datasets import convert

        converted = convert.run(args.name, args.source, args.target)
        print(_render_counts(converted.counts, converted.files))
        return 0
    from internvl.datasets import prepare

    prepared = prepare.run(args.name, args.root, download=args.download)
    if prepared.counts or prepared.files:
        print(_render_counts(prepared.counts, prepared.files))
    if prepared.missing:
        absent = counted(len(prepared.missing), "file or folder is", "files or folders are")
        remedy = "" if args.download else "; --download fetches those that a program can fetch"
        print(f"{args.name}: {absent} missing{remedy}", file=sys.stderr)
    # Standard output lists the files that were written, and nothing else.
    for missing in prepared.missing:
        print(missing, file=sys.stderr)
    return int(not prepared.ready)


def _make_pairs(args: Arguments) -> int:
    from internvl.models import hub

    if not args.annotations.exists():
        raise UserError(f"there is no file of questions {args.annotations}; check --annotations")
    # A wrong folder is refused before torch is imported.
    opened = args.model if hub.is_hub_id(args.model) else open_named(args, args.step)
    from internvl.launch import local

    with loading(args.model):
        num_ranks = local.choose_ranks(args.gpus, args.processes, args.device)
        from internvl.evals import pairing
    # Options that were not given keep the defaults of PairOptions.
    chosen: dict[str, Any] = {
        key: value for key in _PAIR_OPTIONS if (value := getattr(args, key)) is not None
    }
    options = pairing.PairOptions(annotations=args.annotations, **chosen)
    # Only now: every rank would refuse the options once more.
    if num_ranks > 1:
        return run_as_ranks(args, num_ranks)
    result = pairing.run(
        opened, args.to, options, device=args.device, dtype=args.dtype, quantize=args.quantize
    )
    # None on all ranks but the first.
    if result is not None:
        print(pairing.render(result))
    return 0


def _render_counts(counts: Mapping[str, int], files: Sequence[Path]) -> str:
    return "\n".join([*(f"{name}: {n:,}" for name, n in counts.items()), *map(str, files)])


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    actions = sub.add_subparsers(dest="action", required=True, metavar="prepare|convert|make-pairs")
    prepare = actions.add_parser("prepare", help="turn downloaded files into annotation files")
    prepare.add_argument(
        "name", help="data set: coco-caption, flickr30k, flickr30k-cn, nocaps, sft-v1.2 …"
    )
    prepare.add_argument(
        "--root",
        type=Path,
        default=Path(),
        help="folder of the downloads (default: the current one)",
    )
    prepare.add_argument("--download", action="store_true", help="download missing files")
    convert = actions.add_parser("convert", help="convert a file or folder to another format")
    convert.add_argument(
        "name", help="conversion: boxes-to-1000, boxes-to-unit, captions or parquet"
    )
    convert.add_argument("source", type=Path, help="file or folder to convert")
    convert.add_argument("target", type=Path, help="file or folder to write")
    _add_make_pairs(
        actions.add_parser(
            "make-pairs", help="sample answers to questions, and pair right and wrong"
        )
    )


_PAIR_OPTIONS: dict[str, tuple[Any, str]] = {
    "images": (Path, "folder that image paths are relative to (default: the current one)"),
    "method": (
        str,
        "correctness: right against wrong answers; dropout-ntp: a reference against its beginning, "
        "continued without the image; auto (default): correctness where a rule fits the reference",
    ),
    "rule": (
        str,
        "what calls an answer right: short, exact, number, choice, yes-no, anls, soft or boxes "
        "(default: auto, by what the references are)",
    ),
    "form": (
        str,
        "instruction around the question: plain (default, none), reason, boxed or think; Chinese "
        "with -zh; answers in another form are rejected ones too",
    ),
    "samples": (int, "answers to a question (default: 8)"),
    "continuations": (int, "continuations of a reference, by dropout-ntp (default: 1)"),
    "begin": (float, "share of a reference's words that is continued (default: 0.5)"),
    "per_question": (int, "most pairs of a question (default: 15)"),
    "temperature": (float, "sampling temperature (default: 0.7)"),
    "top_k": (int, "sample from so many tokens; 0 for all (default: 50)"),
    "top_p": (float, "sample from the likeliest tokens of this total probability"),
    "max_new_tokens": (int, "longest answer, in tokens (default: 1024)"),
    "seed": (int, "seed of the answers (default: 0)"),
    "limit": (int, "ask only so many questions, the first ones"),
    "tiles": (str, "most tiles of an image, or one (default: the checkpoint's)"),
    "frames": (int, "frames of a video (default: 8)"),
    "tolerance": (float, "largest relative error of a right number, such as 0.05 (default: 0)"),
    "batch_size": (int, "requests in flight (default: what the device holds)"),
    "on_bad_sample": (str, "raise (default), or skip to leave out rows that cannot be read"),
}
"""Field of PairOptions -> its type and help."""


def _add_make_pairs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="model, adapter or run folder, or hub id")
    sub.add_argument(
        "--annotations",
        type=Path,
        required=True,
        help="questions with reference answers: `question` and `answer`, or conversations",
    )
    sub.add_argument("--to", type=Path, required=True, help="JSONL file of pairs to write")
    for key, (parse, text) in _PAIR_OPTIONS.items():
        option = f"--{key.replace('_', '-')}"
        # argparse formats help with %.
        sub.add_argument(option, dest=key, type=parse, help=text.replace("%", "%%"))
    # Several GPUs share the questions: each holds a whole model.
    add_loading_arguments(sub, device_map=False)
    add_rank_arguments(sub)
    add_run_arguments(sub)
