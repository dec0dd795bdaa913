"""Real processes as ranks: what they are told, and that none outlives a failure or its parent."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvl.errors import ConfigError
from internvl.launch import launchers, local
from internvl.launch.launchers import Membership
from internvl.launch.local import Ended

HOST = socket.gethostname()
# Torch-free ranks start at once; they wait as ranks in a collective do.
RANK = """
import os, signal, sys, time
from internvl.launch import launchers

rank, folder = int(os.environ["RANK"]), {folder!r}
launchers.follow_parent()
def note(name):
    open(f"{{folder}}/{{name}}-{{rank}}", "w").write(str(os.getpid()))
def wait():
    note("waits")
    time.sleep(60)
{code}
"""


def ranks_of(code: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", RANK.format(folder=str(folder), code=code)]


def wait_for(*files: Path) -> list[int]:
    """The process ids in files, once they are written."""
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def is_alive(pid: int) -> bool:
    try:
        # A zombie has ended; only its parent has not asked yet.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_each_rank_has_the_environment_that_torchrun_gives(tmp_path: Path) -> None:
    names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    code = f"note('-'.join(os.environ[name] for name in {names}))"
    assert local.run(ranks_of(code, tmp_path), 3) == Ended(0)
    written = sorted(file.name for file in tmp_path.iterdir())
    assert written == [f"{rank}-3-3-localhost-{rank}" for rank in range(3)]


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    code = "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else wait()"
    ended = local.run(ranks_of(code, tmp_path), 2)
    assert ended.code == 128 + signal.SIGKILL
    assert ended.sentence == (
        f"rank 1 of 2 ranks on {HOST}: was killed by signal 9 (SIGKILL); most likely the "
        "machine's memory ran out, or somebody killed it"
    )


def test_the_cause_is_told_not_what_followed_from_it(tmp_path: Path) -> None:
    code = """
if rank == 0:
    launchers.report("another process ended", 1, lost_peer=True)
    sys.exit(1)
time.sleep(0.2)
launchers.report("the disk is full", 1)
sys.exit(1)
"""
    ended = local.run(ranks_of(code, tmp_path), 2)
    assert ended == Ended(1, f"rank 1 of 2 ranks on {HOST}: the disk is full")


def test_ranks_that_had_to_be_killed_are_no_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_REPORT_S", 0.2)
    monkeypatch.setattr(local, "_TERM_S", 0.3)
    code = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note("hangs")
    wait()
while not os.path.exists(folder + "/hangs-0"):
    time.sleep(0.01)
launchers.report("nothing is heard of rank 0", 1, lost_peer=True)
sys.exit(1)
"""
    ended = local.run(ranks_of(code, tmp_path), 2)
    assert ended == Ended(1, f"rank 1 of 2 ranks on {HOST}: nothing is heard of rank 0")


def test_what_all_ranks_say_is_said_once(tmp_path: Path) -> None:
    code = "launchers.report('no such model', 2); sys.exit(2)"
    assert local.run(ranks_of(code, tmp_path), 2) == Ended(2, "no such model")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_go_on_to_the_ranks_which_end_in_order(tmp_path: Path, signum: int) -> None:
    code = """
def save(*rest):
    note("saved")
    sys.exit()
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
wait()
"""
    parent = subprocess.Popen(launcher(ranks_of(code, tmp_path)))
    wait_for(*(tmp_path / f"waits-{rank}" for rank in range(2)))
    parent.send_signal(signum)
    assert parent.wait() == 0
    assert all((tmp_path / f"saved-{rank}").exists() for rank in range(2))


def test_ctrl_c_three_times_kills_ranks_that_do_not_react(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwait()"
    parent = subprocess.Popen(launcher(ranks_of(code, tmp_path)))
    pids = wait_for(*(tmp_path / f"waits-{rank}" for rank in range(2)))
    for _ in range(3):
        parent.send_signal(signal.SIGINT)
        time.sleep(0.2)  # two at once would be one
    # Not 137, as after a kill that nobody asked for.
    assert parent.wait() == 130
    assert not any(map(is_alive, pids))


def launcher(command: list[str]) -> list[str]:
    # A background job has them ignored, and so would its launcher.
    code = "import signal, sys; from internvl.launch import local\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    code += f"sys.exit(local.run({command}, 2).code)"
    return [sys.executable, "-c", code]


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(launcher(ranks_of("wait()", tmp_path)))
    pids = wait_for(*(tmp_path / f"waits-{rank}" for rank in range(2)))
    assert all(map(is_alive, pids))
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_verbs_run_with_this_python() -> None:
    command = [*local.verb("--version")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.startswith("internvl ")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*Membership(0, 1, 0, "", 0, "").variables(), launchers.PARENT):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("gpus", "processes", "device", "available", "count"),
    [
        (None, None, "auto", 0, 1),
        (None, None, "auto", 1, 1),
        (None, None, "auto", 8, 8),
        (None, None, None, 8, 8),
        (None, None, "cpu", 8, 1),
        (None, None, "cuda:1", 8, 1),
        (4, None, "auto", 8, 4),
        (1, None, "cuda", 8, 1),
        (None, 2, "auto", 0, 2),
        (None, 2, "cpu", 8, 2),
    ],
)
def test_all_gpus_of_a_machine_are_used_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int | None,
    processes: int | None,
    device: str | None,
    available: int,
    count: int,
) -> None:
    monkeypatch.setattr(local, "count_gpus", lambda: available)
    assert local.choose_ranks(gpus, processes, device) == count


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("gpus", "processes", "device", "sentence"),
    [
        (9, None, "auto", "--gpus 9: this machine has 8 GPUs"),
        (0, None, "auto", "--gpus: at least 1, not 0"),
        (2, 2, "auto", "--gpus and --processes: give one of them"),
        (2, None, "cpu", "--gpus: the device is cpu; use --processes N"),
        (None, 2, "auto", "--processes: ranks on the CPU, which needs device=cpu"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int | None,
    processes: int | None,
    device: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(local, "count_gpus", lambda: 8)
    with pytest.raises(ConfigError, match=sentence):
        local.choose_ranks(gpus, processes, device)


@pytest.mark.usefixtures("alone")
def test_a_rank_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Membership(1, 8, 1, "node1", 29500, "").variables().items():
        monkeypatch.setenv(name, value)
    assert local.choose_ranks(None, None, "auto") == 1
    with pytest.raises(ConfigError, match="--gpus 4: this process is one of 8 that torchrun"):
        local.choose_ranks(4, None, "auto")
    # The command line of its launcher, which is run once more, has the option.
    monkeypatch.setenv(launchers.PARENT, str(os.getppid()))
    assert local.choose_ranks(4, None, "auto") == 1
