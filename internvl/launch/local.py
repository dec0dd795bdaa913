"""Starts a command as several ranks on this machine and watches them.

No rank outlives another one that failed, nor this process: the first death ends all.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from internvl.errors import ConfigError, counted
from internvl.launch import launchers

_POLL_S = 0.05
_REPORT_S = 2.0
"""Seconds that ranks have to end by themselves after one has failed, each with its reason."""
_TERM_S = 10.0
"""Seconds from SIGTERM to SIGKILL for ranks whose run has failed already."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MOST_INTERRUPTS = 3
"""Ctrl-C so many times kills ranks that do not react."""
_MEANINGS: Mapping[int, str] = {
    signal.SIGKILL: "most likely the machine's memory ran out, or somebody killed it",
    signal.SIGTERM: "somebody or a job scheduler stopped it",
}
_CRASH = "a library or the GPU's driver crashed"


@dataclass(frozen=True)
class Ended:
    """How the ranks of a command ended."""

    code: int
    """Exit code of the rank that failed first, 0 if none did; a signal's as a shell's, 128 + n."""
    sentence: str = ""
    """Why, with rank and host; empty if none failed."""


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    words: Path
    """File for the sentence that ends the rank."""
    ended_s: float | None = None
    killed: bool = False
    """By this process, because it did not end."""


def verb(*words: str) -> list[str]:
    """Returns the command that runs a verb of the command line with this Python."""
    return [sys.executable, "-m", "internvl", *words]


def choose_ranks(gpus: int | None, processes: int | None, device: str | None) -> int:
    """Returns how many ranks to start here; 1 if this process is to do the work itself.

    Args:
        gpus: `--gpus`: ranks with a GPU each; None takes all GPUs of this machine.
        processes: `--processes`: ranks on the CPU.
        device: "cpu" leaves GPUs alone; None is "auto".

    Raises:
        ConfigError: they contradict each other, this machine, or the launcher of this process.
    """
    if gpus is not None and processes is not None:
        raise ConfigError("--gpus and --processes: give one of them")
    option, count = ("--gpus", gpus) if processes is None else ("--processes", processes)
    if count is not None and count < 1:
        raise ConfigError(f"{option}: at least 1, not {count}")
    membership = launchers.joined()
    if membership is not None:
        if count is not None and not launchers.has_parent():
            raise ConfigError(
                f"{option} {count}: this process is one of {membership.world_size} that "
                f"{membership.launcher} has started; leave {option} out"
            )
        return 1
    if processes is not None:
        if device not in ("cpu", None, "auto") or (device != "cpu" and count_gpus()):
            raise ConfigError("--processes: ranks on the CPU, which needs device=cpu; or --gpus N")
        return processes
    if device not in ("auto", "cuda", None):
        # cpu, or a single GPU by its index.
        if gpus is not None and device == "cpu":
            raise ConfigError("--gpus: the device is cpu; use --processes N, or device=auto")
        return 1
    available = count_gpus()
    if gpus is not None and gpus > available:
        hint = "; --processes N starts ranks on the CPU" if not available else ""
        raise ConfigError(f"--gpus {gpus}: this machine has {counted(available, 'GPU')}{hint}")
    return max(1, available if gpus is None else gpus)


def count_gpus() -> int:
    """Returns the number of GPUs that processes started here see."""
    # Here: whoever chooses CPUs or goes on alone imports it at its own time.
    import torch

    return torch.cuda.device_count()


def run(command: Sequence[str], num_ranks: int, *, stdout: int | None = None) -> Ended:
    """Runs `command` as ranks 0 … `num_ranks` - 1 until all have ended.

    SIGINT, SIGTERM and SIGHUP go on to the ranks, which save and end.

    Args:
        stdout: as for `subprocess.Popen`, of every rank.
    """
    with tempfile.TemporaryDirectory(prefix="internvl-") as folder:
        ranks: list[_Rank] = []
        asked: list[int] = []
        with _forwarding(ranks, asked):
            port = _free_port()
            for index in range(num_ranks):
                words = Path(folder) / f"{index}.json"
                environment = _environment(index, num_ranks, port, words)
                # In a session of its own, or a terminal's Ctrl-C would reach it twice.
                process = subprocess.Popen(
                    command, env=environment, stdout=stdout, start_new_session=True
                )
                ranks.append(_Rank(process, words))
            try:
                _wait(ranks)
            finally:
                # After an error of this process itself; otherwise all have ended.
                for rank in ranks:
                    if rank.process.poll() is None:
                        rank.process.kill()
                        rank.process.wait()
        return _judge(ranks, asked)


