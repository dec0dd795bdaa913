"""Runs a server: binds the port, loads the model meanwhile, drains on SIGTERM."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from internvl import log
from internvl.errors import UserError, counted
from internvl.files import write_text
from internvl.serve.app import Routes, build
from internvl.serve.engines import Answering, Engine, Engines, Gate
from internvl.serve.options import Options

LoadEngine = Callable[[], Answering]
"""Loads a model and returns what answers with it; called in a thread of its own."""


def serve(family: str, loads: Sequence[LoadEngine], options: Options, names: Sequence[str]) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        family: "chat" or "dual".
        loads: one for each engine.
        names: names of the adapters.

    Raises:
        UserError, OSError: the port is taken, or a model cannot be loaded.
    """
    # First: a port that is taken costs no loading.
    listening = _bind(options.host, options.port)
    with contextlib.closing(listening):
        asyncio.run(_serve(family, loads, options, names, listening))


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    # A server that was restarted gets its port back at once.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise UserError(
            f"{host}:{port} cannot be listened on ({reason}); choose another --port, or --host"
        ) from None
    return listening


async def _serve(
    family: str,
    loads: Sequence[LoadEngine],
    options: Options,
    names: Sequence[str],
    listening: socket.socket,
) -> None:
    engines: Engines[Any] = Engines([])
    routes = _routes_class(family)(engines, Gate(options.limits.max_waiting), options)
    engines.engines = [Engine(load, routes.wake, routes.changed) for load in loads]
    routes.names += names
    door = build(routes, options)
    config = uvicorn.Config(
        door,
        # Our own lines say what a request was; uvicorn's access log knows only its path.
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config, door, options.drain_s)
    port = listening.getsockname()[1]
    # Whoever reads the port connects at once.
    listening.listen()
    if options.port_file is not None:
        write_text(Path(options.port_file), f"{port}\n")
    log.get_logger().info("listening on http://%s:%d, loading the model …", options.host, port)
    failed = asyncio.ensure_future(_stop_if_it_cannot_load(engines, server, options, port))
    try:
        await server.serve(sockets=[listening])
    finally:
        failed.cancel()
        routes.close()
        await asyncio.to_thread(engines.close)
    # A model that could not be loaded ends the command; an engine that died later does not.
    if server.load_error is not None:
        raise server.load_error


async def _stop_if_it_cannot_load(
    engines: Engines[Any], server: "_Server", options: Options, port: int
) -> None:
    # Polled: it ends with the first of two things, and happens once.
    while not engines.ready:
        if engines.error is not None:
            server.load_error = engines.error
            server.should_exit = True
            return
        await asyncio.sleep(0.05)
    log.get_logger().info("serving %s at http://%s:%d", options.name, options.host, port)


def _routes_class(family: str) -> Callable[[Engines[Any], Gate, Options], Routes]:
    """Imports the routes of a family alone: each needs half of the server's modules."""
    if family == "dual":
        from internvl.serve.dual_routes import DualRoutes

        return DualRoutes
    from internvl.serve.chat_routes import ChatRoutes

    return ChatRoutes


class _Server(uvicorn.Server):
    """Answers what is under way before it stops; a second signal stops it at once."""

    def __init__(self, config: uvicorn.Config, door: Any, drain_s: float) -> None:
        super().__init__(config)
        self.door = door
        self.drain_s = drain_s
        self.until_s = 0.0
        """When what is under way has had its time, by the monotonic clock."""
        self.load_error: BaseException | None = None
        self._has_cut = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop; a second signal ends what is under way."""
        # Not recorded as uvicorn does: it would raise the signal again, and the exit code be its.
        if self.door.draining:
            self.should_exit = self.force_exit = True
            return
        name = signal.Signals(sig).name
        log.get_logger().info("%s: answering what is under way, then stopping", name)
        self.until_s = time.monotonic() + self.drain_s
        self.door.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Returns True once it should stop; see uvicorn."""
        left = self.door.under_way
        is_late = self.force_exit or time.monotonic() > self.until_s
        if self.door.draining and left and is_late and not self._has_cut:
            self._has_cut = True
            log.get_logger().warning("cut off: %s had not ended", counted(left, "request"))
            # As if their clients had gone: uvicorn would cancel each, and log a trace of it.
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        if self.door.draining and (not left or is_late):
            self.should_exit = True
        return await super().on_tick(counter)
