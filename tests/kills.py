"""Kills the ranks of a run again and again, and compares where it ends with a run left alone.

    python tests/kills.py --kills 100 --ranks 2 --shard zero3

The model is the smallest that has every unit that is sharded, so that the processes spend their
time where kills fall: in starts, steps and checkpoints. With --cpu-minutes the script ends after
the run in which they are spent, and reports how many kills there were by then.

A kill is SIGKILL of one rank, of all, or of one or all while a checkpoint is written, at a random
time. After each the same command goes on. When a run has ended, every loss and every weight must
equal those of the undisturbed run with as many ranks, bit for bit; then the next run begins.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import ranks
import tiny_run
import torch

from internvl import demo
from internvl.training import checkpoint

SIZE = demo.ChatSize(64, 16, 32, 1, 32, 1)

CODE = """
from internvl import train
from internvl.config import recipes

train.run(recipes.load_recipe({recipe!r}, {settings!r}))
"""
KINDS = ("one", "all", "one in a checkpoint", "all in a checkpoint")
LONGEST_S = 60
"""Until the other ranks have ended as well."""


def start(code, num_ranks, folder):
    """Starts the ranks; returns their processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = []
    for rank in range(num_ranks):
        own = {**group, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        to = folder / f"rank{rank}"
        to.mkdir(exist_ok=True)
        processes.append(ranks._CONTEXT.Process(target=ranks._run, args=(code, environment, to)))
        processes[-1].start()
    return processes


def wait_for(moment, processes):
    """Waits until `moment()` is true or a rank has ended."""
    while not moment() and all(process.exitcode is None for process in processes):
        time.sleep(0.002)


def kill(run, kind, processes, chance):
    """Kills at a random time of the kind; returns seconds until all have ended, and their CPU
    seconds, or None if the run was faster."""
    checkpoints, begun = run / "checkpoints", num_steps(run)
    if kind.endswith("checkpoint"):
        skipped = chance.randrange(3)
        for _ in range(skipped + 1):
            wait_for(lambda: not any(checkpoints.glob(".0*.partial")), processes)
            wait_for(lambda: any(checkpoints.glob(".0*.partial")), processes)
        time.sleep(chance.uniform(0, 0.03))
    elif chance.random() < 0.2:
        time.sleep(chance.uniform(0, 3))  # while the model loads
    else:
        later = begun + chance.randrange(1, 6)
        wait_for(lambda: num_steps(run) >= later, processes)
        time.sleep(chance.uniform(0, 0.2))
    if all(process.exitcode is not None for process in processes):
        return None
    victims = processes if kind.startswith("all") else [chance.choice(processes)]
    spent_s = cpu_s(processes)
    for process in victims:
        process.kill()
    killed = time.perf_counter()
    if num_steps(run) == begun:
        # Ranks that wait for one to join are ended by the launcher, which is not here.
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        process.join(LONGEST_S)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGABRT)
            process.join()
            raise SystemExit(f"rank {rank} did not end within {LONGEST_S} s of a kill ({kind})")
    return time.perf_counter() - killed, spent_s


def cpu_s(processes):
    """CPU seconds of processes that run, and of those that ended without being waited for."""
    ticks = 0
    for process in processes:
        stat = Path(f"/proc/{process.pid}/stat")
        try:
            ticks += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def num_steps(run):
    """Steps in the log of the run."""
    return len(tiny_run.losses(run)) if (run / "metrics.jsonl").exists() else 0


def finish(processes, folder):
    """Waits for the end of a run; returns its CPU seconds; a rank that fails is an error."""
    connection.wait([process.sentinel for process in processes])
    for rank, process in enumerate(processes):
        process.join(LONGEST_S)
        if process.exitcode != 0:
            raise SystemExit((folder / f"rank{rank}" / "err").read_text())
    return sum(float((folder / f"rank{rank}/cpu_s").read_text()) for rank in range(len(processes)))


def differences(run, expected):
    """Lists what differs between two runs: losses, and weights of the last checkpoint."""
    found = [] if tiny_run.losses(run) == tiny_run.losses(expected) else ["losses"]
    (step,) = checkpoint.steps(expected / "checkpoints")
    if checkpoint.steps(run / "checkpoints") != [step]:
        return [*found, "checkpoints"]
    weights = checkpoint.read_weights(run / "checkpoints", step)
    for name, tensor in checkpoint.read_weights(expected / "checkpoints", step).items():
        if not torch.equal(weights[name].read(), tensor.read()):
            found.append(name)
    return found


def report(values):
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shard", default="zero3")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    ranks._start_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = tiny_run.make(folder, size=SIZE, global_batch=4)
        settings = [f"steps={options.steps}", "checkpoint.every=1", "checkpoint.keep=1"]
        settings.append(f"parallel.shard={options.shard}")

        def code(run):
            words = [*settings, f"run={run}"]
            return CODE.format(recipe=str(project), settings=words)

        expected = folder / "undisturbed"
        spent_s = finish(start(code(expected), options.ranks, folder), folder)
        report({"undisturbed_cpu_s": round(spent_s, 1)})
        kills, runs, slowest = dict.fromkeys(KINDS, 0), 0, 0.0
        while sum(kills.values()) < options.kills and spent_s < 60 * options.cpu_minutes:
            run, runs = folder / f"run{runs}", runs + 1
            while not (run / "finished.json").exists():
                processes = start(code(run), options.ranks, folder)
                if sum(kills.values()) < options.kills:
                    kind = KINDS[sum(kills.values()) % len(KINDS)]
                    killed = kill(run, kind, processes, chance)
                    if killed is not None:
                        kills[kind] += 1
                        slowest = max(slowest, killed[0])
                        spent_s += killed[1]
                        done = {"step": num_steps(run), "cpu_s": round(killed[1], 1)}
                        report({"kill": kind, "ended_s": round(killed[0], 2), **done})
                        continue
                spent_s += finish(processes, folder)
            if different := differences(run, expected):
                sys.exit(f"run {runs} differs from the undisturbed one: {', '.join(different[:5])}")
        result = {"kills": kills, "runs": runs, "differ": 0, "slowest_end_s": round(slowest, 2)}
        report(result | {"cpu_minutes": round(spent_s / 60, 1)})


if __name__ == "__main__":
    main()
