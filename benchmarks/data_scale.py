"""Opening a large annotation file: time and memory against one of a thousand lines.

    python benchmarks/data_scale.py --lines 1300000 --out benchmarks/data_scale.json

Writes synthetic chat files (about 800 bytes a line, two lines an image), opens each in a fresh
process, takes the first batch and one from the middle, and sums the proportional set size (PSS)
of that process and its workers. Images are made for the samples drawn; encoding is a stub.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GLOBAL_BATCH = 64


def write(path: Path, lines: int) -> None:
    """Conversations of three turns; every image has two lines, far apart."""
    text = "The image shows a street with people, cars and a few trees in the background. " * 4
    with path.open("w", encoding="utf-8") as file:
        for i in range(lines):
            turns = [
                {"from": "human", "value": f"<image>\nQuestion {i}: {text[:120]}"},
                {"from": "gpt", "value": text},
                {"from": "human", "value": "And what else?"},
                {"from": "gpt", "value": text[:160]},
            ]
            row = {"id": i, "image": f"{i % (lines // 2):07d}.png", "conversations": turns}
            file.write(json.dumps(row) + "\n")


def pss_mib(pids: list[int]) -> float:
    """Proportional set size of some processes together."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def measure(path: Path, images: Path, workers: int) -> dict[str, float]:
    """What one process needs for a file; run in a fresh one."""
    import numpy as np
    import torch
    from PIL import Image

    from internvl.config import DataConfig, SourceConfig, TilesConfig
    from internvl.data import loader
    from internvl.data.records import IGNORE, Example, Unit
    from internvl.data.sampler import SampleOrder
    from internvl.data.sources import open_source

    torch.set_num_threads(1)
    image = Image.new("RGB", (64, 48))
    config = SourceConfig(name="x", annotations=path, images=images)
    started = time.perf_counter()
    source = open_source(config)
    order = SampleOrder([source], share_prefix=True, seed=0)
    found = {"lines": len(source), "workers": workers, "open_s": time.perf_counter() - started}

    def encode(samples: list, tiles: object) -> list:
        ids = np.arange(8)
        labels = np.where(ids > 4, ids, IGNORE)
        return [Unit(tuple(Example(s.name, ids, labels) for s in samples), 0, None)]

    data = DataConfig(sources=(config,), workers=workers, tiles=TilesConfig(size=28))
    reader = loader.UnitReader([source], data, encode, pixels=False)
    total, last = len(order), len(order) // GLOBAL_BATCH

    def batch(first: int) -> float:
        ahead = range(first, min(first + 16, last))
        for ref in (ref for i in ahead for ref in order.step(i, GLOBAL_BATCH, total)):
            for sample in source.samples(ref.lines[:1]):
                if not os.path.exists(sample.images[0]):
                    image.save(sample.images[0])
        started = time.perf_counter()
        running = loader.steps(
            order,
            reader,
            list,
            first=first,
            last=ahead[-1] + 1,
            global_batch=GLOBAL_BATCH,
            total=total,
            workers=data.workers,
        )
        next(running)
        seconds = time.perf_counter() - started
        found["pss_mib"] = pss_mib([os.getpid(), *children(os.getpid())])
        return seconds

    order.step(0, GLOBAL_BATCH, total)
    found["first_batch_s"] = batch(0)
    order_again = SampleOrder([source], share_prefix=True, seed=0)
    started = time.perf_counter()
    order_again.step(last // 2, GLOBAL_BATCH, total)
    del order_again
    found["seek_middle_s"] = time.perf_counter() - started
    found["middle_batch_s"] = batch(last // 2)
    return found


def run_child(path: Path, images: Path, workers: int, cache: Path) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--child", str(path), str(images), str(workers)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_300_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        path, images, workers = arguments.child
        print(json.dumps(measure(Path(path), Path(images), int(workers))))
        return
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    result: dict = {
        "benchmark": "data_scale",
        "hardware": f"{os.cpu_count()} x {platform.machine()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for lines in (1000, arguments.lines):
            write(root / f"{lines}.jsonl", lines)
        result["file_mib"] = (root / f"{arguments.lines}.jsonl").stat().st_size / 2**20
        for workers in (1, 8):
            for lines in (1000, arguments.lines):
                for state in ("new", "indexed") if workers == 1 else ("indexed",):
                    found = run_child(
                        root / f"{lines}.jsonl", root / "images", workers, root / "cache"
                    )
                    result["runs"].append({"index": state, **found})
                    print(result["runs"][-1], file=sys.stderr)
    by = {(r["lines"], r["workers"]): r["pss_mib"] for r in result["runs"]}
    for workers in (1, 8):
        added = by[arguments.lines, workers] - by[1000, workers]
        result[f"added_pss_mib_{workers}_workers"] = added
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
