"""Sums and clips the gradients of all ranks."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from internvl import dist

_BUCKET = 2**26
"""Elements of one all-reduce: many small messages are bound by latency."""


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces gradients by their sum over all ranks; one that no rank has stays None.

    A sum, not a mean: losses are divided beforehand by counts over all ranks. Gradients of shards
    are sums already, and stay.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if dist.world_size() == 1 or not parameters:
        return
    # A parameter whose branch no sample of this rank took has no gradient here. All ranks must
    # reduce the same buckets, or they would wait for each other.
    has = {str(i): float(p.grad is not None) for i, p in enumerate(parameters)}
    num_ranks = dist.sum_counts(has)
    reached = [p for i, p in enumerate(parameters) if num_ranks[str(i)]]
    for bucket in _buckets(reached):
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
        summed = torch.cat(flat)
        distributed.all_reduce(summed)
        for p, gradient in zip(bucket, summed.split([p.numel() for p in bucket]), strict=True):
            p.grad = gradient.view_as(p)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yields parameters in order, in groups of one dtype and about `_BUCKET` elements."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) >= _BUCKET
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a global norm of `max_norm`; returns the norm before, ()."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    copies = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    # A norm of shards is a part of the whole until it is summed over ranks; one of copies is not.
    total = nn.utils.get_total_norm(shards)
    assert isinstance(total, DTensor)
    norms = [total.full_tensor(), nn.utils.get_total_norm(copies)]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # Apart: shards may be offloaded to the CPU.
    for tensors in (copies, [gradient.to_local() for gradient in shards]):
        if tensors:
            torch._foreach_mul_(tensors, factor.to(tensors[0].device))
    return norm
