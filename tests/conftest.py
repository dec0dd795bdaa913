"""What every test shares: few threads, its own caches, its CPU seconds; `gpu` tests skip where
there is no device."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cpu_seconds
import pytest

# Read when torch is imported, here and in the processes that tests start. The models are so small
# that threads cost more than they bring, and far more where two test runs share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What torch's compiler built lasts until .pytest_cache goes, not until /tmp is emptied; its parts
# are found by what they were built from, so an old one is never run.
_COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "inductor"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_COMPILED))
# torch's distributed checkpoints note the begin and end of every value, which pytest would format:
# a third of what the tests of whole runs took.
logging.disable(logging.DEBUG)
# No test uses the network: Weights & Biases keeps metrics in the run's folder, and its own errors.
os.environ.update(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false", WANDB_SILENT="true")

# These talk with OpenAI's client, which a machine that runs `-m gpu` alone may lack.
collect_ignore = [] if find_spec("openai") else ["serve"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-durations",
        action="store_true",
        help="commit this run's CPU seconds per file to tests/durations.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(cpu_seconds.CpuSeconds(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    # On a GPU torch's compiler and FlashAttention's DSL warn about themselves, each version
    # differently; what our own code warns of is an error in the same paths on a CPU.
    for item in marked:
        item.add_marker(pytest.mark.filterwarnings("default"))
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes of annotation files go where the tests end, not into the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def graphs_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled blocks run as the graphs that torch's compiler cut them into.

    What is kept for the backward pass is decided by then; to write and build the code of these
    graphs would take most of the time.
    """
    import torch
    from torch._inductor import compile_fx

    torch._dynamo.reset()
    whole = partial(compile_fx.compile_fx, inner_compile=lambda graph, _, **settings: graph)
    monkeypatch.setattr(compile_fx, "compile_fx", whole)
    yield
    torch._dynamo.reset()  # what was compiled counts against other tests' limits
