"""The application: routes of a chat model or of InternVL-14B, and those that both have."""

import time
from collections.abc import Container, Mapping
from importlib import resources
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from internvl.errors import UserError, explain
from internvl.serve.engines import Engines, Gate
from internvl.serve.errors import ApiError, model_not_found, unavailable
from internvl.serve.http import Door, Handler, error_response
from internvl.serve.metrics import Metrics
from internvl.serve.options import Options


class Routes(Protocol):
    """What the routes of any family have."""

    engines: Engines[Any]
    gate: Gate
    metrics: Metrics
    names: list[str]
    """Names of models, the base first."""
    page_file: str | None
    """File of the page at `/`; None for none."""

    @property
    def posts(self) -> Mapping[str, Handler]:
        """Path -> its handler."""
        ...

    async def page(self, http: Request) -> Response:
        """Returns what the page needs to begin."""
        ...

    def wake(self, job: Any) -> None:
        """Tells whoever waits for a job that it has more."""
        ...

    def changed(self) -> None:
        """Notes that an engine is ready or has died."""
        ...

    def close(self) -> None:
        """Ends the threads of the routes."""
        ...


def build(routes: Routes, options: Options) -> Door:
    """Builds the application; returns the door in front of it, which is served."""
    # Its pages of documentation load scripts from other hosts.
    app = FastAPI(title="internvl serve", docs_url=None, redoc_url=None, openapi_url=None)
    door = Door(app, options.api_keys, routes.metrics)
    gets = _models(routes) | _state(routes, door) | {"/": _index(routes)}
    if routes.page_file is not None:
        gets["/page.json"] = routes.page
    # Starlette routes: FastAPI would read signatures, and bodies are checked by our own tables.
    for method, handlers in (("GET", gets), ("POST", routes.posts)):
        for path, handler in handlers.items():
            app.add_route(path, handler, methods=[method])
    door.paths = {*gets, *routes.posts}
    _handle_errors(app, routes.posts)
    return door


def _models(routes: Routes) -> dict[str, Handler]:
    """Returns the handlers that list models."""
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        base = routes.names[0]
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "internvl",
            "root": base,
            "parent": None if name == base else base,
        }

    async def models(http: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in routes.names]})

    async def model(http: Request) -> Response:
        name = http.path_params["name"]
        if name not in routes.names:
            raise model_not_found(name, routes.names)
        return JSONResponse(card(name))

    return {"/v1/models": models, "/v1/models/{name:path}": model}


def _state(routes: Routes, door: Door) -> dict[str, Handler]:
    """Returns the handlers for whatever watches the server."""

    async def health(http: Request) -> Response:
        routes.engines.check()
        # A load balancer sends nobody here any more.
        if door.draining:
            raise unavailable("the server is stopping")
        return JSONResponse({"status": "ok", "models": routes.names})

    async def metrics(http: Request) -> Response:
        counts = routes.metrics
        # Set when they are read: nothing changes them in one place.
        counts.up.set(routes.engines.ready)
        running = min(routes.gate.inside, routes.gate.slots)
        counts.running.set(running)
        counts.waiting.set(routes.gate.inside - running)
        return Response(counts.text(), media_type="text/plain; version=0.0.4")

    return {"/health": health, "/metrics": metrics}


def _index(routes: Routes) -> Handler:
    """Returns the handler of the address alone."""

    async def index(http: Request) -> Response:
        # Whoever opens the address sees what is there.
        if routes.page_file is None:
            return JSONResponse({"models": routes.names, "paths": sorted(routes.posts)})
        file = resources.files("internvl.serve") / "static" / routes.page_file
        return HTMLResponse(file.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    return index


_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The page is one file: whatever a model or an image says, nothing else is loaded or run.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; img-src data: blob:; media-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}

_ELSEWHERE = {
    "/v1/embeddings": "this is a chat model; embeddings are InternVL-14B's",
    "/v1/rerank": "this is a chat model; ranking is InternVL-14B's",
    "/v1/chat/completions": "InternVL-14B does not converse; it has /v1/embeddings and /v1/rerank",
    "/v1/completions": "use /v1/chat/completions, which renders the model's template",
    "/v1/responses": "use /v1/chat/completions",
}
"""Paths of the other family or of other servers, and the remedy for each."""


def _handle_errors(app: FastAPI, posts: Container[str]) -> None:
    """Turns every exception into a response in OpenAI's shape."""

    async def api_error(http: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def user_error(http: Request, error: Exception) -> Response:
        return error_response(ApiError(str(error)))

    async def no_route(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = http.url.path
        # Both words of the request: a GET of a POST path is a common mistake.
        reason = f"{http.method} {path}: {error.detail}"
        if path in _ELSEWHERE and path not in posts:
            reason = f"{path}: {_ELSEWHERE[path]}"
        return error_response(ApiError(reason, status=error.status_code, code="no_such_path"))

    async def bug(http: Request, error: Exception) -> Response:
        return error_response(ApiError(explain(error), status=500))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(UserError, user_error)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(Exception, bug)
