"""Real processes for tests of code that runs on several ranks.

They are forked from a process that has imported the package once, which takes as long as some tests
need for everything else.
"""

import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["internvl.train", "torch.utils.tensorboard"])


def run_ranks(code: str, *, num_ranks: int = 2, timeout_s: float = 120) -> list[str]:
    """Run `code` in `num_ranks` processes with the environment torchrun gives; CPU and gloo.

    Returns:
        Standard output of each rank, in rank order.

    Raises:
        AssertionError: A rank failed or the time was up; the message holds its standard error.
    """
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
        until = time.monotonic() + timeout_s
        try:
            for process in ranks:
                process.join(max(0, until - time.monotonic()))
                if process.exitcode is None:
                    raise AssertionError(f"not done after {timeout_s} s")
        finally:
            for process in ranks:
                process.kill()
                process.join()
        for rank, (process, folder) in enumerate(zip(ranks, folders, strict=True)):
            assert process.exitcode == 0, f"rank {rank} failed:\n{(folder / 'err').read_text()}"
        return [(folder / "out").read_text() for folder in folders]


def _run(code: str, environment: dict[str, str], folder: Path) -> None:
    """What a process does: its output goes to files in `folder`."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    exec(compile(code, "<rank>", "exec"), {"__name__": "__main__"})
