"""Jobs for Slurm: the file, and a real Slurm of one machine that stops a job and takes it back."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny_run
from command_line import call
from tiny_run import losses

from internvl import train
from internvl.config import recipes
from internvl.launch import launchers, slurm
from internvl.launch.slurm import Job

TRAINING = f"""\
#!/bin/bash
#SBATCH --job-name=internvl
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --partition=gpu
#SBATCH --time=8:00:00
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --chdir=/data/project
#SBATCH --output="/data/my run/slurm-%j.out"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --account=mine

# Seconds that a rank has to save once it is asked to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
# A new store for each start: in an old one ranks find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A folder named internvl where the job starts, as the original's, is not imported.
export PYTHONSAFEPATH=1
# The ranks meet at the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((12000 + SLURM_JOB_ID % 20000))
module load cuda

run='/data/my run'
newest() {{ ls "$run/checkpoints" 2>/dev/null | grep -E '^[0-9]+$' | tail -n 1; }}
end() {{ cat "$run/finished.json" 2>/dev/null; }}
before=$(newest) ended=$(end)
srun --kill-on-bad-exit=0 --wait=30 --cpu-bind=none --cpus-per-task=64 --label \\
  {sys.executable} -m torch.distributed.run \\
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=8 \\
  --max-restarts=3 --log-dir="$run/torchrun" \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$port" \\
  -m internvl train mine.yaml 'run=/data/my run'
code=$?
# An exit code tells little: a run that was stopped in order has none of its own here.
# An end from before this job is not its own: the run may be to go on for longer.
[ -n "$(end)" ] && {{ [ "$code" = 0 ] || [ "$(end)" != "$ended" ]; }} && exit 0
if [ "$(newest)" != "$before" ]; then
  echo "not finished: back to the queue, to go on from checkpoint $(newest)"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
# No step further than before: it would fail again.
exit $((code ? code : 1))
"""


def test_the_file_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda *_: Path("/data/project"))
    run = Path("/data/my run")
    job = Job(
        words=["train", "mine.yaml", f"run={run}"],
        nodes=4,
        per_node=8,
        run=run,
        log=run / launchers.BATCH_LOG,
        partition="gpu",
        time="8:00:00",
        cpus_per_node=64,
        sbatch_args=["--account=mine"],
        srun_args=["--label"],
        setup=["module load cuda"],
    )
    assert slurm.render(job) == TRAINING


def test_the_guide_shows_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "cwd", lambda *_: Path("/data/project"))
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")
    run = Path("runs/mine")
    job = Job(
        words=["train", "mine.yaml", "optim.lr=1e-5"],
        nodes=4,
        per_node=8,
        run=run,
        name="internvl-mine",
        log=run / launchers.BATCH_LOG,
        partition="gpu",
        time="8:00:00",
    )
    guide = Path(__file__).parents[2] / "docs" / "many-gpus.md"
    assert f"```bash\n{slurm.render(job)}```" in guide.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("does", "code", "said"),
    [
        ("exit 7", 7, ""),  # a node that failed, before the run was made longer
        ("exit 0", 0, ""),
        ("echo later > finished.json; exit 1", 0, ""),
        ("rm finished.json; mkdir checkpoints/000020; exit 0", 0, "requeue 5"),
        ("rm finished.json; exit 0", 1, ""),
    ],
)
def test_an_end_from_before_is_not_the_job_s_own(
    tmp_path: Path, does: str, code: int, said: str
) -> None:
    """A run of 10 steps that had ended is to go on; `does` is what happens to it."""
    run = tmp_path / "my run"
    (run / "checkpoints" / "000010").mkdir(parents=True)
    (run / "finished.json").write_text("sooner\n")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", f'cd "{run}"; {does}'), ("scontrol", 'echo "$@"')):
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    job = Job(words=["train", str(run), "steps=20"], nodes=1, per_node=2, run=run)
    slurm.write(job, tmp_path / "job.sbatch")
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(
        ["bash", tmp_path / "job.sbatch"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code
    assert said in done.stdout


def test_names_with_spaces_are_a_word_to_slurm() -> None:
    job = Job(
        words=["evaluate", "model"],
        nodes=1,
        per_node=1,
        name="my job",
        sbatch_args=["--comment=hello world", "--qos=low"],
    )
    lines = slurm.render(job).splitlines()
    expected = {'--job-name="my job"', '--comment="hello world"', "--qos=low"}
    assert {f"#SBATCH {option}" for option in expected} <= {*lines}


def test_an_evaluation_does_not_go_back_to_the_queue() -> None:
    job = Job(words=["evaluate", "model", "mmbench"], nodes=1, per_node=2, on_gpus=False)
    text = slurm.render(job)
    assert text.endswith("  -m internvl evaluate model mmbench\n")
    assert "requeue" not in text.partition("\n\n")[2]
    assert "--gpus-per-node" not in text
    assert "#SBATCH --exclusive\n" in text


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def test_launch_writes_the_file_into_the_run_which_may_begin(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [project, f"run={tmp_path / 'run'}", "--nodes", 2, "--processes-per-node", 2, "steps=1"]
    code, out, err = call(capsys, "launch", *words, "--dry-run")
    assert (code, err) == (0, "")
    assert not (tmp_path / "run").exists()
    code, said, err = call(capsys, "launch", *words)
    file = tmp_path / "run" / launchers.BATCH_FILE
    assert (code, said, err) == (0, f"Written: {file}. To submit it:\n  sbatch {file}\n", "")
    assert file.read_text() == out
    (tmp_path / "run" / "slurm-7.out").write_text("starting")
    train.run(recipes.load_recipe(project, [f"run={tmp_path / 'run'}", "steps=1"]))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gone.yaml", "--gpus-per-node", 8], "there is no recipe gone.yaml"),
        (["{recipe}", "optim.lr=x", "--gpus-per-node", 8], "optim.lr"),
        (["{recipe}", "model.id=./gone", "--gpus-per-node", 8], "./gone: no such folder"),
        (["{recipe}"], "--gpus-per-node N, or --processes-per-node N without GPUs: give one"),
        (["{recipe}", "--gpus-per-node", 0], "--gpus-per-node: at least 1, not 0"),
        (["{recipe}", "--gpus-per-node", 8, "--gpus", 8], "give --gpus-per-node instead"),
        (
            ["{recipe}", "parallel={{shard: zero3, replicas: 3}}", "--gpus-per-node", 8],
            "parallel.replicas: 16 processes do not divide into 3 copies",
        ),
        (["evaluate", "./gone", "--gpus-per-node", 8], "./gone: no such folder"),
        (["{recipe}", "--gpus-per-node", 8], "--gpus-per-node: the device is cpu"),
        (["{recipe}", "device=cuda", "--processes-per-node", 8], "and the device is cuda"),
        (["{recipe}", "run=/etc", "--processes-per-node", 8], "/etc is not empty and no run"),
        (
            ["{recipe}", "--nodes", 1, "--processes-per-node", 1]
            + ["parallel={{shard: zero3, offload: cpu}}"],
            "parallel.offload: cpu is for several processes",
        ),
        (
            ["{recipe}", "--processes-per-node", 8, "--sbatch-args=--comment='x"],
            "--sbatch-args: a quote is not closed in --comment='x",
        ),
    ],
    ids=lambda value: str(value[:2]) if isinstance(value, list) else "",
)
def test_what_the_job_would_refuse_is_refused_at_once(
    project: Path,
    words: list[object],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [str(word).format(recipe=project) for word in words]
    code, out, err = call(capsys, "launch", "--nodes", 2, *filled, "--submit")
    assert code != 0
    assert out == ""
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=patient Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def eventually(condition: Callable[[], bool], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapping[str, str]]:
    """The environment in which Slurm's commands speak with a Slurm of this machine alone."""
    missing = [name for name in ("munged", "slurmctld", "slurmd") if shutil.which(name) is None]
    if missing or os.getuid():
        pytest.skip("needs root and Debian's slurmctld, slurmd, slurm-client and munge")
    # Sockets have short paths.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name, ExitStack() as stack:
        folder = Path(name)
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for made in ("state", "spool"):
            (folder / made).mkdir()
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(
            host=host, folder=folder, ports=free_ports(2), cpus=len(os.sched_getaffinity(0))
        )
        (folder / "slurm.conf").write_text(text)
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        environment = {**clean, "SLURM_CONF": str(folder / "slurm.conf")}
        socket_file = folder / "munge"
        munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
        munged += [f"--socket={socket_file}", f"--pid-file={folder}/munged.pid"]
        munged += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            service = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(service.wait)
            stack.callback(service.terminate)
            if command is munged:
                eventually(socket_file.exists, 10)

        def is_idle() -> bool:
            asked = ["sinfo", "--noheader", "--format=%T"]
            done = subprocess.run(
                asked, env=environment, capture_output=True, text=True, check=False
            )
            return set(done.stdout.split()) == {"idle"}

        eventually(is_idle, 30)
        stack.callback(subprocess.run, ["scancel", "--user=root"], env=environment, check=False)
        yield environment


