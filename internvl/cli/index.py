"""`internvl index`: an index of a folder of photos, for `internvl search`."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from internvl.cli.common import (
    Arguments,
    add_loading_arguments,
    add_run_arguments,
    loading,
    open_named,
    split_commas,
)
from internvl.errors import ConfigError, UserError

EXPORTS = ("clip-retrieval",)
"""Layouts that other programs read."""


def run(args: Arguments) -> int:
    """Index a folder of photos for search, or bring its index up to date."""
    from internvl.search import clip_retrieval, store

    if not args.folder.is_dir():
        raise ConfigError(f"{args.folder}: no folder of photos")
    if args.to.resolve() == args.folder.resolve():
        raise ConfigError(
            f"--to: {args.to} is the folder of photos itself; name another folder for its index"
        )
    if args.export and args.export[0] not in EXPORTS:
        raise ConfigError(f"--export: {args.export[0]!r} is none of {', '.join(EXPORTS)}")
    for option, value in (("--batch-size", args.batch_size), ("--workers", args.workers)):
        if value is not None and value < 1:
            raise ConfigError(f"{option}: at least 1, not {value}")
    # Before an hour of encoding, not after it.
    if args.approximate is not None:
        _check_approximate(args.approximate)
    if args.export:
        clip_retrieval.check(Path(args.export[1]))
    # Settings are written last: without them the index was never made.
    is_new = not (args.to / store.SETTINGS).is_file()
    if is_new and args.model is None:
        raise ConfigError("--model: a new index needs the name of an InternVL-14B")
    opened = None
    if is_new:
        # Before the folder of the index is made.
        _check_photos(args)
        opened = open_named(args, args.step)
        _check_embeds(opened)
    with store.locked(args.to):
        index, model = (store.Store(args.to), None) if opened is None else _new(args, opened)
        with index:
            # Its disk is mounted elsewhere now, or it was renamed: paths below it are the same.
            if not index.root.exists():
                index.move_root(args.folder.resolve())
            _check(args, index.settings)
            _update(args, index, model or _encoder(args, index.settings))
    return 0


def _check_approximate(recall: float) -> None:
    """Raises UserError for a recall that is no share, or if faiss is missing."""
    if not 0 < recall <= 1:
        raise ConfigError(f"--approximate is a share above 0 and up to 1, not {recall:g}")
    if find_spec("faiss") is None:
        raise UserError("--approximate needs faiss; install it with `pip install internvl[search]`")


def _check_photos(args: Arguments) -> None:
    """Raises UserError for a folder without photos, before a model is loaded for them."""
    from internvl.search import indexing
    from internvl.search.scan import Scan

    scan = Scan(args.folder, args.to.resolve())
    if next(scan.entries(), None) is None:
        raise UserError(indexing.no_photos(args.folder, scan))


def _encoder(args: Arguments, settings: Any) -> Any:
    """Returns the encoder of an index, which loads its model only for something to encode.

    Raises:
        UserError: --model is another model than that of the index.
    """
    opened = None if args.model is None else open_of_index(args, settings)
    with loading("the index"):
        from internvl.search import encoder

    model = encoder.Encoder(lambda: _load_logged(args, settings), settings)
    # A moved model has another name too: only its features tell.
    if opened and (_absolute(args.model), opened.step) != (settings.model, settings.step):
        _ = model.dual
    return model


def _absolute(model: str) -> str:
    """Returns the path of a model folder wherever a search may start; a hub id as it is."""
    named = Path(model).expanduser()
    return str(named.resolve()) if named.exists() else model


def _check_embeds(opened: Any) -> None:
    """Raises UserError for a chat model, before its weights are loaded."""
    if opened.files.family != "dual":
        raise UserError(
            f"--model: photo search needs an InternVL-14B model; {opened.name} is a chat model"
        )


def _new(args: Arguments, opened: Any) -> tuple[Any, Any]:
    """Creates an index, whose settings the model has a share in; returns its encoder too."""
    with loading(args.model):
        from internvl.search import encoder, store

    model = encoder.Encoder(lambda: load_dual(args, opened))
    settings = model.new_settings(
        args.folder.resolve(),
        _absolute(args.model),
        opened.step,
        [str(Path(base).resolve()) for base in args.base or []],
        args.mode or ["c"],
        args.features_dtype or "float16",
    )
    return store.Store.create(args.to, settings), model


def _check(args: Arguments, settings: Any) -> None:
    """Raises ConfigError if an index is of something else than the command line says."""
    for option, asked, value in (
        ("the photos of", str(args.folder.resolve()), settings.folder),
        ("--mode", ",".join(sorted(args.mode or ())), ",".join(sorted(settings.modes))),
        ("--features-dtype", args.features_dtype, settings.dtype),
    ):
        # An option that is not given is as the index has it.
        if asked and asked != value:
            raise ConfigError(
                f"{args.to}: it was made with {option} {value}, not {asked}; give another --to"
            )


def _update(args: Arguments, index: Any, model: Any) -> None:
    with loading("the index"):
        from internvl.search import approximation, indexing

    done = indexing.update(
        index, model, batch_size=args.batch_size, workers=args.workers, rehash=args.rehash
    )
    print(done)
    for mode, built in approximation.renew(index, model, args.approximate).items():
        print(f"approximate search, InternVL-{mode.upper()}: {approximation.describe(built)}")
    if args.export:
        from internvl.search import clip_retrieval

        count = clip_retrieval.export(index, Path(args.export[1]), index.settings.modes[0])
        print(f"{count:,} photos in clip-retrieval's layout: {args.export[1]}")
    # Last, below the counts: the line to copy.
    print(f'The index is {args.to}; search it: internvl search {args.to} "a dog in the snow"')


def _load_logged(args: Arguments, settings: Any) -> Any:
    opened = open_of_index(args, settings)
    with loading(opened.name):
        return load_dual(args, opened)


def open_of_index(args: Arguments, settings: Any) -> Any:
    """Opens the model that an index remembers, or that the command line names in its place."""
    from internvl.inference.opened import open_model

    # The step belongs to the model that the index remembers.
    step = args.step or (settings.step if args.model is None else None)
    opened = open_model(
        args.model or settings.model, step=step, base=args.base or settings.base or None
    )
    opened.check()
    _check_embeds(opened)
    return opened


def load_dual(args: Arguments, opened: Any) -> Any:
    """Loads an opened InternVL-14B as the command line says."""
    from internvl.inference import load

    return load.load(
        opened,
        device=args.device,
        dtype=args.dtype,
        device_map=args.device_map,
    ).as_dual("photo search")


def add_model_arguments(sub: argparse.ArgumentParser, help: str) -> None:
    """Adds the model and how it is loaded."""
    sub.add_argument("--model", metavar="MODEL", help=help)
    # InternVL-14B is never rounded.
    add_loading_arguments(sub, quantize=False)
    add_run_arguments(sub)


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    sub.add_argument(
        "folder", type=Path, metavar="FOLDER", help="folder of photos, with subfolders"
    )
    sub.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder of the index")
    sub.add_argument(
        "--mode",
        type=split_commas,
        metavar="c,g",
        help="features of InternVL-C (default), InternVL-G, or both",
    )
    sub.add_argument(
        "--features-dtype",
        choices=("float16", "float32"),
        help="type of the features on disk (default: float16)",
    )
    sub.add_argument("--batch-size", type=int, default=64, help="photos encoded at once")
    sub.add_argument(
        "--workers", type=int, metavar="N", help="threads that decode (default: one per core)"
    )
    sub.add_argument(
        "--rehash",
        action="store_true",
        help="read every file again, not only those whose size or time has changed",
    )
    sub.add_argument(
        "--approximate",
        nargs="?",
        type=float,
        const=0.99,
        metavar="RECALL",
        help="also build a faiss index that finds this share of the best ten (default: 0.99)",
    )
    sub.add_argument(
        "--export",
        nargs=2,
        metavar=("LAYOUT", "OUT"),
        help="also write the features for another program: clip-retrieval OUT",
    )
    add_model_arguments(sub, "InternVL-14B: model folder, run or hub id; an index remembers it")
