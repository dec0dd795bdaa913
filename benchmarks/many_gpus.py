"""Rates, saves and resumes on several GPUs of a machine, beside the same GPUs each for itself.

    python benchmarks/many_gpus.py                       # two GPUs: LoRA and full, 4 minutes
    python benchmarks/many_gpus.py 2b_coco --ranks 8
    python benchmarks/many_gpus.py --tiny                # two processes on a CPU, in seconds

Rows are those of train.py, with `--batch` samples a GPU and step. The ranks train together; they
save while they go on training, and load what they saved; then they leave their group, and each
trains alone with the model and the compiled code that it has. A share is the rate together over
the sum of the rates alone, which are measured at the same time.

    stall_s     how long training stands still for a checkpoint; the first one pins host memory
    written_s   until the checkpoint is complete, while training goes on
    resume_s    reading the checkpoint into model and optimizer, without start and compilation
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import train as rates
from rows import commit, rounded

from internvl import dist, train
from internvl.training import checkpoint
from internvl.training.run import building, saving

WARMUP, MEASURED = 1, 4
"""Steps before the clock runs, and those that are timed."""
ROWS = ("2b_coco", "2b_full")


def together(name: str, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains a row on all ranks, then on each alone; yields its figures as far as they are known,
    on rank 0."""
    row, ranks = rates.named(name), dist.world_size()
    num_saves = 2 if row.rank else 1  # full: many GiB, and the host pins them only once
    options.batch = options.samples * ranks
    options.steps = MEASURED + num_saves + 1
    device = torch.device("cpu" if options.tiny else f"cuda:{os.environ['LOCAL_RANK']}")
    torch.manual_seed(0)  # every rank draws the same weights
    data = folder / f"data{dist.rank()}"
    data.mkdir()
    state = rates.build(row, data, device, options, folder / "run")
    figures: dict[str, Any] = {"row": name, "ranks": ranks, "samples_a_gpu": options.samples}
    with state.saver:
        steps = train.updates(state)
        metrics = [next(steps) for _ in range(WARMUP + MEASURED)]
        rate = statistics.median(row["samples_per_s"] for row in metrics[WARMUP:])
        figures |= {
            "samples_per_s": rate,
            "step_s": statistics.median(row["step_s"] for row in metrics[WARMUP:]),
            "first_step_s": state.warmup_s + metrics[0]["step_s"],
            "loss": [row["loss"] for row in metrics],
            "peak_gib": metrics[-1]["memory_gib"],
        }
        yield figures
        saves = [saved(state, steps) for _ in range(num_saves)]
        figures |= {"saves": saves, "resume_s": resumed(state)}
        yield figures
        steps.close()
    # The same model, so that nothing is compiled again.
    alone = leave(state, folder, options)
    steps = train.updates(alone)
    metrics = [next(steps) for _ in range(WARMUP + MEASURED)]
    steps.close()
    rate_alone = statistics.median(row["samples_per_s"] for row in metrics[WARMUP:])
    (folder / f"alone{os.environ['LOCAL_RANK']}.json").write_text(str(rate_alone))
    files = [folder / f"alone{rank}.json" for rank in range(ranks)]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.1)
    rates_alone = [float(file.read_text()) for file in files]
    figures |= {"alone_samples_per_s": rates_alone, "share": rate / sum(rates_alone)}
    yield figures


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


def leave(state: train.TrainState, folder: Path, options: argparse.Namespace) -> train.TrainState:
    """Leaves the ranks' group; the same run for this process alone, in a group of its own."""
    rank = dist.rank()
    dist.barrier()
    dist.shutdown()
    group = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in group.items()})
    recipe = replace(
        state.recipe, global_batch=options.samples, run=folder / f"alone{rank}", device="auto"
    )
    if options.tiny:
        recipe = replace(recipe, device="cpu")
    dist.init_from_env(recipe.device)
    saver = checkpoint.Saver(state.device)
    return building.assemble(recipe, state.chat, state.device, state.order, saver)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_main(options: argparse.Namespace) -> None:
    """What a rank does: one row after the other would need its group again, so one row."""
    (name,) = options.rows
    dist.init_from_env("cpu" if options.tiny else "cuda")
    for figures in together(name, options.folder, options):
        if os.environ["LOCAL_RANK"] == "0":
            hardware = "CPU" if options.tiny else torch.cuda.get_device_name()
            versions = {"hardware": f"{figures['ranks']} x {hardware}", "torch": torch.__version__}
            line = rounded(figures) | versions | {"commit": commit()}
            print(json.dumps(line), flush=True)
    dist.shutdown()


def run(name: str, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Starts the ranks of a row; returns the last figures that they printed."""
    words = [sys.executable, "-W", "ignore", __file__, name, "--rank-of"]
    with tempfile.TemporaryDirectory() as folder:
        words += [folder, "--samples", str(options.samples), "--workers", str(options.workers)]
        words += ["--tiny"] if options.tiny else []
        group = {
            "WORLD_SIZE": options.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        processes = []
        for rank in range(options.ranks):
            own = {**group, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": options.ranks}
            environment = os.environ | {key: str(value) for key, value in own.items()}
            output = subprocess.PIPE if rank == 0 else None
            processes.append(subprocess.Popen(words, env=environment, stdout=output, text=True))
        ends = time.monotonic() + limit_s
        figures: dict[str, Any] = {"row": name, "failed": "nothing was measured"}
        problem = ""
        try:
            while any(process.poll() is None for process in processes) and not problem:
                time.sleep(0.2)
                if any(process.poll() for process in processes):
                    problem = "a rank failed"
                elif time.monotonic() > ends:
                    problem = f"not done after {limit_s:.0f} s"
        finally:
            for process in processes:
                process.kill()
        lines = processes[0].stdout.read().splitlines()
        if lines:
            figures = json.loads(lines[-1])
        return figures | ({"failed": problem} if problem else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help="as of train.py")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, one process on each")
    parser.add_argument("--samples", type=int, default=64, help="of a step, on each GPU")
    parser.add_argument("--workers", type=int, default=12, help="of the loader, on each GPU")
    parser.add_argument("--to", type=Path, help="file for the JSON of all rows")
    parser.add_argument("--budget-s", type=float, default=230)
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
