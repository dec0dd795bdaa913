"""Whatever a reader is given: it reads it, or says in one sentence which file, where, and what to do.

`python tests/fuzz.py READER SEED` reads one of these inputs again.
"""

import importlib
from pathlib import Path

import fuzz
import pytest
from fuzz_readers import READERS, remove_seeds

from internvl.config import UserError
from internvl.data.images import BadImage
from internvl.data.records import BadSample, DataError

FAST, SLOW = 8, 440
"""Inputs of every reader; of a costly one as many fewer as it costs more."""
_PARTS = 4
"""Into which the slow inputs of a reader are cut, so that two processes share them."""

pytestmark = [
    # What a damaged file makes a library warn of is not this test's to judge.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module", autouse=True)
def _seeds():
    yield
    remove_seeds()


def judged(reader, seeds, keep):
    """Fails with every distinct failure, each with the command that reads its input again."""
    failures = fuzz.check(reader, seeds, keep)
    first = {failure.reason: failure for failure in reversed(failures)}.values()
    assert not failures, f"{len(failures)} of {len(seeds)}\n" + "\n".join(map(str, first))


def kept(name):
    """Where a failing input stays after the test."""
    return Path("/tmp") / "fuzz" / name


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_are_read_or_named(name, tmp_path):
    reader = READERS[name]
    judged(reader, range(max(1, FAST // min(reader.cost, 4))), tmp_path / "inputs")


@pytest.mark.slow_fuzz
@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_inputs_are_read_or_named(name, part, tmp_path):
    reader = READERS[name]
    many = max(_PARTS, SLOW // reader.cost)
    judged(reader, range(1000 + part, 1000 + many, _PARTS), tmp_path / "inputs")
