"""Serves the search page to this machine's browsers: one static file, and a few addresses.

    GET  /                     the page
    GET  /about                what is indexed
    POST /search               a `SearchRequest`, answered with hits
    GET  /thumbnail/DIGEST     JPEG
    GET  /photo/DIGEST         the photo itself

Photos are named by the digests of their contents, so no address leads out of the index.
"""

import base64
import json
import re
import sys
import time
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from internvl import log
from internvl.data.images import open_checked, open_small, read_data_address
from internvl.errors import BadImage, UserError, explain
from internvl.search.query import MOST_RERANKED, Filters, Term, parse_terms
from internvl.search.searcher import Searcher
from internvl.search.store import PhotoRow
from internvl.search.thumbnails import original, thumbnail

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("page.html")
MAX_BODY = 64 << 20
"""Longest request, bytes: a dropped image in base64."""

_SHOWN = {"JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"}
"""Formats that browsers show; others are sent as JPEG."""
# Of a photo that must be converted: more than most screens show.
_LARGE_SIDE = 2560
_CACHED = "private, max-age=31536000, immutable"  # a digest's bytes never change

logger = log.get_logger()


class _Request(BaseModel):
    # A misspelled filter would be no filter.
    model_config = ConfigDict(extra="forbid")


class TermRequest(_Request):
    """An image to look for: a `data:` address, or the digest of a photo of the index."""

    image: str = ""
    digest: str = ""
    weight: float = 1.0


class SearchRequest(_Request):
    """A search; see `Searcher.find`."""

    query: str = ""
    """Words with optional weights, see `parse_terms`."""
    terms: list[TermRequest] = []
    mode: str | None = None
    folders: list[str] = []
    since: str = ""
    until: str = ""
    page_size: int = 40
    skip: int = 0
    rerank: int = 0


class PageServer(ThreadingHTTPServer):
    """A server of one searcher's page; `serve_forever` until `shutdown`."""

    # Browsers keep connections open, and Ctrl-C would wait for them.
    daemon_threads = True

    def __init__(self, searcher: Searcher, port: int) -> None:
        """
        Args:
            port: 0 for any that is free.
        """
        self.searcher = searcher
        self.page = PAGE.read_bytes()
        script = re.findall(rb"<script>(.*?)</script>", self.page, re.DOTALL)[0]
        digest = base64.b64encode(sha256(script).digest()).decode()
        # A file name that became markup could still run nothing, and reach no other host.
        self.policy = (
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
            "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs an exception that is no answer, unless the browser only went away."""
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, ConnectionError | TimeoutError):
            logger.warning("the page's server: %s", explain(error))


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # s; a silent connection gives its thread back

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        folder, _, name = path[1:].partition("/")
        routes = {"thumbnail": self._thumbnail, "photo": self._photo}
        if not self._is_local():
            return
        if path == "/":
            self._answer(self.server.page, "text/html; charset=utf-8")
        elif path == "/about":
            self._json(_about(self.server.searcher))
        elif folder in routes:
            self._image(routes[folder], name)
        else:
            self._error(HTTPStatus.NOT_FOUND, f"there is no page {path}")

    def do_POST(self) -> None:
        if not self._is_local():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/search":
            self._error(HTTPStatus.NOT_FOUND, f"there is no page {self.path}")
        elif self.headers.get_content_type() != "application/json":
            # Other sites' forms can send no JSON.
            self._error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        elif not length.isdecimal() or int(length) > MAX_BODY:
            text = f"the request is longer than {MAX_BODY >> 20} MiB, or of unknown length"
            self._error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        else:
            self._search(self.rfile.read(int(length)))

    def _search(self, body: bytes) -> None:
        try:
            request = SearchRequest.model_validate_json(body)
            self._json(_search(self.server.searcher, request))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            self._error(HTTPStatus.BAD_REQUEST, f"{where}: {problem['msg']}")
        except UserError as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error))

    def _image(self, make: Any, name: str) -> None:
        photo = None
        # Nothing else is looked up: `fromhex` takes spaces too.
        if re.fullmatch("[0-9a-f]{32}", name):
            photo = self.server.searcher.store.photo_of(bytes.fromhex(name))
        if photo is None:
            self._error(HTTPStatus.NOT_FOUND, "there is no such photo; search again")
            return
        try:
            data, content_type = make(photo)
        except (BadImage, OSError) as error:
            self._error(HTTPStatus.NOT_FOUND, explain(error))
            return
        self._answer(data, content_type, cache=_CACHED)

    def _thumbnail(self, photo: PhotoRow) -> tuple[bytes, str]:
        return thumbnail(self.server.searcher.store, photo), "image/jpeg"

    def _photo(self, photo: PhotoRow) -> tuple[bytes, str]:
        path = original(self.server.searcher.store, photo)
        with open_checked(path) as image:
            form = image.format or ""
        # By its content: a browser would not show a TIFF that is called .jpg.
        if form in _SHOWN:
            return path.read_bytes(), f"image/{form.lower()}"
        buffer = BytesIO()
        open_small(path, _LARGE_SIDE, "apply").save(buffer, "JPEG", quality=90)
        return buffer.getvalue(), "image/jpeg"

    def _is_local(self) -> bool:
        """Refuses requests under another name, such as a site's that resolves to this machine."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:  # such as a bracket that is not closed
            host = None
        if host in (HOST, "localhost"):
            return True
        self._error(HTTPStatus.FORBIDDEN, f"open the page as {self.server.address}")
        return False

    def _error(self, status: HTTPStatus, text: str) -> None:
        # An unread body would be taken for the next request.
        self.close_connection = True
        self._json({"error": text}, status)

    def _json(self, value: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        # In ASCII, as any part of a file name may be half of a character.
        self._answer(json.dumps(value).encode(), "application/json", status)

    def _answer(
        self,
        body: bytes,
        content_type: str,
        status: HTTPStatus = HTTPStatus.OK,
        *,
        cache: str = "no-store",
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            "Cache-Control": cache,
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("page: " + format, *args)


def _about(searcher: Searcher) -> dict[str, Any]:
    settings = searcher.store.settings
    return {
        "folder": settings.folder,
        "photos": searcher.store.count(),
        "modes": settings.modes,
        "rerank": MOST_RERANKED if searcher.encoder.dual.model.num_queries else 0,
    }


def _search(searcher: Searcher, request: SearchRequest) -> dict[str, Any]:
    started = time.perf_counter()
    terms = [*parse_terms(request.query), *map(_term, request.terms)]
    filters = Filters(tuple(filter(None, request.folders)), request.since, request.until)
    results = searcher.find(
        terms,
        mode=request.mode,
        filters=filters,
        page_size=request.page_size,
        skip=request.skip,
        rerank=request.rerank,
    )
    return {
        "terms": [term.label for term in terms],
        "total": results.total,
        "skip": results.skip,
        "seconds": time.perf_counter() - started,
        "hits": [hit.as_json() | {"digest": hit.photo.digest.hex()} for hit in results.hits],
    }


def _term(term: TermRequest) -> Term:
    if term.image:
        return Term(image=read_data_address(term.image), weight=term.weight)
    try:
        return Term(digest=bytes.fromhex(term.digest), weight=term.weight)
    except ValueError:
        raise UserError(f"{term.digest!r} is no digest of a photo") from None
