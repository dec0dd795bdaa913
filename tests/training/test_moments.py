"""Moments in 8 bits in checkpoints of any number of ranks."""

import pytest
import stopped_runs
import tiny_run
import torch
from tiny_run import losses

pytestmark = pytest.mark.slow

# torchao compiles its step, which a CPU takes minutes for.
EAGER = "os.environ['TORCHDYNAMO_DISABLE'] = '1'"
SETTINGS = ("optim.name=adamw-8bit", "compute.compile=false", "steps=3")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    pytest.importorskip("torchao")
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def run(project, folder, *settings, **options):
    stopped_runs.run(project, folder, *SETTINGS, *settings, before=EAGER, **options)
    return torch.tensor([*losses(folder).values()], dtype=torch.float64)


def test_moments_in_8_bits_go_on_exactly_and_on_other_ranks(project, tmp_path):
    """Shards of some matrices cut blocks: their moments are in float32 there, alone in 8 bits."""
    zero3 = "parallel.shard=zero3"
    straight = run(project, tmp_path / "straight", zero3, num_ranks=2)
    run(project, tmp_path / "again", zero3, num_ranks=2, until=1)
    assert torch.equal(run(project, tmp_path / "again", zero3, num_ranks=2), straight)
    run(project, tmp_path / "other", zero3, num_ranks=2, until=1)
    run(project, tmp_path / "other", num_ranks=1, until=2)
    other = run(project, tmp_path / "other", "parallel.shard=zero2", num_ranks=2)
    torch.testing.assert_close(other, straight, rtol=1e-3, atol=0)
