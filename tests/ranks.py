"""Real processes for tests of code that runs on several ranks.

They are forked from a process that has imported the package once, which takes as long as some tests
need for everything else.
"""

import multiprocessing
import os
import socket
import tempfile
from multiprocessing import connection, forkserver
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["internvl.train", "torch.utils.tensorboard"])


def _start_server() -> None:
    """Starts the fork server unless it runs; what libraries warn of on import is not shown."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        forkserver.ensure_running()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def run_ranks(code: str, *, num_ranks: int = 2) -> list[str]:
    """Run `code` in `num_ranks` processes with the environment torchrun gives; CPU and gloo.

    Returns:
        Standard output of each rank, in rank order.

    Raises:
        AssertionError: A rank failed; the message holds the standard error of each that did.
    """
    import cpu_seconds  # not by the ranks, which import this file: it imports pytest

    _start_server()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(rank) for rank in range(num_ranks)]
        ranks = []
        for rank, folder in enumerate(folders):
            folder.mkdir()
            own = {**group, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            ranks.append(_CONTEXT.Process(target=_run, args=(code, environment, folder)))
            ranks[-1].start()
        running = ranks
        try:
            while running and not any(process.exitcode for process in ranks):
                connection.wait([process.sentinel for process in running])
                running = [process for process in running if process.exitcode is None]
            for process in running:  # as one failed: the others notice, or wait for it for ever
                process.join(30)
        finally:
            for process in ranks:
                process.kill()
                process.join()
            # A fork server's children are not this process's: it cannot ask what they took.
            for folder in folders:
                if (folder / "cpu_s").exists():
                    cpu_seconds.charge(float((folder / "cpu_s").read_text()))
        failed = [
            f"rank {rank} failed:\n{(folder / 'err').read_text()}"
            for rank, (process, folder) in enumerate(zip(ranks, folders, strict=True))
            if process.exitcode
        ]
        assert not failed, "\n".join(failed)
        return [(folder / "out").read_text() for folder in folders]


class Forked:
    """Code in a process of its own, of which each test would otherwise import torch."""

    def __init__(self, code: str) -> None:
        _start_server()
        self._name = tempfile.TemporaryDirectory()
        folder = Path(self._name.name)
        self._process = _CONTEXT.Process(target=_run, args=(code, dict(os.environ), folder))
        self._process.start()

    def poll(self) -> int | None:
        """Returns its exit code, negative for a signal, or None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Ends it as a machine does that has no memory left, and waits."""
        self._process.kill()
        self._process.join()
        self._name.cleanup()

    def communicate(self) -> tuple[str, str]:
        """Waits for its end; returns standard output and standard error."""
        import cpu_seconds

        self._process.join()
        folder = Path(self._name.name)
        out, err = ((folder / name).read_text() for name in ("out", "err"))
        if (folder / "cpu_s").exists():
            cpu_seconds.charge(float((folder / "cpu_s").read_text()))
        self._name.cleanup()
        return out, err


class Verb(Forked):
    """A command line of the package."""

    def __init__(self, *words: str) -> None:
        super().__init__(f"from internvl import cli; cli.main({list(words)})")


class Script(Forked):
    """A script, as `python FILE WORDS` in the folder above its own."""

    def __init__(self, file: Path, *words: str) -> None:
        super().__init__(_SCRIPT.format(file=str(file), words=list(words)))


_SCRIPT = """
import os, runpy, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
folder = Path({file!r}).parent
os.chdir(folder.parent)
sys.path.insert(0, str(folder))
sys.argv = [{file!r}, *{words!r}]
runpy.run_path({file!r}, run_name="__main__")
"""


def _run(code: str, environment: dict[str, str], folder: Path) -> None:
    """What a process does: its output goes to files in `folder`."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    try:
        exec(compile(code, "<rank>", "exec"), {"__name__": "__main__"})
    finally:
        (folder / "cpu_s").write_text(str(sum(os.times()[:4])))