def _free_port() -> int:
    # Another process may take it before rank 0 does; its sentence then says so.
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(rank: int, num_ranks: int, port: int, words: Path) -> dict[str, str]:
    group = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        launchers.PARENT: os.getpid(),
        launchers.ERROR_FILE: words,
    }
    environment = {**os.environ, **{name: str(value) for name, value in group.items()}}
    # A folder named internvl where the run is started, as the original's, would be imported first.
    environment["PYTHONSAFEPATH"] = "1"
    source = Path(__file__).parents[2]
    # A checkout that is not installed is found by its folder alone.
    if "site-packages" not in source.parts:
        folders = filter(None, (str(source), os.environ.get("PYTHONPATH")))
        environment["PYTHONPATH"] = os.pathsep.join(folders)
    # As torchrun does: ranks that all take every core slow each other down.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    return environment


@contextmanager
def _forwarding(ranks: Sequence[_Rank], asked: list[int]) -> Iterator[None]:
    """Context in which signals to this process go to the ranks; notes them in `asked`."""

    def forward(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        # The first asks to stop, the second to stop at once, and a hanging rank heeds neither.
        kills = asked.count(signal.SIGINT) >= _MOST_INTERRUPTS
        for rank in ranks:
            # A rank knows no SIGHUP: the end of a terminal is a reason to save as well.
            polite = signal.SIGTERM if signum == signal.SIGHUP else signum
            _send(rank, signal.SIGKILL if kills else polite)

    # `nohup` has SIGHUP ignored, and so it stays.
    caught = [signum for signum in _FORWARDED if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, forward) for signum in caught}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _send(rank: _Rank, signum: int) -> None:
    if rank.process.poll() is None:
        rank.killed |= signum == signal.SIGKILL
        rank.process.send_signal(signum)


def _wait(ranks: Sequence[_Rank]) -> None:
    """Returns once all have ended; after the first failure the others get little time."""
    failed_s: float | None = None
    terminated = False
    while any(rank.ended_s is None for rank in ranks):
        now_s = time.monotonic()
        for rank in ranks:
            if rank.ended_s is None and rank.process.poll() is not None:
                rank.ended_s = time.time()
                if rank.process.returncode and failed_s is None:
                    failed_s = now_s
        # A rank in a collective of the GPUs runs no handler of SIGTERM.
        if failed_s is not None and now_s > failed_s + _REPORT_S + _TERM_S:
            for rank in ranks:
                _send(rank, signal.SIGKILL)
        elif failed_s is not None and now_s > failed_s + _REPORT_S and not terminated:
            terminated = True
            for rank in ranks:
                _send(rank, signal.SIGTERM)
        time.sleep(_POLL_S)


def _judge(ranks: Sequence[_Rank], asked: Sequence[int]) -> Ended:
    """Returns the cause of a failure among all the ranks' ends."""
    failed = [(index, rank) for index, rank in enumerate(ranks) if rank.process.returncode]
    if not failed:
        return Ended(0)
    causes = sorted(_Cause.of(index, rank) for index, rank in failed)
    first = causes[0]
    # As a single process that Ctrl-C ends before its first step, which says nothing either.
    if asked and first.code == _INTERRUPTED:
        return Ended(first.code)
    # Killed because it did not react, which whoever asked three times knows.
    if ranks[first.rank].killed and asked.count(signal.SIGINT) >= _MOST_INTERRUPTS:
        return Ended(_INTERRUPTED)
    # What all ranks say alike, such as a wrong key of the recipe, is about none of them.
    if len(causes) == len(ranks) and {cause.sentence for cause in causes} == {first.sentence}:
        return Ended(first.code, first.sentence)
    where = f"rank {first.rank} of {counted(len(ranks), 'rank')} on {launchers.host()}"
    return Ended(first.code, f"{where}: {first.sentence}")


_INTERRUPTED = 130


@dataclass(frozen=True, order=True)
class _Cause:
    """Why a rank ended; the least of all is the one that the others follow from."""

    follows: bool
    """The end of another rank is the cause, as far as this rank can tell."""
    time_s: float
    rank: int
    code: int
    sentence: str

    @classmethod
    def of(cls, index: int, rank: _Rank) -> "_Cause":
        code, words = rank.process.returncode, _read(rank.words)
        assert rank.ended_s is not None
        if words is not None:
            time_s, follows = float(words["time_s"]), bool(words["lost_peer"])
            return cls(follows, time_s, index, code, words["message"])
        if code > 0:
            sentence = f"ended with exit code {code}; what it wrote before tells why"
            return cls(False, rank.ended_s, index, code, sentence)
        # Both came from here, after another rank had failed.
        follows = code == -signal.SIGTERM or rank.killed
        name = signal.Signals(-code).name
        sentence = f"was killed by signal {-code} ({name}); {_MEANINGS.get(-code, _CRASH)}"
        return cls(follows, rank.ended_s, index, 128 - code, sentence)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        words: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return words
