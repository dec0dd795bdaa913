"""Ranks that share weights: each forward waits for all of them, so all must run as many."""

from typing import Any

from internvl import dist


def in_step(model: Any) -> bool:
    """True if every forward of `model` is collective: some of its weights are cut over the ranks.

    False while all of them are gathered, as in `shard.evaluating`.
    """
    if dist.world_size() == 1:
        return False
    # Here: a single process never needs it, and it takes a second to import.
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def all_done(done: bool) -> bool:
    """True once every rank is done; each asks after every forward."""
    return dist.sum_counts({"busy": float(not done)})["busy"] == 0


def most(count: int) -> int:
    """Returns the largest count of all ranks."""
    return max(dist.gather_objects(count))
