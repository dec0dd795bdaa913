"""The application: routes of a chat model or of InternVL-14B, and those that both have."""

import time
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from internvl.errors import UserError, explain
from internvl.serve.engines import Engines, Gate
from internvl.serve.errors import ApiError, model_not_found
from internvl.serve.http import Door, error_response
from internvl.serve.metrics import Metrics
from internvl.serve.options import Options


class Routes(Protocol):
    """What the routes of any family have."""

    engines: Engines[Any]
    gate: Gate
    metrics: Metrics
    names: list[str]
    """Names of models, the base first."""

    async def page(self, http: Request) -> Response:
        """Returns what the page needs to begin."""
        ...

    def close(self) -> None:
        """Ends the threads of the routes."""
        ...


def build(
    routes: Routes, posts: Mapping[str, Callable[..., Any]], options: Options, page: str | None
) -> Door:
    """Builds the application; returns the door in front of it, which is served.

    Args:
        posts: path -> its handler.
        page: file of the page at `/`; None for none.
    """
    # Its pages of documentation load scripts from other hosts.
    app = FastAPI(title="internvl serve", docs_url=None, redoc_url=None, openapi_url=None)
    door = Door(app, options.api_keys, routes.metrics)
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

    async def health(http: Request) -> Response:
        routes.engines.check()
        # A load balancer sends nobody here any more.
        if door.draining:
            raise ApiError("the server is stopping", status=503, code="unavailable")
        return JSONResponse({"status": "ok", "models": routes.names})

    async def metrics(http: Request) -> Response:
        counts = routes.metrics
        # Set when they are read: nothing changes them in one place.
        counts.up.set(routes.engines.ready)
        running = min(routes.gate.inside, routes.gate.slots)
        counts.running.set(running)
        counts.waiting.set(routes.gate.inside - running)
        return Response(counts.text(), media_type="text/plain; version=0.0.4")

    async def index(http: Request) -> Response:
        # Whoever opens the address sees what is there.
        if page is None:
            return JSONResponse({"models": routes.names, "paths": sorted(posts)})
        file = resources.files("internvl.serve") / "static" / page
        return HTMLResponse(file.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    # Starlette routes: FastAPI would read signatures, and bodies are checked by our own tables.
    for path, get in {
        "/v1/models": models,
        "/v1/models/{name:path}": model,
        "/health": health,
        "/metrics": metrics,
        "/": index,
    }.items():
        app.add_route(path, get, methods=["GET"])
    if page is not None:
        app.add_route("/page.json", routes.page, methods=["GET"])
    for path, post in posts.items():
        app.add_route(path, post, methods=["POST"])
    _handle_errors(app, routes, posts)
    return door


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


def _handle_errors(app: FastAPI, routes: Routes, posts: Mapping[str, Any]) -> None:
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
