"""The grid of processes over which a model is sharded and replicated."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from internvl import dist
from internvl.config import ParallelConfig
from internvl.errors import UserError

REPLICAS, SHARDS = "replicas", "shards"
"""Names of the dimensions; the ranks of a copy are neighbours, on as few machines as possible."""


def build(config: ParallelConfig, device: torch.device) -> DeviceMesh | None:
    """Returns the grid of all ranks, (shards,) or (replicas, shards); None if nothing is sharded.

    Collective: every rank calls it.

    Raises:
        UserError: the ranks do not divide into the replicas, or a single one should offload.
    """
    if config.shard == "none":
        return None
    ranks, replicas = dist.world_size(), config.replicas
    problem = config.unfit(ranks)
    if problem is not None:
        raise UserError(problem)
    if ranks == 1:
        return None
    # One dimension: torch sums gradients over each of several, also over one of a single rank.
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=(SHARDS,))
    shape = (replicas, ranks // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=(REPLICAS, SHARDS))
