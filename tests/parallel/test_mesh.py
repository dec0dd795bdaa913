"""The grid of processes; what does not divide is refused."""

import pytest
import torch
from ranks import run_ranks

from internvl.config import ParallelConfig
from internvl.errors import UserError
from internvl.parallel import mesh

GRIDS = """
from internvl import dist
from internvl.config import ParallelConfig
from internvl.errors import UserError
from internvl.parallel import mesh

device = dist.init_from_env("cpu")
assert mesh.build(ParallelConfig(), device) is None
grid = mesh.build(ParallelConfig(shard="zero2"), device)
print(grid.mesh_dim_names, tuple(grid.shape))
try:
    mesh.build(ParallelConfig(shard="zero3", replicas=2), device)
except UserError as error:
    print(error)
"""


def test_one_process_shards_nothing():
    device = torch.device("cpu")
    assert mesh.build(ParallelConfig(shard="zero3"), device) is None
    with pytest.raises(UserError, match=r"optim\.offload=true"):
        mesh.build(ParallelConfig(shard="zero3", offload="cpu"), device)


def test_ranks_must_divide_into_copies_of_two_or_more():
    for out in run_ranks(GRIDS):
        grid, refused = out.splitlines()
        assert grid == "('shards',) (2,)"
        assert "2 processes do not divide into 2 copies" in refused
