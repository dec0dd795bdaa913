"""The process group and the numbers that cross it. On a single process all of it is the identity.

Counts and objects travel between CPUs (gloo), so reading them never waits for a GPU; gradients and
features travel between GPUs (NCCL).
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d

from internvl.errors import OtherRankFailed, UserError
from internvl.launch import launchers
from internvl.launch.launchers import Membership

T = TypeVar("T")

_JOIN = timedelta(minutes=10)
"""Until every rank has started."""
_LONGEST_WAIT_S = 3 * 3600.0
"""Of a rank for another one while models load and compile, evaluate and save."""
_FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "20000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # 1 would end the process before the file is written.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
}


def init_from_env(
    device: Literal["auto", "cpu", "cuda"] = "auto", traces: Path | None = None
) -> torch.device:
    """Joins the process group that torchrun, Slurm or MPI describe in the environment, if any.

    Args:
        device: What to compute on; auto takes CUDA where there is a GPU.
        traces: Start of the names of NCCL's files about collectives that took too long.

    Returns:
        This process's own device, made current when it is a GPU.

    Raises:
        UserError: No GPU for this process, or half of a launcher's variables are missing.
    """
    launchers.follow_parent()
    membership = launchers.joined()
    local_device = _local_device(device, membership)
    if membership is not None and not distributed.is_initialized():
        # Libraries look for these, whoever started the ranks.
        os.environ.update(membership.variables())
        on_gpu = local_device.type == "cuda"
        if on_gpu:
            _record_flight(traces)
        # Both on a GPU: counts and objects go through gloo and so never wait for queued kernels.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        distributed.init_process_group(backend, timeout=_JOIN)
        set_timeout(_LONGEST_WAIT_S)
    return local_device


def _record_flight(traces: Path | None) -> None:
    """Has NCCL keep its last collectives, and write them down if one takes too long."""
    settings = dict(_FLIGHT_RECORDER)
    if traces is not None:
        # The second is its name in older versions of torch.
        names = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
        settings |= dict.fromkeys(names, str(traces.absolute()))
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _local_device(device: str, membership: Membership | None) -> torch.device:
    num_gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return torch.device("cpu")
    local_rank = 0 if membership is None else membership.local_rank
    # Slurm and MPI may show a task its own GPU alone.
    if membership is not None and membership.launcher in ("Slurm", "MPI") and num_gpus == 1:
        local_rank = 0
    if local_rank >= num_gpus:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own ({num_gpus} visible): start at most "
            "as many processes as GPUs, or set device=cpu"
        )
    local_device = torch.device("cuda", local_rank)
    # Libraries that allocate on "cuda" without an index would all fill GPU 0.
    torch.cuda.set_device(local_device)
    return local_device


def shutdown() -> None:
    """Leaves the process group, if one was joined."""
    if distributed.is_initialized():
        # Another group may get the id of this one.
        _patient_groups.clear()
        distributed.destroy_process_group()


def set_timeout(limit_s: float) -> None:
    """Sets how long a collective of any group may take, `wait_for_all` apart; on every rank."""
    if distributed.is_initialized():
        patient = list(map(id, _patient_groups.values()))
        for group in list(distributed_c10d._world.pg_map):
            if id(group) not in patient:
                distributed_c10d._set_pg_timeout(timedelta(seconds=limit_s), group)


def rank() -> int:
    """Returns the number of this process, 0 … world_size - 1."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """True for the process that writes files and logs."""
    return rank() == 0


@dataclass
class Waiting:
    """How far this process is in the order of collectives that all ranks share."""

    done: int = 0
    is_inside: bool = False
    """It waits for the others."""


waiting = Waiting()


@contextmanager
def _counted() -> Iterator[None]:
    # Another thread's collectives belong to another order.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting.is_inside = True
    try:
        yield
    finally:
        waiting.is_inside = False
        waiting.done += 1


def barrier() -> None:
    """Waits on the CPU until every process is here."""
    sum_counts({"here": 1.0})


def sum_counts(counts: Mapping[str, float]) -> dict[str, float]:
    """Returns each number summed over all ranks in float64 (whole ones stay exact below 2**53).

    Args:
        counts: The same names on every rank, in any order.
    """
    if not distributed.is_initialized():
        return dict(counts)
    names = sorted(counts)  # the order of a dict may differ between ranks
    values = torch.tensor([counts[name] for name in names], dtype=torch.float64)
    with _counted():
        distributed.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


def gather_objects(value: T) -> list[T]:
    """Returns every rank's `value`, in rank order, on every rank. Values must pickle."""
    if not distributed.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    with _counted():
        distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]  # filled on every rank by now


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, …) of every rank, in rank order, (sum of n, …); ranks may have different n.

    Gradients go back to where the rows came from: each rank gets the sum over ranks of the
    gradient with respect to its own. Collective in forward and backward.
    """
    if not distributed.is_initialized():
        return rows
    return _GatherRows.apply(rows, gather_objects(len(rows)))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        first = sum(sizes[: rank()])
        ctx.local_rows = slice(first, first + len(rows))
        # As many rows from every rank as from the longest: collectives take equal shapes.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(gathered, padded)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Cloned: all_reduce writes in place, and autograd may still use this gradient elsewhere.
        summed = gradients[0].contiguous().clone()
        distributed.all_reduce(summed)
        return summed[ctx.local_rows], None


def from_main(value: T) -> T:
    """Returns rank 0's `value` on every rank; it must pickle."""
    if not distributed.is_initialized():
        return value
    values = [value if is_main() else None]
    distributed.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]  # rank 0's by now


