"""Training rates: the loop of `internvl train` itself, on random weights of the released shapes.

    python benchmarks/train.py                      # every row, on a GPU; about 10 minutes
    python benchmarks/train.py 2b_coco --profile    # one row, and where its step goes
    python benchmarks/train.py --tiny               # the same path on a CPU, in seconds

Images are JPEG files, decoded and tiled by the loader's workers; metrics are logged; the
optimizer steps. A row's JSON goes to `--to`: medians over 8 steps after two of warm-up, FLOPs
as internvl/plan/flops.py counts them, over the rate of an 8192³ bfloat16 product of the same
process.
"""

import argparse
import gc
import itertools
import os
import statistics
import subprocess
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import workloads
from rows import commit, keep, kernels, print_kernels
from torch._dynamo.utils import counters

from internvl import log, train
from internvl.compute import feeding
from internvl.config import recipes
from internvl.data.packing import padded_tokens
from internvl.data.records import PackedBatch, Unit
from internvl.objectives.sft import Sft
from internvl.plan import flops
from internvl.plan.work import Work, work_of

WARMUP = 2

_DRAWN = 1024
"""Samples on disk; epochs go on from there."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    rank: int | None = 128
    dropout: float = 0.05
    """Of the adapters, as in the recipe."""
    captions: int = 1
    share: bool = False
    mixture: bool = False
    batch: int = 512
    """Samples of a step, as in the recipe."""
    row_tokens: int = 16640
    """Nine images of seven tiles, as in the recipe."""
    compute: dict[str, Any] = field(default_factory=dict)


FLOAT8 = {"float8": True}

RECIPES = {
    "2b_coco": Row("InternVL2-2B"),
    "2b_coco_shared": Row("InternVL2-2B", captions=5, share=True, row_tokens=18944),
    "1b_coco": Row("InternVL2-1B"),
    "8b_coco": Row("InternVL2-8B", batch=128),
    "2b_full": Row("InternVL2-2B", rank=None, mixture=True, batch=128, row_tokens=16384),
}
"""Rows as the recipes are; the default."""

OPTIONS: dict[str, dict[str, Any]] = {
    "no_dropout": {"dropout": 0.0},
    "float8": {"compute": {"float8": True}},
    "flex": {"compute": {"attention": "flex"}},
    "eager": {"compute": {"compile": False}},
    "checkpointing": {"compute": {"checkpointing": "full"}},
    "full": {"rank": None},
}
"""What the words after a recipe's name change, for example 2b_coco_float8_no_dropout."""


def named(name: str) -> Row:
    """The row of a name: one of `RECIPES`, then any of `OPTIONS` joined by underscores."""
    recipe = max((known for known in RECIPES if name.startswith(known)), key=len, default=None)
    if recipe is None:
        raise SystemExit(f"{name}: a row's name begins with one of {', '.join(RECIPES)}")
    row, rest = RECIPES[recipe], name[len(recipe) :]
    while rest:
        option = next((word for word in OPTIONS if rest.startswith(f"_{word}")), None)
        if option is None:
            raise SystemExit(f"{name}: {rest[1:]!r} is none of {', '.join(OPTIONS)}")
        changes, rest = OPTIONS[option], rest[len(option) + 1 :]
        row = replace(row, **{**changes, "compute": row.compute | changes.get("compute", {})})
    return row


class Counting(Sft):
    """The objective, and what every step's rows held."""

    steps: list[Work]
    padded: list[int]
    """Tokens of a step's rows, padding included."""

    def batches(self, units: Any) -> list[PackedBatch]:
        rows = super().batches(units)
        self.steps.append(sum(map(work_of, rows), start=Work()))
        longest = self.data.row_tokens or self.data.max_tokens
        self.padded.append(sum(padded_tokens(row.num_tokens, longest) for row in rows))
        return rows


