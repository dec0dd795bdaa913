"""Pads, pins and prefetches batches and copies them to the device while a step runs."""

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl.data.records import Batch, PackedBatch
from internvl.models.attention import packed

T = TypeVar("T")


def pad(row: PackedBatch, lengths: Sequence[int]) -> PackedBatch:
    """Returns the row padded to the first of `lengths` that holds it."""
    tokens = len(row.document)
    missing = next((length for length in lengths if length >= tokens), tokens) - tokens
    if not missing:
        return row
    # Documents -1, -2, … of a block each: as one document padding would attend to itself in full.
    padding = -1 - torch.arange(missing) // packed.BLOCK
    starts = row.starts
    if starts is not None:
        ends = torch.arange(tokens, tokens + missing, packed.BLOCK, dtype=starts.dtype)[1:]
        starts = torch.cat([starts, ends, starts.new_tensor([tokens + missing])])
    return replace(
        row,
        input_ids=F.pad(row.input_ids, (0, missing)),
        position_ids=F.pad(row.position_ids, (0, missing)),
        document=torch.cat([row.document, padding]),
        branch=F.pad(row.branch, (0, missing)),
        starts=starts,
    )


def pin(row: Any) -> Any:
    """Returns the batch in pinned memory."""
    # From pageable memory even a `non_blocking` copy is synchronous.
    pinned: dict[str, Any] = {name: t.pin_memory() for name, t in _tensors(row).items()}
    return replace(row, **pinned)


def _tensors(row: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(row).items() if isinstance(value, Tensor)}


def prefetch(items: Iterator[T]) -> Generator[tuple[T, float], None, None]:
    """Prefetches one item in a background thread; yields (item, seconds blocked)."""
    # One thread: items come from a generator, which two may not run at a time.
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while True:
            started = time.perf_counter()
            item = following.result()
            if item is None:
                return
            following = thread.submit(next, items, None)
            yield item, time.perf_counter() - started


@cache
def _copy_stream(device: torch.device) -> Any:
    """Returns the stream for copies, one for all steps."""
    # torch's allocator keeps freed memory apart for every stream that it was allocated on.
    return torch.cuda.Stream(device)


def prefetch_to_device(rows: Sequence[Batch], device: torch.device) -> Iterator[Any]:
    """Yields each batch on the device; the next one is copied while this one is computed."""
    if device.type != "cuda":
        yield from (row.to(device) for row in rows)
        return
    work, copies = torch.cuda.current_stream(device), _copy_stream(device)

    def copy(index: int) -> Any:
        with torch.cuda.stream(copies):
            return rows[index].to(device) if index < len(rows) else None

    following = copy(0)
    for index in range(1, len(rows) + 1):
        row = following
        assert row is not None
        work.wait_stream(copies)
        for tensor in _tensors(row).values():
            tensor.record_stream(work)  # allocated on one stream, freed after use on the other
        following = copy(index)
        yield row
