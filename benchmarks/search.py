"""Photo search among synthetic features: time and memory of exact and approximate queries.

    python benchmarks/search.py --to benchmarks/results/search_cpu.json          # or --device cuda

Unit features of width 768 in 2,000 clusters; queries lie near clusters, as texts do, or near
photos. The index is written by the product's own code. Every row is measured in a process of its
own; `anonymous_mib` is its own memory beyond Python's and torch's libraries, without the mapped
features, which are the system's cache of the file.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import rows
import torch
import torch.nn.functional as F
from torch import Tensor

from internvl.search.approximation import renew
from internvl.search.query import Filters, Term
from internvl.search.scan import Entry
from internvl.search.searcher import Searcher
from internvl.search.store import PhotoRow, Settings, Store

WIDTH, CLUSTERS, FOLDERS, BATCH = 768, 2000, 100, 8192
SPREAD = 0.6  # of the photos about the centers of their clusters
QUERIES = 10
EXACT_ROWS = ("write", "exact")
FAISS_ROWS = ("write", "exact", "build_approximate", "approximate")


class Texts:
    """Stands for the model: features near clusters."""

    def __init__(self, device: str) -> None:
        self.dual = SimpleNamespace(device=torch.device(device))
        self._draw = torch.Generator().manual_seed(1)

    def texts(self, texts: list[str]) -> Tensor:
        chosen = torch.randint(CLUSTERS, (len(texts),), generator=self._draw)
        noise = torch.randn(len(texts), WIDTH, generator=self._draw)
        return F.normalize(_centers()[chosen] + SPREAD * noise, dim=1)


def _centers() -> Tensor:
    return torch.randn(CLUSTERS, WIDTH, generator=torch.Generator().manual_seed(0))


def write(folder: Path, photos: int) -> dict[str, Any]:
    """Writes an index of so many photos, batch by batch, as `internvl index` does."""
    settings = Settings(str(folder), "none", None, [], ["c"], "float16", WIDTH, 224, {})
    centers, draw = _centers(), torch.Generator().manual_seed(2)
    started, spent = time.perf_counter(), 0.0
    with Store.create(folder / "index", settings) as store:
        names = [f"{index % FOLDERS:03d}/{index:08d}.jpg" for index in range(photos)]
        store.begin_scan(Entry(name, 1, 1) for name in names)
        for start in range(0, photos, BATCH):
            batch = range(start, min(start + BATCH, photos))
            chosen = torch.randint(CLUSTERS, (len(batch),), generator=draw)
            noise = torch.randn(len(batch), WIDTH, generator=draw)
            features = F.normalize(centers[chosen] + SPREAD * noise, dim=1).numpy()
            photo_rows = [
                PhotoRow(0, names[i], 1, 1, i.to_bytes(16), f"{2000 + i % 25}-05-01", 0, 1, 1)
                for i in batch
            ]
            began = time.perf_counter()
            store.add(photo_rows, {"c": features})
            spent += time.perf_counter() - began
        megabytes = sum(file.stat().st_size for file in store.folder.iterdir()) / 1e6
    return {
        "row": "write",
        "photos": photos,
        "seconds": time.perf_counter() - started,
        "photos_per_s_added": photos / spent,
        "index_mb": megabytes,
        "table_mb": (folder / "index/photos.db").stat().st_size / 1e6,
    }


def query(folder: Path, device: str, *, approximate: bool) -> dict[str, Any]:
    """Measures queries of an index, the first (cold) and those after it."""
    encoder: Any = Texts(device)
    with Store(folder / "index") as store:
        searcher = Searcher(store, encoder, approximate=approximate)
        encoder.texts(["libraries start"])
        before = _anonymous_bytes()
        times = {}
        for name, options in {
            "any": {},
            "page_50": {"skip": 50 * 20},
            "folder": {"filters": Filters(folders=("007",))},
            "dates": {"filters": Filters(since="2010", until="2014")},
        }.items():
            times[name] = _times(searcher, options)
        row = {
            "row": "approximate" if approximate else "exact",
            "photos": store.num_rows,
            **{f"{name}_{key}": value for name, row in times.items() for key, value in row.items()},
            "anonymous_mib": (_anonymous_bytes() - before) / 2**20,
        }
    return row


def _times(searcher: Searcher, options: dict[str, Any]) -> dict[str, float]:
    """First, fastest and median seconds of queries, and the median of their CPU seconds."""
    wall, cpu = [], []
    for _ in range(QUERIES):
        began, used = time.perf_counter(), _cpu_s()
        searcher.find([Term("any words")], **options)
        wall.append(time.perf_counter() - began)
        cpu.append(_cpu_s() - used)
    later = wall[1:]
    names = ("first_s", "fastest_s", "median_s", "cpu_s")
    values = (wall[0], min(later), statistics.median(later), statistics.median(cpu[1:]))
    return dict(zip(names, values, strict=True))


def build(folder: Path, device: str) -> dict[str, Any]:
    """Builds the index of faiss for a recall of 0.99."""
    began = time.perf_counter()
    with Store(folder / "index") as store:
        measured = renew(store, Texts(device), 0.99)["c"]  # type: ignore[arg-type]
        file, _ = store.approximate("c")
        megabytes = file.stat().st_size / 1e6
    return {
        "row": "build_approximate",
        **measured,
        "seconds": time.perf_counter() - began,
        "file_mb": megabytes,
    }


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def _measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    if name == "write":
        return write(folder, options.photos)
    if name == "build_approximate":
        return build(folder, options.device)
    return query(folder, options.device, approximate=name == "approximate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=int, default=1_000_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--to", type=Path, help="JSON file to write")
    parser.add_argument("--faiss-photos", type=int, default=200_000, help="of rows with faiss")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    parser.add_argument(
        "--one", nargs=2, metavar=("ROW", "DIR"), help="a row alone, in this process"
    )
    options = parser.parse_args()
    if options.one:
        name, folder = options.one
        print(json.dumps(rows.rounded(_measure(name, Path(folder), options))))
        return
    results = []
    sizes = (2000, 1000) if options.tiny else (options.photos, options.faiss_photos)
    for photos, names in zip(sizes, (EXACT_ROWS, FAISS_ROWS), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                words = ["--photos", str(photos), "--device", options.device]
                command = [sys.executable, __file__, *words, "--one", name, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(done.stdout))
                print(json.dumps(results[-1]), flush=True)
    if options.to is not None:
        cores = f"{os.cpu_count()} x {platform.machine()} cores"
        head = {
            "benchmark": "search",
            "hardware": torch.cuda.get_device_name() if options.device == "cuda" else cores,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "commit": rows.commit(),
        }
        options.to.write_text(json.dumps({**head, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
