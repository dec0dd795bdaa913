"""The process group: identity on one process, sums and gathers on two."""

import json

import pytest
import torch
from ranks import run_ranks

from internvl import dist

ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

TWO_RANKS = """
import json
from internvl import dist

device = dist.init_from_env("cpu")
rank = dist.rank()
# The order of the names differs between the ranks; the sums must not mix them up.
counts = {"pairs": 3.0, "tokens": 10.0} if rank == 0 else {"tokens": 2.0**40, "pairs": 4.0}
result = {
    "device": str(device),
    "rank": rank,
    "world_size": dist.world_size(),
    "is_main": dist.is_main(),
    "sums": dist.sum_counts(counts),
    "gathered": dist.gather_objects({"rank": rank, "names": ["a"] * rank}),
}
dist.barrier()
dist.shutdown()
result["rank_after"] = dist.rank()
print(json.dumps(result))
"""


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENV:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_identity(no_launcher: None) -> None:
    assert dist.init_from_env("cpu") == torch.device("cpu")
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    counts = {"tokens": 7.0}
    assert dist.sum_counts(counts) == counts
    assert dist.sum_counts(counts) is not counts
    assert dist.gather_objects("x") == ["x"]
    dist.barrier()
    dist.shutdown()


def test_two_ranks_sum_and_gather() -> None:
    results = [json.loads(output) for output in run_ranks(TWO_RANKS)]
    assert [result["rank"] for result in results] == [0, 1]
    assert [result["is_main"] for result in results] == [True, False]
    for result in results:
        assert result["device"] == "cpu"
        assert result["world_size"] == 2
        assert result["sums"] == {"pairs": 7.0, "tokens": 2.0**40 + 10}
        assert result["gathered"] == [{"rank": 0, "names": []}, {"rank": 1, "names": ["a"]}]
        assert result["rank_after"] == 0


def test_half_an_environment_names_what_is_missing(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="not LOCAL_RANK, MASTER_ADDR, MASTER_PORT.*torchrun"):
        dist.init_from_env("cpu")


def test_more_processes_than_gpus_is_an_error(no_launcher: None) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU for the process")
    with pytest.raises(ValueError, match=r"no GPU of its own \(0 visible\)"):
        dist.init_from_env("cuda")


@pytest.mark.gpu
def test_one_process_takes_the_first_gpu(no_launcher: None) -> None:
    assert dist.init_from_env() == torch.device("cuda", 0)
