"""Rates, saves and resumes on several GPUs of a machine, beside the same GPUs each for itself.

    python benchmarks/many_gpus.py                       # two GPUs: LoRA and full, 5 minutes
    python benchmarks/many_gpus.py 2b_coco --ranks 8
    python benchmarks/many_gpus.py --tiny                # two processes on a CPU, in seconds

Rows are those of train.py, with `--samples` a GPU and step. Each rank trains alone, all at the same
time; then they train together with the model and the compiled code that they have. A share is the
rate together over the sum of the rates alone. They save while they go on training, and load what
they saved.

    stall_s     how long training stands still for a checkpoint; the first one pins host memory
    written_s   until the checkpoint is complete, while training goes on
    resume_s    reading the checkpoint into model and optimizer, without start and compilation
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import train as rates
from rows import commit, rounded

from internvl import dist, train
from internvl.training import checkpoint
from internvl.training.run import building, saving

WARMUP, MEASURED, SAVES = 1, 3, 2
"""Steps before the clock runs and those that are timed; checkpoints."""
ROWS = ("2b_coco", "2b_full")


def figures_of(name: str, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains a row on each rank alone, then on all; yields its figures as far as they are known."""
    row, ranks, rank = rates.named(name), options.ranks, int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu" if options.tiny else f"cuda:{rank}")
    options.batch, options.steps = options.samples, WARMUP + MEASURED
    data = folder / f"data{rank}"
    data.mkdir()
    with group_of({"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}, device):
        torch.manual_seed(0)  # every rank draws the same weights
        alone = rates.build(row, data, device, options, folder / f"alone{rank}")
        metrics = taken(alone)
        first_step_s = alone.warmup_s + metrics[0]["step_s"]
        rates_alone = [rate_of(metrics), rate_of(metrics, "samples")]
        (folder / f"alone{rank}.json").write_text(json.dumps(rates_alone))
    figures: dict[str, Any] = {"row": name, "ranks": ranks, "samples_a_gpu": options.samples}
    figures["first_step_s"] = first_step_s
    # Told at once: a row that is cut off says how far it came.
    yield figures
    with group_of({}, device):
        state = joined(alone, folder, options)
        with state.saver:
            steps = train.updates(state)
            metrics = [next(steps) for _ in range(WARMUP + MEASURED)]
            # Written before the ranks met.
            files = [folder / f"alone{other}.json" for other in range(ranks)]
            alone_of = [json.loads(file.read_text()) for file in files]
            figures |= {
                "samples_per_s": rate_of(metrics, "samples"),
                "alone_samples_per_s": [samples for _, samples in alone_of],
                # By tokens: steps of few samples differ in their length.
                "share": rate_of(metrics) / sum(tokens for tokens, _ in alone_of),
                "step_s": statistics.median(row["step_s"] for row in metrics[WARMUP:]),
                "loss": [row["loss"] for row in metrics],
                "peak_gib": metrics[-1]["memory_gib"],
            }
            yield figures
            # The first pins host memory.
            figures["saves"] = [saved(state, steps)]
            yield figures
            figures["resume_s"] = resumed(state)
            yield figures
            figures["saves"] += [saved(state, steps) for _ in range(SAVES - 1)]
            yield figures
            steps.close()


def taken(state: train.TrainState) -> list[dict[str, float]]:
    """Takes the steps before the clock runs and those that are timed; their metrics."""
    steps = train.updates(state)
    metrics = [next(steps) for _ in range(WARMUP + MEASURED)]
    steps.close()
    return metrics


def rate_of(metrics: Sequence[dict[str, float]], unit: str = "tokens") -> float:
    """Samples or tokens a second of the timed steps."""
    timed = metrics[WARMUP:]
    return sum(row[unit] for row in timed) / sum(row["step_s"] for row in timed)


@contextmanager
def group_of(variables: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Joins the group that the environment describes, changed by `variables`."""
    before = {name: os.environ[name] for name in variables}
    os.environ |= {name: str(value) for name, value in variables.items()}
    dist.init_from_env(device.type)
    try:
        yield
    finally:
        dist.shutdown()
        os.environ |= before


def joined(alone: train.TrainState, folder: Path, options: argparse.Namespace) -> train.TrainState:
    """The same run on all ranks: the same model, so that nothing is compiled again.

    Ranks have trained on the same samples alone, so their weights are equal up to rounding.
    """
    recipe = replace(
        alone.recipe,
        global_batch=options.samples * options.ranks,
        steps=WARMUP + MEASURED + SAVES + 1,
        run=folder / "run",
    )
    saver = checkpoint.Saver(alone.device)
    return building.assemble(recipe, alone.chat, alone.device, alone.order, saver)


def saved(state: train.TrainState, steps: Iterator[dict[str, float]]) -> dict[str, float]:
    """Saves a checkpoint while the next step is taken; its times and size."""
    dist.barrier()
    started = time.perf_counter()
    saving.save(state)
    stall_s = time.perf_counter() - started
    begun, step = state.step, next(steps)
    state.saver.wait()
    written_s = time.perf_counter() - started
    folder = state.folder / "checkpoints" / f"{begun:06d}"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    times = {"stall_s": stall_s, "written_s": written_s, "step_meanwhile_s": step["step_s"]}
    return times | {"gib": size / 2**30}


def resumed(state: train.TrainState) -> float:
    """Seconds in which the newest checkpoint is read into the model and a new optimizer."""
    again = building.assemble(state.recipe, state.chat, state.device, state.order, state.saver)
    dist.barrier()
    started = time.perf_counter()
    saving.resume(again)
    dist.barrier()
    seconds = time.perf_counter() - started
    assert again.step == max(checkpoint.steps(state.folder / "checkpoints"))
    return seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_main(options: argparse.Namespace) -> None:
    """What a rank does: one row after the other would need its group again, so one row."""
    (name,) = options.rows
    for figures in figures_of(name, options.folder, options):
        if os.environ["LOCAL_RANK"] == "0":
            hardware = "CPU" if options.tiny else torch.cuda.get_device_name()
            versions = {"hardware": f"{figures['ranks']} x {hardware}", "torch": torch.__version__}
            line = rounded(figures) | versions | {"commit": commit()}
            print(json.dumps(line), flush=True)


def run(name: str, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Starts the ranks of a row; returns the last figures that they printed."""
    words = [sys.executable, "-W", "ignore", __file__, name, "--ranks", str(options.ranks)]
    words += ["--samples", str(options.samples), "--workers", str(options.workers)]
    words += ["--tiny"] if options.tiny else []
    group = {"WORLD_SIZE": options.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        processes = []
        for rank in range(options.ranks):
            variables = {
                **group,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": options.ranks,
            }
            environment = os.environ | {key: str(value) for key, value in variables.items()}
            # A session of its own, so that loaders and the compiler's processes end with it.
            process = subprocess.Popen(
                [*words, "--rank-of", folder],
                env=environment,
                stdout=sys.stderr if rank else output,
                start_new_session=True,
            )
            processes.append(process)
        ends, problem = time.monotonic() + limit_s, ""
        try:
            while any(process.poll() is None for process in processes) and not problem:
                time.sleep(0.2)
                if any(process.poll() for process in processes):
                    problem = "a rank failed"
                elif time.monotonic() > ends:
                    problem = f"not done after {limit_s:.0f} s"
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = [line for line in output.read().decode().splitlines() if line.startswith("{")]
    figures = json.loads(lines[-1]) if lines else {"row": name, "failed": "nothing was measured"}
    return figures | ({"failed": problem} if problem else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help="as of train.py")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, one process on each")
    parser.add_argument("--samples", type=int, default=64, help="of a step, on each GPU")
    parser.add_argument("--workers", type=int, default=12, help="of the loader, on each GPU")
    parser.add_argument("--to", type=Path, help="file for the JSON of all rows")
    parser.add_argument("--budget-s", type=float, default=280)
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    parser.add_argument("--rank-of", type=Path, dest="folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.samples = min(options.samples, 4)
    if options.folder is not None:
        return rank_main(options)
    ends, results = time.monotonic() + options.budget_s, []
    for name in options.rows:
        started = time.monotonic()
        figures = run(name, options, ends - started)
        results.append(figures | {"wall_s": round(time.monotonic() - started, 1)})
        print(json.dumps(results[-1]), flush=True)
        if options.to is not None:
            options.to.parent.mkdir(parents=True, exist_ok=True)
            options.to.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
