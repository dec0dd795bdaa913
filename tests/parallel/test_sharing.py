"""Samples shared among real ranks: each read once, evened out, the same steps as one rank has."""

import json
from itertools import chain
from pathlib import Path

import pytest
from data_files import chat_line, write_lines
from ranks import run_ranks

READ = """
import json, sys
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, {tests!r})
from data.test_row_steps import Lengths, data_of
from internvl import dist
from internvl.config import SourceConfig
from internvl.data import loader
from internvl.data.row_steps import row_steps
from internvl.data.sampler import Position, SampleOrder
from internvl.data.sources import open_source
from internvl.parallel.sharing import Sharing

dist.init_from_env("cpu")
order = SampleOrder(
    [open_source(SourceConfig(name="s", annotations=Path({path!r})))], share_prefix=False, seed=5
)
reads = []


class Counting(Lengths):
    def __getitem__(self, ref):
        reads.append(ref.lines)
        return super().__getitem__(ref)


def cost(unit):
    return float(unit.num_tokens + 20 * unit.num_tiles)


def row_cost(row):
    return sum(map(cost, row))


def shown(row):
    for unit in row:  # the pixels travelled along, and are the sample's
        line = int(unit.examples[0].name.split(":")[1])
        assert unit.tiles is None or (unit.tiles == line).all()
    return [unit.examples[0].name for unit in row]


def steps_of(steps):
    return [
        dict(
            rows=[shown(row) for row in step.batches],
            costs=[row_cost(row) for row in step.batches],
            bad=[bad.name for bad in step.bad],
            position=repr(step.position),
        )
        for step in steps
    ]


def pack(units):  # as many rows as there are units of tiles
    with_tiles = sum(unit.num_tiles > 0 for unit in units)
    return [units[n :: with_tiles] for n in range(with_tiles)]


sharing = Sharing(cost, row_cost) if dist.world_size() > 1 else None
def shared(units):
    return sharing.align(pack(sharing.even(units))) if sharing else pack(units)


def in_rows(units):
    return sharing.rows(units, (60, 100), 7) if sharing else [units]


rank, world_size = dist.rank(), dist.world_size()
result = {{"batch": steps_of(loader.steps(
    order, Counting({{7, 31}}), shared, first=0, last=3, global_batch=24, total=72,
    rank=rank, world_size=world_size,
))}}
result["rows"] = steps_of(loader.steps(
    order, Counting({{7, 31}}), in_rows, first=0, last=3, global_batch=24, total=72,
    rank=rank, world_size=world_size,
))
for packing in ("best-fit", "official"):
    reads.clear()

    def of(first, last, position):
        return row_steps(
            order, Counting({{7, 31}}), lambda rows: [list(row) for row in rows], data_of(packing),
            num_rows=4, position=position, first=first, last=last, sharing=sharing,
        )

    whole = list(of(0, 6, Position()))
    result[packing] = steps_of(whole)
    result[packing + " reads"] = len(reads)
    result[packing + " resumed"] = steps_of(of(4, 6, whole[3].position))
print(json.dumps(result))
dist.shutdown()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What one rank and three ranks get, in turn."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    write_lines(path, [chat_line("Say", str(n)) for n in range(50)])
    code = READ.format(tests=str(Path(__file__).parents[1]), path=str(path))
    return [[json.loads(out) for out in run_ranks(code, num_ranks=n)] for n in (1, 3)]


def names(steps):
    return [sorted(name for row in step["rows"] for name in row) for step in steps]


def together(ranks, key):
    by_step = zip(*(names(rank[key]) for rank in ranks), strict=True)
    return [sorted(chain.from_iterable(of_ranks)) for of_ranks in by_step]


def test_steps_of_samples_are_those_of_one_rank_at_nearly_equal_cost(outputs):
    (alone,), ranks = outputs
    assert together(ranks, "batch") == names(alone["batch"])
    bad = [sorted(b for r in ranks for b in r["batch"][n]["bad"]) for n in range(3)]
    assert bad == [sorted(step["bad"]) for step in alone["batch"]]
    for steps in zip(*(r["batch"] for r in ranks), strict=True):
        loads = [sum(step["costs"]) for step in steps]
        assert max(loads) < 1.03 * sum(loads) / 3
        for step in steps:
            assert step["costs"] == sorted(step["costs"], reverse=True)


def test_rows_are_as_many_on_every_rank_and_fit(outputs):
    (alone,), ranks = outputs
    assert together(ranks, "rows") == names(alone["rows"])
    for steps in zip(*(rank["rows"] for rank in ranks), strict=True):
        assert len({len(step["rows"]) for step in steps}) == 1
        loads = [sum(step["costs"]) for step in steps]
        assert max(loads) < 1.25 * sum(loads) / 3  # rows of two or three pieces, nearly full


@pytest.mark.parametrize("packing", ["best-fit", "official"])
def test_steps_of_rows_are_those_of_one_rank_and_each_sample_is_read_once(outputs, packing):
    (alone,), ranks = outputs
    for n, step in enumerate(alone[packing]):
        dealt = [rank[packing][n] for rank in ranks]
        rows = [row for rank in dealt for row in rank["rows"] if row]
        assert sorted(rows) == sorted(step["rows"])
        assert {rank["position"] for rank in dealt} == {step["position"]}
        assert sorted(b for rank in dealt for b in rank["bad"]) == sorted(step["bad"])
        assert max(len(rank["rows"]) for rank in dealt) == 2  # four rows for three ranks
    # A round is read at once, so the ranks may be one round ahead.
    assert sum(rank[f"{packing} reads"] for rank in ranks) <= alone[f"{packing} reads"] + 3 * 8
    for output in (alone, *ranks):
        resumed = output[f"{packing} resumed"]
        assert names(resumed) == names(output[packing][4:])
        assert [s["position"] for s in resumed] == [s["position"] for s in output[packing][4:]]
