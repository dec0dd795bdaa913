"""What all routes share: bodies of limited size, clients that go away, errors, keys, metrics."""

import asyncio
import hmac
import json
from collections.abc import Callable, Container, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl.serve.errors import ApiError, unavailable
from internvl.serve.metrics import Metrics
from internvl.serve.options import Limits

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


async def read_json(http: Request, limits: Limits) -> Any:
    """Reads a request's body as JSON.

    Raises:
        ApiError: too large, or not JSON.
    """
    blocks, size = [], 0
    # Counted as it comes: a header may name another length, or none.
    async for block in http.stream():
        size += len(block)
        if size > limits.max_body:
            raise ApiError(
                f"the body has more than {limits.max_body:,} bytes (--max-body); send smaller "
                "images",
                status=413,
            )
        blocks.append(block)
    try:
        return json.loads(b"".join(blocks), parse_constant=_refuse_constant)
    # RecursionError: brackets without end.
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON ({str(error)[:100]})") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


async def finished_or_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits some work, and cancels it if the client goes away first.

    Raises:
        ClientDisconnect: it has gone.
    """
    # Both at once: only `receive` tells that a client has gone.
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def error_response(error: ApiError) -> JSONResponse:
    """Returns the response of an error, in OpenAI's shape."""
    return JSONResponse(error.body, error.status, error.headers)


class Door:
    """Every request passes it: keys, a server that stops, counts, and clients that have gone."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.metrics = metrics
        self.draining = False
        """True after SIGTERM: what is under way is answered, nothing new begun."""
        self.under_way = 0
        self.paths: Container[str] = ()
        """Paths that metrics name; any other is `other`, since clients may send endlessly many."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; see ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.under_way += 1
        try:
            refusal = self._refusal(scope)
            app = self.app if refusal is None else refusal
            await app(scope, receive, note)
        except ClientDisconnect:
            status = 499  # nobody is there to be told
        finally:
            self.under_way -= 1
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> Response | None:
        """Returns the response to a request that is not let in, else None."""
        path = scope["path"]
        if not path.startswith("/v1/"):
            return None
        if self.keys and not self._has_key(scope):
            return error_response(
                ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
            )
        # After the key: strangers learn nothing.
        if self.draining:
            return error_response(unavailable("the server is stopping", 10))
        return None

    def _has_key(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # All are compared, in the same time whichever it is.
        matches = [hmac.compare_digest(key.strip(), valid) for valid in self.keys]
        return scheme.lower() == b"bearer" and any(matches)
