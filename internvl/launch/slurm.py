"""A Slurm job that trains or evaluates on several nodes: one readable sbatch file.

One task a node runs torchrun, which starts a rank a GPU and starts all ranks anew if one dies. What
comes after, back to the queue or not, is read from the run folder: exit codes do not tell.
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl.errors import UserError
from internvl.files import write_text
from internvl.launch import launchers

WARNING_S = 300
"""Seconds before the end of its time at which Slurm asks the job to stop."""
_SAVE_S = 240
"""Seconds that torchrun gives ranks to save; what is left of `WARNING_S` ends the job."""
_RESTARTS = 3
_NEIGHBOUR_S = 30
"""Seconds that tasks of other nodes go on after the first has ended, to finish a save."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run where."""

    words: Sequence[str]
    """Words of the command line after `internvl`."""
    nodes: int
    per_node: int
    """Ranks on a node, one a GPU."""
    on_gpus: bool = True
    run: Path | None = None
    """Run folder of a training, which goes on until it is finished."""
    name: str = "internvl"
    log: Path = Path(launchers.BATCH_LOG)
    """Slurm's output; %j is the id of the job."""
    partition: str | None = None
    time: str | None = None
    cpus_per_node: int | None = None
    sbatch_args: Sequence[str] = ()
    srun_args: Sequence[str] = ()
    setup: Sequence[str] = ()
    """Lines of shell that make the environment, such as `module load cuda`."""


def render(job: Job) -> str:
    """Returns the sbatch file."""
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {_quoted(option)}" for option in _options(job)),
        "",
        "# Seconds that a rank has to save once it is asked to stop.",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={_SAVE_S}",
        "# A new store for each start: in an old one ranks find the addresses of dead ones.",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        "# A folder named internvl where the job starts, as the original's, is not imported.",
        "export PYTHONSAFEPATH=1",
        "# The ranks meet at the first node.",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"port=$(({launchers.FIRST_PORT} + SLURM_JOB_ID % {launchers.NUM_PORTS}))",
        *job.setup,
        "",
    ]
    # A line each, for whoever reads or changes the file.
    start = [*_srun(job), *_torchrun(job), f"-m internvl {shlex.join(job.words)}"]
    command = " \\\n  ".join(start)
    if job.run is None:
        return "\n".join([*lines, command, ""])
    run = shlex.quote(str(job.run.absolute()))
    lines += [
        f"run={run}",
        "newest() { ls \"$run/checkpoints\" 2>/dev/null | grep -E '^[0-9]+$' | tail -n 1; }",
        'end() { cat "$run/finished.json" 2>/dev/null; }',
        "before=$(newest) ended=$(end)",
        command,
        "code=$?",
        "# An exit code tells little: a run that was stopped in order has none of its own here.",
        "# An end from before this job is not its own: the run may be to go on for longer.",
        '[ -n "$(end)" ] && { [ "$code" = 0 ] || [ "$(end)" != "$ended" ]; } && exit 0',
        'if [ "$(newest)" != "$before" ]; then',
        '  echo "not finished: back to the queue, to go on from checkpoint $(newest)"',
        '  exec scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "# No step further than before: it would fail again.",
        "exit $((code ? code : 1))",
    ]
    return "\n".join([*lines, ""])


def _options(job: Job) -> list[str]:
    # Without a count of cores whole nodes: a job's default is a single core for all of its ranks.
    optional = {
        "partition": job.partition,
        "time": job.time,
        "cpus-per-task": job.cpus_per_node,
        "gpus-per-node": job.per_node if job.on_gpus else None,
    }
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *(f"--{name}={value}" for name, value in optional.items() if value is not None),
        *([] if job.cpus_per_node is not None else ["--exclusive"]),
        f"--chdir={Path.cwd()}",
        f"--output={job.log.absolute()}",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{WARNING_S}",
        *job.sbatch_args,
    ]


def _quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if " " in value else option


def _srun(job: Job) -> list[str]:
    # Not --kill-on-bad-exit=1: torchrun exits with 1 after a signal too, and the first node to end
    # would cut short what the others save.
    options = ["--kill-on-bad-exit=0", f"--wait={_NEIGHBOUR_S}", "--cpu-bind=none"]
    # srun does not take this over from the job.
    if job.cpus_per_node is not None:
        options.append(f"--cpus-per-task={job.cpus_per_node}")
    return [shlex.join(["srun", *options, *job.srun_args])]


def _torchrun(job: Job) -> list[str]:
    # This Python, wherever the job's shell would look; the nodes share its folder.
    python = shlex.quote(sys.executable)
    return [
        f"{python} -m torch.distributed.run",
        f'--nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={job.per_node}',
        # With a log folder torchrun reads, and shows, the sentence that ended a rank.
        f"--max-restarts={_RESTARTS}"
        + ("" if job.run is None else f' --log-dir="$run/{launchers.TORCHRUN_FOLDER}"'),
        '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$port"',
    ]


def write(job: Job, file: Path) -> None:
    """Writes the sbatch file, and the folder of the job's output, which Slurm does not make."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, render(job))


def submit(file: Path) -> str:
    """Hands an sbatch file to Slurm; returns the id of the job.

    Raises:
        UserError: Slurm is not here, or refuses it.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"there is no sbatch on this machine; run `sbatch {file}` where Slurm's commands are"
        )
    command = ["sbatch", "--parsable", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refuses {file}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]