def run(words: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


JOINED = """
from internvl import dist
dist.init_from_env("cpu")
print(dist.rank(), dist.world_size(), dist.sum_counts({"ranks": 1.0})["ranks"])
dist.shutdown()
"""


@pytest.mark.slow
def test_tasks_of_srun_are_ranks(cluster: Mapping[str, str]) -> None:
    written = run(["srun", "--ntasks=2", "--overcommit", sys.executable, "-c", JOINED], cluster)
    assert sorted(written.splitlines()) == ["0 2 2.0", "1 2 2.0"]


@pytest.mark.slow
def test_a_preempted_job_saves_goes_back_and_finishes(
    cluster: Mapping[str, str], project: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [str(project), f"run={folder}", "steps=60", "checkpoint.every=50", "data.workers=1"]
    command = [sys.executable, "-m", "internvl", "launch", *words]
    options = ["--nodes", "1", "--processes-per-node", "2", "--submit"]
    submitted = run([*command, *options], cluster)
    match = re.search(r"its output will be in .*slurm-(\d+)\.out", submitted)
    assert match
    job = match[1]

    def shown() -> str:
        return run(["scontrol", "show", "job", job], cluster)

    def reached(step: int) -> bool:
        return folder.exists() and max(losses(folder), default=0) >= step

    eventually(lambda: reached(3))
    run(
        ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true"],
        cluster,
    )
    eventually(lambda: "Restarts=1" in shown())
    (stopped,) = {int(file.name) for file in (folder / "checkpoints").iterdir() if file.is_dir()}
    assert 3 <= stopped < 50
    # Slurm lets a requeued job wait for two minutes, and refuses it within the very second.
    time.sleep(2)
    run(["scontrol", "update", f"jobid={job}", "StartTime=now"], cluster)
    eventually((folder / "finished.json").exists)
    eventually(lambda: "JobState=COMPLETED" in shown())
    assert list(losses(folder)) == list(range(1, 61))
    output = (folder / f"slurm-{job}.out").read_text()
    assert f"back to the queue, to go on from checkpoint {stopped:06d}" in output
    assert f"from step {stopped};" in output
