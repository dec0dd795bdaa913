"""The process group and the numbers that cross it. On a single process all of it is the identity.

Counts and objects travel between CPUs (gloo), so reading them never waits for a GPU; gradients and
features travel between GPUs (NCCL).
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed

from internvl.errors import UserError

T = TypeVar("T")

_LONGEST_WAIT = timedelta(hours=3)
"""Of a rank for another one: rank 0 evaluates and saves while the others wait."""

_ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def init_from_env(device: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """Joins the process group that torchrun describes in the environment, if there is one.

    Args:
        device: What to compute on; auto takes CUDA where there is a GPU.

    Returns:
        This process's own device, made current when it is a GPU.

    Raises:
        UserError: No GPU for this process, or half of torchrun's variables are missing.
    """
    # All five are checked here: LOCAL_RANK is read before torch could complain about the others.
    present = [name for name in _ENV if name in os.environ]
    launched = "WORLD_SIZE" in present or "RANK" in present
    missing = [name for name in _ENV if name not in present]
    if launched and missing:
        raise UserError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}: "
            "start several processes with torchrun, or unset them for a single one"
        )
    local_device = _local_device(device, int(os.environ["LOCAL_RANK"]) if launched else 0)
    if launched and not distributed.is_initialized():
        on_gpu = local_device.type == "cuda"
        # Both on a GPU: counts and objects go through gloo and so never wait for queued kernels.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        distributed.init_process_group(backend, timeout=_LONGEST_WAIT)
    return local_device


def _local_device(device: str, local_rank: int) -> torch.device:
    num_gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return torch.device("cpu")
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
        distributed.destroy_process_group()


def rank() -> int:
    """Returns the number of this process, 0 … world_size - 1."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    """True for the process that writes files and logs."""
    return rank() == 0


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
    distributed.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


def gather_objects(value: T) -> list[T]:
    """Returns every rank's `value`, in rank order, on every rank. Values must pickle."""
    if not distributed.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
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
    return gather_objects(value)[0]
