"""Real processes for tests of code that runs on several ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={
                **os.environ,
                **{name: str(value) for name, value in group.items()},
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in ranks]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not done after {timeout_s} s") from error
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    for rank, (process, (_, errors)) in enumerate(zip(ranks, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} failed:\n{errors}"
    return [output for output, _ in outputs]
