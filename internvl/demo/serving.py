"""Serves the demo's two pages: a conversation with its chat model, a search by its InternVL-14B.

Both are the ordinary verbs, each in a process of its own; what they are called with is printed.
"""

import http.client
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from internvl import log
from internvl.config import RetrievalEval, recipes
from internvl.errors import ConfigError, UserError
from internvl.launch import local

HOST, PORT = "127.0.0.1", 8600
"""Where the chat page is by default; the other page is at the next port."""
_PACKAGES = ("fastapi", "prometheus_client", "uvicorn")
_TERM_S = 20
"""Seconds that a page's server has to end."""


def addresses(port: int) -> tuple[str, str]:
    """Returns the addresses of the chat page and of the search page."""
    return f"http://{HOST}:{port}/", f"http://{HOST}:{port + 1}/"


def check(port: int) -> None:
    """Raises UserError if no page could be served, before minutes of training."""
    if not 1 <= port < 65535:
        raise ConfigError(f"--port must be 1 to 65534, not {port}: the pages take it and the next")
    # Named by hand: importing them would take a second.
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--serve needs {missing[0]}; python -m pip install 'internvl[serve]'")


def commands(folder: Path, port: int) -> list[str]:
    """Returns the commands that serve the two pages of a finished demo."""
    return [shlex.join(["internvl", *words]) for words in _servers(folder, port)]


def serve(folder: Path, port: int) -> int:
    """Serves both pages until Ctrl-C or SIGTERM; returns the exit code.

    Raises:
        UserError: the images cannot be indexed, or a page cannot be served.
    """
    _index(folder)
    ended = threading.Event()
    servers = _servers(folder, port)
    with _signals(ended), _running(servers) as processes:
        # In turn: both load their models meanwhile.
        for address, process in zip(addresses(port), processes, strict=True):
            _wait(address, process, ended)
        chat, search = addresses(port)
        if not ended.is_set():
            for line in (
                f"Talk to the model: {chat}",
                f"Search its images by words or an image: {search}",
                f"{folder / 'report.html'} links both. Ctrl-C ends them.",
            ):
                log.get_logger().info(line)
        while not ended.wait(0.2):
            for words, process in zip(servers, processes, strict=True):
                if process.poll() is not None:
                    raise UserError(f"internvl {words[0]} ended with exit code {process.poll()}")
    return 0


def _servers(folder: Path, port: int) -> list[list[str]]:
    """Returns the words of the verbs that serve the pages."""
    chat = ["serve", str(folder / "model"), "--device", "cpu", "--port", str(port)]
    search = ["search", str(folder / "index"), "--page", "--device", "cpu", "--port", str(port + 1)]
    return [chat, search]


def _index(folder: Path) -> None:
    """Makes the index of the demo's images, or brings it up to date."""
    # All of its images, also those that it was trained on: there is more to be found.
    recipe = recipes.load_recipe(folder / "retrieval" / "recipe.yaml")
    evaluated = next(iter(recipe.evals.values()))
    assert isinstance(evaluated, RetrievalEval), "the demo's recipe makes it one"
    words = ["index", str(evaluated.images), "--to", str(folder / "index"), "--device", "cpu"]
    words += ["--model", str(folder / "retrieval" / "model")]
    # Its own lines say what was wrong.
    code = subprocess.run(local.verb(*words), check=False).returncode
    if code:
        raise UserError(f"the demo's images cannot be indexed: {shlex.join(['internvl', *words])}")


@contextmanager
def _signals(ended: threading.Event) -> Iterator[None]:
    """Inside, a signal that ends the command sets `ended` instead."""
    before = {
        name: signal.signal(name, lambda *_: ended.set())
        for name in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _running(servers: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Runs verbs; ends all of them when it is left."""
    processes = []
    try:
        for words in servers:
            log.get_logger().info("internvl %s", shlex.join(words))
            processes.append(subprocess.Popen(local.verb(*words)))
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(_TERM_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(address: str, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    """Returns once a page answers, its server has ended, or the command is to end."""
    host = address.split("/")[2]
    while process.poll() is None and not ended.is_set():
        connection = http.client.HTTPConnection(host, timeout=5)
        try:
            # The search page has no such path, and answers nothing before its model is loaded.
            connection.request("GET", "/health")
            if connection.getresponse().status != 503:
                return
        except OSError:
            pass  # not yet listening
        finally:
            connection.close()
        time.sleep(0.2)
