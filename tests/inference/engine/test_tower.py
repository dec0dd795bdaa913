"""Tiles of many requests at a time, by compiled blocks of any number of tiles."""

import copy

import pytest
import torch
from small_models import small_model
from torch._dynamo.utils import counters

from internvl.data.images import STATISTICS
from internvl.inference import engine
from internvl.inference.engine.tower import Tower


@pytest.mark.slow
@pytest.mark.parametrize("float8", [False, True])
def test_one_graph_serves_any_number_of_tiles(float8, graphs_alone):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if float8 else torch.float32
    model = small_model("InternVL2-2B", (), 0).eval().to(dtype).requires_grad_(False)
    engine.accelerate(model, float8=float8)
    plain = Tower(copy.deepcopy(model), STATISTICS["imagenet"], 8)
    compiled = Tower(model, STATISTICS["imagenet"], 8, compiled=True)
    counters.clear()
    for counts in ((2, 3), (1,), (7, 5), (4, 4), (1, 8, 1)):
        tiles = [torch.randint(0, 256, (n, 3, 56, 56), dtype=torch.uint8) for n in counts]
        for a, b in zip(plain.see(tiles), compiled.see(tiles), strict=True):
            assert float((a - b).norm() / b.norm()) < (0.02 if float8 else 1e-5)
    assert counters["stats"]["unique_graphs"] == 1
