"""What a launcher tells each rank through its environment, and what a rank tells its launcher.

Imports no torch: a rank follows its launcher from the first second on.
"""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from internvl.errors import UserError

PARENT = "INTERNVL_LAUNCHER"
"""Variable with the process id of `internvl train`, in the ranks that it starts."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable with the file for a rank's last words; torchrun sets it too, and prints them."""
_POLL_S = 0.5
_TIME_TO_SAVE_S = 60.0


@dataclass(frozen=True)
class Membership:
    """A process's place among the ranks of a run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among those on this machine, and so the index of its GPU."""
    address: str
    """Host of rank 0."""
    port: int
    launcher: str

    def variables(self) -> dict[str, str]:
        """Returns torchrun's variables for this rank."""
        values = (self.rank, self.world_size, self.local_rank, self.address, self.port)
        return dict(zip(_TORCHRUN, map(str, values), strict=True))


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_DEFAULT_PORT = 29500  # torchrun's
BATCH_FILE, BATCH_LOG = "launch.sbatch", "slurm-%j.out"
"""Files that `internvl launch` puts into a run folder before the run begins."""
TORCHRUN_FOLDER = "torchrun"
"""Folder there, in which torchrun keeps what ended its ranks."""
FIRST_PORT, NUM_PORTS = 12_000, 20_000  # below those that systems give to clients


def joined(environment: Mapping[str, str] = os.environ) -> Membership | None:
    """Returns this process's place among several ranks; None if it was started alone.

    Raises:
        UserError: half of a launcher's variables are missing.
    """
    # In this order: torchrun's variables are also set in what it starts inside a Slurm job.
    for launcher in (_of_torchrun, _of_slurm, _of_mpi):
        membership = launcher(environment)
        if membership is not None:
            return membership
    return None


def _of_torchrun(environment: Mapping[str, str]) -> Membership | None:
    """Reads the variables of torchrun, `internvl train` and everything that speaks as they do."""
    present = [name for name in _TORCHRUN if name in environment]
    if not {"RANK", "WORLD_SIZE"} & set(present):
        return None
    missing = [name for name in _TORCHRUN if name not in environment]
    if missing:
        raise UserError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}: "
            "start several processes with torchrun, or unset them for a single one"
        )
    rank, size, local_rank, address, port = (environment[name] for name in _TORCHRUN)
    launcher = "internvl" if PARENT in environment else "torchrun"
    return Membership(int(rank), int(size), int(local_rank), address, int(port), launcher)


def _of_slurm(environment: Mapping[str, str]) -> Membership | None:
    """Reads the variables of a task of `srun`, one of several."""
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, but is no task: it has no step.
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    size = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    if size == 1:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    # Two steps of a job may run side by side, and must not meet.
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment["SLURM_STEP_ID"])
    return Membership(
        rank=int(environment["SLURM_PROCID"]),
        world_size=size,
        local_rank=int(environment.get("SLURM_LOCALID", "0")),
        address=environment.get("MASTER_ADDR", first_host(nodes)),
        port=int(environment.get("MASTER_PORT", port_of(7 * job + step))),
        launcher="Slurm",
    )


_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
"""Variables with rank, size and local rank: Open MPI's, then MPICH's and Intel MPI's."""
_MPI_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def _of_mpi(environment: Mapping[str, str]) -> Membership | None:
    """Reads the variables of a process that `mpirun` has started, one of several."""
    for names in _MPI:
        if not all(name in environment for name in names):
            continue
        rank, size, local_rank = (int(environment[name]) for name in names)
        if size == 1:
            return None
        local_sizes = [environment[name] for name in _MPI_LOCAL_SIZES if name in environment]
        # MPI does not tell a host; on a single machine the one daemon that started all names both.
        if "MASTER_ADDR" not in environment and local_sizes != [str(size)]:
            raise UserError(
                "mpirun does not tell the ranks where rank 0 is: "
                "add -x MASTER_ADDR=HOST -x MASTER_PORT=29500, with the first host of the job"
            )
        address = environment.get("MASTER_ADDR", "localhost")
        default = port_of(os.getppid()) if address == "localhost" else _DEFAULT_PORT
        port = int(environment.get("MASTER_PORT", default))
        return Membership(rank, size, local_rank, address, port, "MPI")
    return None


def first_host(nodes: str) -> str:
    """Returns the first host of a Slurm list, such as node007 of "node[007-009,012],gpu3"."""
    match = re.match(r"(?P<start>[^,\[]*)(?:\[(?P<index>\d+)[^\]]*\](?P<end>[^,\[]*))?", nodes)
    assert match is not None
    return "".join(match[name] or "" for name in ("start", "index", "end")) or "localhost"


def is_of_launch(name: str) -> bool:
    """True for a file in a run folder that a launcher has put there, not the run."""
    start, end = BATCH_LOG.split("%j")
    return name in (BATCH_FILE, TORCHRUN_FOLDER) or (name.startswith(start) and name.endswith(end))


def port_of(job: int) -> int:
    """Returns the port at which the ranks of a job meet."""
    return FIRST_PORT + job % NUM_PORTS


def rank() -> int:
    """Returns this process's rank as far as the environment tells it, else 0."""
    # Half an environment is refused where it matters, and not by a verb that joins nothing.
    with suppress(UserError, ValueError):
        membership = joined()
        return 0 if membership is None else membership.rank
    return 0


def describe_rank() -> str:
    """Returns rank and host as the start of a sentence, "" on rank 0 and for a single process."""
    return f"rank {rank()} on {host()}: " if rank() else ""


def has_parent() -> bool:
    """True in a rank that `internvl train` has started; not in what such a rank starts itself."""
    return os.environ.get(PARENT) == str(os.getppid())


def report(sentence: str, code: int, *, lost_peer: bool = False) -> None:
    """Leaves the sentence that ends this rank to its launcher, if there is one that reads it.

    Args:
        code: exit code.
        lost_peer: another rank's end is the cause.
    """
    file = os.environ.get(ERROR_FILE)
    if not file:
        return
    now_s = time.time()
    # torchrun reads the first two.
    words = {"message": sentence, "timestamp": int(now_s), "time_s": now_s}
    words |= {"code": code, "lost_peer": lost_peer}
    # On a full disk the sentence still stands on standard error.
    with suppress(OSError):
        Path(file).write_text(json.dumps(words), encoding="utf-8")


def host() -> str:
    """Returns this machine's name."""
    return socket.gethostname()


def follow_parent() -> None:
    """Watches the launcher from a thread: when it dies, this rank is asked to stop, then ended.

    Only for ranks of `internvl train` and torchrun, which nothing else would end.
    """
    if PARENT in os.environ:
        parent = int(os.environ[PARENT])
        # A command that a rank has started follows that rank alone.
        if not has_parent() and _is_running(parent):
            return
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
    else:
        return
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    threading.Thread(target=_follow, args=(parent,), name=_THREAD, daemon=True).start()


_THREAD = "internvl-launcher"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    # As a scheduler would: a run in its steps saves, anything else ends here.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TIME_TO_SAVE_S)
    os._exit(1)
