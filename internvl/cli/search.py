"""`internvl search`: finds photos of an index by words and images, in the terminal or a browser."""

import argparse
import errno
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from internvl.cli.common import Arguments, loading
from internvl.cli.index import add_model_arguments, load_dual, open_of_index
from internvl.errors import UserError, counted, one_line


def run(args: Arguments) -> int:
    """Search an index of photos by words or an image; --page opens a page for your browser."""
    from internvl.data.images import as_rgb
    from internvl.search import query, store

    terms = query.parse_terms(args.query or "")
    for option, value, weight in args.terms:
        image = {"image": Path(value)} if option == "image" else {"text": value}
        terms.append(query.Term(**image, weight=weight))
    filters = query.Filters(tuple(args.folder), args.since, args.until)
    query.check_page(args.page_size, args.skip, args.rerank)
    if not args.page:
        query.check_terms(terms)
    for term in terms:
        if term.image is not None:
            as_rgb(term.image)  # for its errors alone, before the model is loaded
    with store.Store(args.index) as index:
        settings = index.settings
        index.features(args.mode or settings.modes[0])  # for its errors alone
        # A program that reads JSON takes an empty list of hits.
        if not args.page and not args.json:
            _check_filters(args, index, filters)
        opened = open_of_index(args, settings)
        with loading(opened.name):
            from internvl.search import encoder, searcher

            model = encoder.Encoder(lambda: load_dual(args, opened), settings)
            photos = searcher.Searcher(index, model, approximate=args.approximate)
        if args.page:
            return _serve(photos, args.port)
        results = photos.find(
            terms,
            mode=args.mode,
            filters=filters,
            page_size=args.page_size,
            skip=args.skip,
            rerank=args.rerank,
        )
        if args.json:
            print(_as_json(terms, results, index.root))
        else:
            _print(terms, results, index, args.thumbnails)
    return 0


def _check_filters(args: Arguments, index: Any, filters: Any) -> None:
    """Raises UserError if the filters leave no photo, before a model is loaded for none."""
    if len(index.rows(*filters.condition())):
        return
    options = [*(("--folder", glob) for glob in args.folder)]
    options += [(f"--{name}", getattr(args, name)) for name in ("since", "until")]
    shown = " ".join(f"{option} {value}" for option, value in options if value)
    total = counted(index.count(), "photo")
    # Without a filter it is the index that is empty.
    reason = f"no photo fits {shown}; change it" if shown else "nothing can be found"
    raise UserError(f"{reason}: the index has {total} of {index.root}")


def _serve(photos: Any, port: int) -> int:
    """Serves the page until Ctrl-C."""
    from internvl.search.server import PageServer

    _ = photos.encoder.dual  # loaded before somebody waits for a search
    try:
        server = PageServer(photos, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(f"--port {port}: in use by another program; choose another one") from None
    with server:
        # Flushed: who starts this from a script reads the address from a pipe.
        print(f"The page is {server.address} (this machine alone); Ctrl-C ends it.", flush=True)
        server.serve_forever()
    return 0


def _as_json(terms: Sequence[Any], results: Any, root: Path) -> str:
    hits = [hit.as_json() | {"path": str(root / hit.photo.path)} for hit in results.hits]
    head = {"terms": [term.label for term in terms], "total": results.total, "skip": results.skip}
    return json.dumps({**head, "hits": hits}, ensure_ascii=False, indent=1)


def _print(terms: Sequence[Any], results: Any, index: Any, thumbnails: bool) -> None:
    from internvl.search.searcher import describe_results

    # Weights may have been read otherwise than meant.
    if len(terms) > 1 or terms[0].weight != 1:
        print(f"looking for {', '.join(term.label for term in terms)}")
    for hit in results.hits:
        match = "" if hit.match is None else f"  match {hit.match:.3f}"
        path = one_line(hit.photo.path)
        print(f"{hit.rank:>5}  {hit.score:.3f}{match}  {hit.photo.taken[:10]}  {path}")
        if thumbnails:
            print(_drawn(index, hit.photo))
    # As options of this very command, to be typed.
    following = results.skip + len(results.hits)
    more = f"; the next: --skip {following}" if results.hits and following < results.total else ""
    print(f"{describe_results(results)} in {index.root}{more}")


def _drawn(index: Any, photo: Any) -> str:
    """Draws a photo's thumbnail; the reason in its place if that cannot be."""
    from PIL import Image

    from internvl.errors import BadImage
    from internvl.search.thumbnails import draw, thumbnail

    try:
        with Image.open(BytesIO(thumbnail(index, photo))) as image:
            return draw(image, columns=32)
    except BadImage as error:
        return f"       {error}"


class _AddTerm(argparse.Action):
    """Appends a text or an image, whose weight may follow."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        # A new list: the one that is there is the parser's default, for every command line.
        namespace.terms = [*namespace.terms, (self.dest.removesuffix("_term"), values, 1.0)]


class _Weigh(argparse.Action):
    """Sets the weight of the text or image before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if not namespace.terms:
            parser.error("--weight follows the --text or --image that it is for")
        *before, (noun, value, _) = namespace.terms
        namespace.terms = [*before, (noun, value, values)]


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds the verb's options."""
    sub.set_defaults(terms=[])
    sub.add_argument("index", type=Path, metavar="DIR", help="folder of the index")
    sub.add_argument(
        "query", nargs="?", metavar="WORDS", help='such as "a dog in the snow", 海边:1 人:-0.5'
    )
    sub.add_argument(
        "--text", action=_AddTerm, dest="text_term", help="also these words; repeat it"
    )
    sub.add_argument(
        "--image", action=_AddTerm, dest="image_term", metavar="FILE", help="also this image"
    )
    sub.add_argument(
        "--weight", action=_Weigh, type=float, help="of the --text or --image before it; 1, -0.5"
    )
    sub.add_argument(
        "--mode", choices=("c", "g"), help="InternVL-C or G (default: the first that was indexed)"
    )
    sub.add_argument(
        "--folder",
        action="append",
        default=[],
        metavar="GLOB",
        help='only photos whose path below the folder fits: 2024, "2024/*beach*"; repeat it',
    )
    sub.add_argument("--since", default="", metavar="DATE", help="2024, 2024-05 or 2024-05-01")
    sub.add_argument("--until", default="", metavar="DATE", help="that year, month or day included")
    sub.add_argument("--page-size", type=int, default=20, help="photos of a page (default: 20)")
    sub.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N")
    sub.add_argument(
        "--rerank", type=int, default=0, metavar="N", help="sort the best N by the match head"
    )
    sub.add_argument(
        "--approximate", action="store_true", help="rank by the faiss index, for many millions"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--thumbnails", action="store_true", help="draw each photo in the terminal")
    sub.add_argument("--page", action="store_true", help="serve a page for a browser here")
    sub.add_argument("--port", type=int, default=8620, help="of the page (default: 8620)")
    add_model_arguments(sub, "in place of the model that the index remembers, if that has moved")
