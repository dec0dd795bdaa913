"""What passes between a launcher and its ranks."""

import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import ProcessFailure

from internvl.errors import UserError
from internvl.launch import launchers
from internvl.launch.launchers import Membership

SLURM = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}


def test_each_launcher_says_it_in_its_own_variables() -> None:
    assert launchers.joined({}) is None
    torchrun = Membership(5, 8, 1, "node1", 29400, "torchrun")
    assert launchers.joined(TORCHRUN) == torchrun
    assert torchrun.variables() == TORCHRUN
    slurm = Membership(9, 16, 1, "gpu07", 12000 + 7 * 41 + 2, "Slurm")
    assert launchers.joined(SLURM) == slurm
    mpi = launchers.joined(OPEN_MPI)
    assert mpi is not None
    assert (mpi.rank, mpi.world_size, mpi.local_rank, mpi.address) == (3, 4, 3, "localhost")
    elsewhere = {"MASTER_ADDR": "node1", "MASTER_PORT": "29400"}
    assert launchers.joined({**OPEN_MPI, **elsewhere}) == Membership(3, 4, 3, "node1", 29400, "MPI")
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", **elsewhere}
    assert launchers.joined(hydra) == Membership(1, 2, 0, "node1", 29400, "MPI")


def test_what_torchrun_or_train_start_inside_a_job_is_theirs() -> None:
    assert launchers.joined({**SLURM, **OPEN_MPI, **TORCHRUN}) == launchers.joined(TORCHRUN)
    inside = launchers.joined({**SLURM, **TORCHRUN, launchers.PARENT: "17"})
    assert inside is not None
    assert inside.launcher == "internvl"


@pytest.mark.parametrize(
    "environment",
    [
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"},  # a batch script
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash`
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_single_process_of_a_job_is_started_alone(environment: dict[str, str]) -> None:
    assert launchers.joined(environment) is None


def test_mpi_on_several_hosts_must_say_where_the_first_is() -> None:
    with pytest.raises(UserError, match="add -x MASTER_ADDR=HOST"):
        launchers.joined({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[007-009,012],gpu3", "node007"),
        ("rack[2,5]-gpu,x", "rack2-gpu"),
        ("", "localhost"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert launchers.first_host(nodes) == host


def test_torchrun_reads_the_sentence_that_ends_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    launchers.report("the disk is full", 1)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert failure.message == "the disk is full"
    assert failure.timestamp == pytest.approx(time.time(), abs=60)


def test_without_a_launcher_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    launchers.report("the disk is full", 1)
    assert list(tmp_path.iterdir()) == []
