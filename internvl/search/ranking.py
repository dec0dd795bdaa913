"""Ranks photos by their features: exactly, in blocks of rows; or near them, by an index of faiss.

Shapes: N rows of the features, E their width.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl.errors import UserError
from internvl.files import atomic_file

CPU_ROWS, GPU_ROWS = 1024, 65_536
"""Rows in memory as float32 at once, of a thread and of a GPU: 3 and 192 MiB at a width of 768."""

DEVICE_BYTES = 16 << 30
"""Largest features that are kept on a GPU."""

_TRAIN_ROWS = 40  # per list; faiss warns of fewer than 39
_PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_EXACT_SHARE = 20
"""A filter that leaves less than 1 / this of the rows is searched exactly."""


@dataclass
class Exact:
    """All scores of a feature file, on a device."""

    features: np.ndarray
    """(N, E), float16 or float32, memory-mapped."""
    device: torch.device

    def __post_init__(self) -> None:
        on_gpu = self.device.type != "cpu" and self.features.nbytes <= DEVICE_BYTES
        rows = torch.from_numpy(self.features)
        # Once for all queries: copying takes longer than scoring there.
        self._rows = rows.to(self.device) if on_gpu else rows

    def top(
        self, query: Tensor, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best rows and their scores, best first; equal ones by row.

        Args:
            query: float32 (E,).
            allowed: rows to rank, int64, ascending; by default all.

        Returns:
            int64 and float32 (up to k,).
        """
        scores = self._scores(query, allowed).cpu().numpy()
        order, best = _first(scores, k)
        return (order if allowed is None else allowed[order]), best

    def _scores(self, query: Tensor, allowed: np.ndarray | None) -> Tensor:
        """Returns the scores of all rows, or of `allowed`: float32, on the device."""
        chosen = None if allowed is None else torch.from_numpy(allowed).to(self._rows.device)
        count = len(self._rows) if chosen is None else len(chosen)
        query = query.to(self.device, torch.float32)
        # In float32: sums of products in 16 bits would tie neighbours.
        scores = torch.empty(count, device=self.device)
        # In the processor's cache, where a block is read again; a GPU wants larger ones.
        size = CPU_ROWS if self.device.type == "cpu" else GPU_ROWS

        def fill(rows: range) -> None:
            buffer = torch.empty(min(size, len(rows)), self._rows.shape[1], device=self.device)
            for start in range(rows.start, rows.stop, size):
                block = slice(start, min(start + size, rows.stop))
                features = self._rows[block if chosen is None else chosen[block]]
                torch.mv(buffer[: len(features)].copy_(features), query, out=scores[block])

        if self.device.type != "cpu":
            fill(range(count))
            return scores
        with _one_thread_per_operator() as num_threads:
            step = max(size, -(-count // num_threads))
            parts = [range(start, min(start + step, count)) for start in range(0, count, step)]
            with ThreadPoolExecutor(num_threads) as threads:
                list(threads.map(fill, parts))
        return scores


@contextmanager
def _one_thread_per_operator() -> Iterator[int]:
    """Lets operators of torch use one thread each in the block; yields how many they would use."""
    # OpenMP's threads wait for each other after every operator: with other programs on the same
    # cores a search of many small blocks would take twenty times as long.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield num_threads
    finally:
        torch.set_num_threads(num_threads)


def _first(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the k best scores, best first, equal ones by index; and the scores."""
    k = min(k, len(scores))
    if k <= 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    # All that equal the last one, of which the lowest indices are taken.
    last = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= last)
    order = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return order, scores[order]


@dataclass
class Approximate:
    """faiss's inverted lists of the first rows; later ones are ranked exactly."""

    index: Any
    probes: int
    exact: Exact

    def top(
        self, query: Tensor, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Exact.top`, without some of the best rows now and then."""
        covered = self.index.ntotal
        # Few rows are ranked sooner one by one than found in lists.
        rare = allowed is not None and len(allowed) * _EXACT_SHARE < covered
        if rare or k > covered // 2:
            return self.exact.top(query, k, allowed)
        faiss = _faiss()
        chosen: dict[str, Any] = {}
        if allowed is not None:
            mask = np.zeros(covered, bool)
            mask[allowed[allowed < covered]] = True
            chosen["sel"] = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        settings = faiss.SearchParametersIVF(nprobe=self.probes, **chosen)
        scores, rows = self.index.search(query.numpy()[None], k, params=settings)
        near = rows[0] >= 0
        # Photos that came after the index was built.
        later = np.arange(covered, len(self.exact.features))
        if allowed is not None:
            later = allowed[allowed >= covered]
        late_rows, late_scores = self.exact.top(query, k, later)
        all_rows = np.concatenate([rows[0][near], late_rows])
        order, best = _first(np.concatenate([scores[0][near], late_scores]), k)
        return all_rows[order], best


def build_approximate(
    features: np.ndarray, to: Path, *, recall: float, queries: dict[str, Tensor], k: int = 10
) -> dict[str, Any]:
    """Builds inverted lists of features in float16; measures how many of them must be read.

    Args:
        recall: share of the exact k best rows that the mean query must get.
        queries: name -> float32 (Q, E); the worst of them counts.

    Returns:
        `probes`, and name -> recall@k.
    """
    faiss = _faiss()
    count, width = features.shape
    lists = max(1, min(int(2 * count**0.5), count // 39))
    index = faiss.index_factory(width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    draw = np.random.default_rng(0)
    chosen = np.sort(draw.choice(count, min(count, lists * _TRAIN_ROWS), replace=False))
    # Few photos make one list, of which faiss would warn.
    faiss.extract_index_ivf(index).cp.min_points_per_centroid = 1
    # A sample is enough for the centers, and k-means over all rows would take hours.
    index.train(np.ascontiguousarray(features[chosen], np.float32))
    for start in range(0, count, GPU_ROWS):
        index.add(np.ascontiguousarray(features[start : start + GPU_ROWS], np.float32))
    exact = Exact(features, torch.device("cpu"))
    best = {name: [exact.top(query, k)[0] for query in rows] for name, rows in queries.items()}
    measured: dict[str, float] = {}
    probes = 1
    for probes in (*(p for p in _PROBES if p < lists), lists):
        approximate = Approximate(index, probes, exact)
        measured = {
            name: float(
                np.mean(
                    [
                        np.isin(expected, approximate.top(query, k)[0]).mean()
                        for query, expected in zip(rows, best[name], strict=True)
                    ]
                )
            )
            for name, rows in queries.items()
        }
        if min(measured.values()) >= recall:
            break
    with atomic_file(to) as partial:
        faiss.write_index(index, str(partial))
    return {"probes": probes, "lists": lists, "rows": count, "k": k, "recall": measured}


def read_approximate(file: Path, probes: int, exact: Exact) -> Approximate:
    """Maps an index of faiss into memory."""
    faiss = _faiss()
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise UserError(
            f"{file}: faiss cannot read it ({str(error).splitlines()[-1].strip()}); run "
            "`internvl index` with --approximate again"
        ) from None
    return Approximate(index, probes, exact)


def _faiss() -> Any:
    """Imports faiss. Raises UserError without it."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "approximate search needs faiss; install it with `pip install internvl[search]`"
        ) from error
    return faiss
