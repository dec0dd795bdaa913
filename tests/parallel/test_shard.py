"""Shards train as one process does."""

import pytest
import sharded_runs
import tiny_run


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def test_every_stage_takes_the_steps_of_one_process(project, tmp_path):
    stages = ("zero1", "zero2", "zero3")
    cases = {stage: ["steps=3", f"parallel.shard={stage}"] for stage in stages}
    one = sharded_runs.steps(project, tmp_path, {"one": ["steps=3"]}, num_ranks=1)["one"]
    several = sharded_runs.steps(project, tmp_path, cases, num_ranks=2)
    for stage in stages:
        sharded_runs.assert_same(one, several[stage])