def gather_to_main(value: T) -> list[T]:
    """Returns every rank's `value`, in rank order, on rank 0, and [] on the others; must pickle."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    distributed.gather_object(value, values, dst=0)
    return values or []


def raise_on_all(error: UserError | None) -> None:
    """Raises `error` on its rank and OtherRankFailed on the others; returns if no rank has one.

    Collective: a rank that raised alone would leave the others waiting for it.
    """
    texts = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for text in texts:
        if text is not None:
            raise OtherRankFailed(text)


def main_alone(work: Callable[[], T]) -> T | None:
    """Returns what `work` returns on rank 0, None on the others, which wait however long it takes.

    Raises:
        UserError: of `work`, on every rank.
    """
    value, error = None, None
    if is_main():
        try:
            value = work()
        except UserError as raised:
            error = raised
    wait_for_all()
    raise_on_all(error)
    return value


def on_main(work: Callable[[], T]) -> T:
    """As `main_alone`, but returns rank 0's value, which must pickle, on every rank."""
    value: Any = main_alone(work)
    return from_main(value)


_PATIENCE = timedelta(days=7)
_POLL_S = 0.05
_patient_groups: dict[int, Any] = {}  # id of the whole group -> one of the same ranks


def wait_for_all(meanwhile: Callable[[], None] = lambda: None) -> None:
    """Waits until every rank is here, however long that takes; an ended rank raises RuntimeError.

    Args:
        meanwhile: called again and again until then.
    """
    if not distributed.is_initialized():
        return
    whole = distributed.group.WORLD
    if id(whole) not in _patient_groups:
        # One of its own: time-outs of the others tell a hanging step from one that computes.
        _patient_groups.clear()
        _patient_groups[id(whole)] = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    arrival = distributed.all_reduce(
        torch.zeros(1), group=_patient_groups[id(whole)], async_op=True
    )
    assert arrival is not None
    pause_s = _POLL_S / 64  # at first: most waits are short
    with _counted():
        while not arrival.is_completed():
            meanwhile()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_S)
        arrival.wait()  # raises what ended it, such as a closed connection


class Tally:
    """A count over all ranks that none waits for: every rank adds, any reads the sum so far.

    All ranks make their tallies in the same order.
    """

    _serial = count()

    def __init__(self) -> None:
        self._key = f"internvl/tally/{next(self._serial)}"
        self._store: Any = None
        self._sum = 0
        if distributed.is_initialized():
            # The group's own: one of ours would need another port.
            self._store = distributed.distributed_c10d._get_default_store()

    def add(self, more: int) -> int:
        """Adds; returns the sum over all ranks so far."""
        if self._store is not None:
            return int(self._store.add(self._key, more))
        self._sum += more
        return self._sum