def measure(name: str, row: Row, options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Trains `row` for a few steps; its JSON."""
    device = torch.device("cpu" if options.tiny else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        now = build(row, Path(folder), device, options)
        built_s = time.perf_counter() - started
        metrics = log.StepLog(Path(folder) / "run", "metrics.jsonl")
        board = log.TensorBoard(Path(folder) / "run" / "tensorboard")
        ends, rows, compiled = [], [], 0
        with Clocks() as clocks:
            for numbers in train.updates(now):
                metrics.append({"step": now.step, **numbers})
                board.scalars(now.step, numbers)
                rows.append(numbers)
                ends.append(time.perf_counter())
                if now.step == WARMUP:
                    compiled = counters["stats"]["unique_graphs"]
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
        recompiled = counters["stats"]["unique_graphs"] - compiled
        if options.profile:
            profile(now, device)
        board.close()
    seconds = [b - a for a, b in itertools.pairwise(ends[WARMUP - 1 :])]
    return report(name, row, now, rows, seconds, ceiling) | {
        "built_s": round(built_s, 1),
        "graphs": compiled,
        "recompiled_after_warmup": recompiled,
        **clocks.between(ends[WARMUP - 1], ends[-1]),
    }


class Clocks:
    """The GPU's clock and power five times a second: a long run is slower than a short product."""

    def __enter__(self) -> "Clocks":
        self.samples: list[tuple[float, float, float]] = []
        words = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
        words += ["-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]]
        try:
            self.process = subprocess.Popen([*words, "-lms", "200"], stdout=subprocess.PIPE)
        except FileNotFoundError:
            self.process = None
            return self
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.thread.join()

    def _read(self) -> None:
        for line in self.process.stdout:
            clock, power = map(float, line.decode().split(","))
            self.samples.append((time.perf_counter(), clock, power))

    def between(self, first: float, last: float) -> dict[str, float]:
        """Means of the samples between two times of `time.perf_counter`."""
        chosen = [sample for sample in self.samples if first <= sample[0] <= last]
        if not chosen:
            return {}
        _, clocks, powers = zip(*chosen, strict=True)
        return {"sm_mhz": round(statistics.mean(clocks)), "watt": round(statistics.mean(powers))}


def build(
    row: Row,
    folder: Path,
    device: torch.device,
    options: argparse.Namespace,
    run: Path | None = None,
) -> train.TrainState:
    """The run of a row: files on disk, a random model, all else as `train.build` makes it.

    Args:
        run: the run folder, instead of one below `folder`; ranks share it.
    """
    chat = workloads.random_chat(
        row.model, device, rank=row.rank, dropout=row.dropout, tiny=options.tiny
    )
    steps = WARMUP + options.steps
    batch = options.batch or (10 if options.tiny else row.batch)
    drawn = workloads.mixture(0) if row.mixture else workloads.coco(0)
    count = max(1, min(batch * steps, _DRAWN) // row.captions)
    samples = list(itertools.islice(drawn, count))
    sources = workloads.write(folder, samples, chat.encoder, captions=row.captions)
    recipe = recipes.resolve(
        {
            "model": {"id": row.model},
            "data": {
                "sources": sources,
                "tiles": {"size": chat.tiles.size, "max": 6},
                "max_tokens": 4096,
                "row_tokens": 4096 if options.tiny else row.row_tokens,
                "max_tiles": 96,
                "share_prefix": row.share,
                "workers": 0 if options.tiny else options.workers,
            },
            "optim": {"lr": 4e-5, "weight_decay": 0.01, "decay_vectors": True},
            "compute": row.compute,
            "run": str(run or folder / "run"),
            "global_batch": batch,
            "steps": steps,
            "device": device.type,
        }
    )
    now = train.build(recipe, chat)
    now.objective = Counting(now.recipe.objective, now.recipe.data, chat.encoder)
    now.objective.steps, now.objective.padded = [], []
    return now


def report(
    name: str,
    row: Row,
    now: train.TrainState,
    rows: list[dict[str, float]],
    seconds: list[float],
    ceiling: float,
) -> dict[str, Any]:
    """The figures of a row, and what they were measured on."""
    work = now.objective.steps[WARMUP : WARMUP + len(seconds)]
    padded = now.objective.padded[WARMUP : WARMUP + len(seconds)]
    needed = [flops.count(now.model, step).needed for step in work]
    rates = [step.samples / s for step, s in zip(work, seconds, strict=True)]
    shares = [n / s / 1e12 / ceiling for n, s in zip(needed, seconds, strict=True)]
    samples = sum(step.samples for step in work)
    measured = rows[WARMUP:]
    length = now.recipe.data.row_tokens or now.recipe.data.max_tokens
    return {
        "row": name,
        "model": row.model,
        "method": f"lora {row.rank}" if row.rank else "full",
        "samples_per_s": round(statistics.median(rates), 2),
        "samples_per_s_mean": round(samples / sum(seconds), 2),
        "ceiling_share": round(statistics.median(shares), 4),
        "ceiling_tflops": round(ceiling, 1),
        "step_s": round(statistics.median(seconds), 4),
        "first_step_s": round(now.warmup_s + rows[0]["step_s"], 1),
        "data_wait_share": round(sum(r["data_wait_s"] for r in measured) / sum(seconds), 4),
        "peak_gib": round(rows[-1]["memory_gib"], 2),
        "samples_per_step": work[0].samples,
        "rows_per_step": statistics.mean(r["rows"] for r in measured),
        "row_tokens": length,
        "fill": round(sum(w.rows.tokens for w in work) / sum(padded), 4),
        "tokens_per_sample": round(sum(w.rows.tokens for w in work) / samples, 1),
        "tiles_per_sample": round(sum(w.tiles for w in work) / samples, 3),
        "supervised_per_sample": round(sum(w.supervised for w in work) / samples, 1),
        "tflop_per_sample": round(sum(needed) / samples / 1e12, 3),
        "loss": [round(r["loss"], 4) for r in rows],
        "steps": len(seconds),
        "warmup_steps": WARMUP,
        "dropout": row.dropout if row.rank else 0.0,
        "compute": row.compute,
        "hardware": _hardware(now.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def profile(now: train.TrainState, device: torch.device) -> None:
    """Where one more step goes, on rows that lie ready: kernels by time, and idle time."""
    units: list[Unit] = []
    for ref in now.order.step(0, now.recipe.global_batch, now.total_samples)[:32]:
        units += now.reader[ref].units
    rows = [feeding.pad(row, now.row_lengths) for row in now.objective.batches(units)]
    if device.type != "cuda":
        return
    rows = [feeding.pin(row) for row in rows]
    walls, started = [], time.perf_counter()
    with Clocks() as clocks:
        for _ in range(30):  # long enough for the clocks to settle where they stay
            before = time.perf_counter()
            train.train_step(now, rows)
            walls.append(time.perf_counter() - before)
    settled = clocks.between(started + sum(walls) / 2, time.perf_counter())
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as found:
        train.train_step(now, rows)
    events, busy_s = kernels(found)
    lengths = [len(row.document) for row in rows]
    print(
        f"profile: rows of {lengths} tokens, step {walls[3]:.3f} s at first, "
        f"{statistics.median(walls[15:]):.3f} s later {settled}, kernels {busy_s:.3f} s"
    )
    print_kernels(events[:40], busy_s)


def _hardware(device: torch.device) -> str:
    return f"1 x {torch.cuda.get_device_name()}" if device.type == "cuda" else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "rows",
        nargs="*",
        default=list(RECIPES),
        help=f"{', '.join(RECIPES)}, each with _{', _'.join(OPTIONS)}",
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, help="samples of a step, instead of the recipe's")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--to", type=Path, default=None, help="folder for one JSON a row")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.steps = min(options.steps, 2)
    rows = {name: named(name) for name in options.rows}
    ceiling = workloads.matmul_tflops(torch.device("cpu" if options.tiny else "cuda"))
    for name, row in rows.items():
        started = time.perf_counter()
        try:
            figures = measure(name, row, options, ceiling)
        except Exception:  # noqa: BLE001  a row that fails must not cost the others
            traceback.print_exc()
            continue
        finally:
            gc.collect()
            torch._dynamo.reset()
            if not options.tiny:
                torch.cuda.empty_cache()
        figures["wall_s"] = round(time.perf_counter() - started, 1)
        keep(figures, options.to and options.to / f"train_{name}.json")


if __name__ == "__main__":
    main()
