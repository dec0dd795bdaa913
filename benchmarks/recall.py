"""Recall of retrieval: time and memory, beside the dense computation it replaces.

    python benchmarks/recall.py --to benchmarks/results/recall_cpu.json          # or --device cuda

Random unit features of width 768, five captions an image. Dense: the matrix of all scores and of
all positives, torch.topk for each k in both directions, as CLIP_benchmark does. Chunked: what
`internvl evaluate` does. Each is measured in a process of its own; memory is what the process grew
by on a CPU, what torch allocated at most on a GPU, both beyond the features themselves.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.evals.features import ranks_both_ways
from internvl.evals.retrieval import recalls

SIZES = ((1_000, 5_000), (5_000, 25_000))
"""Images and texts."""

WIDTH, KS = 768, (1, 5, 10)


def features(images: int, texts: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(of images, of texts that lie near theirs, the image of every text)."""
    torch.manual_seed(0)
    of_image = torch.randn(images, WIDTH)
    of_text = torch.arange(texts) % images
    near = of_image[of_text] + 9 * torch.randn(texts, WIDTH)
    unit = torch.nn.functional.normalize
    return unit(of_image, dim=-1).to(device), unit(near, dim=-1).to(device), of_text.to(device)


def chunked(images: Tensor, texts: Tensor, of_text: Tensor) -> dict[str, float]:
    return recalls(*ranks_both_ways(texts, images, of_text), KS)


def dense(images: Tensor, texts: Tensor, of_text: Tensor) -> dict[str, float]:
    scores = texts @ images.T
    positive = of_text[:, None] == torch.arange(len(images), device=of_text.device)
    found = {}
    for k in KS:
        for name, table, right in (
            ("image", scores, positive),
            ("text", scores.T, positive.T),
        ):
            hits = right.gather(1, table.topk(k, dim=1)[1]).any(dim=1)
            found[f"{name}_retrieval_recall@{k}"] = hits.float().mean().item()
    return found


METHODS: dict[str, Callable[..., dict[str, float]]] = {"chunked": chunked, "dense": dense}


def measure(method: str, images: int, texts: int, device: str) -> dict[str, Any]:
    """One method at one size, in this process."""
    inputs = features(images, texts, device)
    METHODS[method](*(part[:64] for part in inputs[:2]), inputs[2][:64] % 64)  # libraries start
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = torch.cuda.memory_allocated() if cuda else _peak_bytes()
    start = time.perf_counter()
    found = METHODS[method](*inputs)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else _peak_bytes()
    return {
        "method": method,
        "images": images,
        "texts": texts,
        "seconds": seconds,
        "memory_mib": (peak - before) / 2**20,
        "metrics": found,
    }


def _peak_bytes() -> int:
    """The most memory of this process so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--to", type=Path, help="JSON file to write")
    parser.add_argument("--small", action="store_true", help="only to see that it runs")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "IMAGES", "TEXTS"))
    options = parser.parse_args()
    if options.one:
        method, images, texts = options.one
        print(json.dumps(measure(method, int(images), int(texts), options.device)))
        return
    rows = []
    for images, texts in ((100, 500),) if options.small else SIZES:
        for method in METHODS:
            words = ("--device", options.device, "--one", method, str(images), str(texts))
            done = subprocess.run(
                [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append(json.loads(done.stdout))
            print(done.stdout, end="", flush=True)
    if options.to is not None:
        cores = f"{os.cpu_count()} x {platform.machine()} cores"
        head = {
            "benchmark": "recall",
            "hardware": torch.cuda.get_device_name() if options.device == "cuda" else cores,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": os.environ.get("COMMIT") or _commit(),
        }
        options.to.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
