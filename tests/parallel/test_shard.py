"""Shards train as one process does, whatever rows a rank has."""

import json

import pytest
import sharded_runs
import tiny_run
from sharded_runs import Case

STAGES = ("zero1", "zero2", "zero3")
SMALL_STEPS = ("steps=2", "optim.lr=1e-4")
CUT_TOWER = "units.SMALL_TOWER = 0"
WHOLE_TOWER = "units.SMALL_TOWER = 10**9"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The small project, each sample with a row of its own, every second without an image."""
    folder = tmp_path_factory.mktemp("project")
    recipe = tiny_run.make(folder)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for line in lines[1::2]:
        del line["image"]
        line["conversations"][0]["value"] = line["conversations"][0]["value"].split("\n")[1]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recipe


def test_every_stage_takes_the_steps_of_one_process(project, tmp_path):
    """With a trained tower and tied embeddings; a rank has no row, then no image."""
    settings = ("global_batch=3", "data.max_tokens=64", *SMALL_STEPS)
    one = sharded_runs.take(project, tmp_path, {"one": Case(settings, deal="True")}, num_ranks=1)
    deal = "(rank == 0) == (step == 0 or row.num_tiles > 0)"
    cases = {s: Case((*settings, f"parallel.shard={s}"), deal=deal) for s in STAGES}
    several = sharded_runs.take(project, tmp_path, cases, num_ranks=2)
    for stage in STAGES:
        (_, (rows, tiles)), ((no_rows, _), (texts, no_tiles)) = several[stage].rows
        assert (min(rows, tiles, texts) > 0, no_rows, no_tiles) == (True, 0, 0)
        sharded_runs.assert_same(one["one"], several[stage])
