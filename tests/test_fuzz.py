"""Whatever a reader is given: it reads it, or one sentence says which file, where, what to do.

`python tests/fuzz.py READER SEED` reads one of these inputs again.
"""

import gc
import importlib
import os
import signal
import time
from dataclasses import replace

import fuzz
import pytest
from fuzz_readers import READERS, remove_seeds

from internvl.errors import BadImage, BadSample, DataError, UserError

FAST = 6
"""Inputs of every reader; of a costly one as many fewer as it costs more, but two."""
SLOW = 480
_PARTS = 4
"""Into which the slow inputs of a reader are cut, so that two processes share them."""

# What a damaged file makes a library warn of is not this test's to judge.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _seeds():
    # Every fork is preceded by a collection, which would walk all that torch has imported.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    remove_seeds()


def judged(reader, seeds, keep):
    """Fails with every distinct failure, each with the command that reads its input again."""
    failures = fuzz.check(reader, seeds, keep)
    first = {failure.reason: failure for failure in reversed(failures)}.values()
    assert not failures, f"{len(failures)} of {len(seeds)} inputs\n" + "\n".join(map(str, first))


def seeds_of(reader, many):
    return range(max(_PARTS, many // reader.cost))


def test_how_many_inputs_there_are():
    """As promised: 300 in the fast tier, 20,000 in the slow one."""
    fast = sum(max(2, FAST // reader.cost) for reader in READERS.values())
    slow = sum(len(seeds_of(reader, SLOW)) for reader in READERS.values())
    assert (fast >= 300, slow >= 20_000) == (True, True), (fast, slow)


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_are_read_or_named(name, tmp_path):
    reader = READERS[name]
    judged(reader, range(max(2, FAST // reader.cost)), tmp_path / "inputs")


@pytest.mark.slow_fuzz
@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_inputs_are_read_or_named(name, part, tmp_path):
    reader = READERS[name]
    seeds = [1000 + seed for seed in seeds_of(reader, SLOW)][part::_PARTS]
    judged(reader, seeds, tmp_path / "inputs")


# That it would be seen


def plant(monkeypatch, dotted, error):
    """Puts a function that raises where a dotted name, or `NAME:KEY` of a table, is."""

    def broken(*args, **kwargs):
        raise error

    path, _, key = dotted.partition(":")
    names = path.split(".")
    for cut in range(len(names) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(names[:cut]))
        except ModuleNotFoundError:
            continue
        for name in names[cut:-1]:
            owner = getattr(owner, name)
        break
    if key:
        monkeypatch.setitem(getattr(owner, names[-1]), key, broken)
    else:
        monkeypatch.setattr(owner, names[-1], broken)


@pytest.mark.parametrize(
    ("name", "inner"), [(name, inner) for name, reader in READERS.items() for inner in reader.inner]
)
def test_a_planted_error_is_seen(monkeypatch, name, inner):
    """Also where a reader takes a KeyError for a wrong form: then the good input is refused."""
    fuzz.seed_copy(name)  # before: making the good input may call the function as well
    plant(monkeypatch, inner, KeyError("planted"))
    assert fuzz.check(READERS[name], range(2))


def of_chat(monkeypatch, do):
    """The failures of one damaged chat file whose reading does something."""
    fuzz.seed_copy("chat")
    reader = READERS["chat"]

    def read(folder):
        return reader.read(folder) if folder.name == "good" else do()

    return fuzz.check(replace(reader, read=read), range(2))


def test_a_crash_is_seen_and_the_next_input_is_read(monkeypatch):
    failures = of_chat(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert [failure.seed for failure in failures] == [0, 1]
    assert {failure.reason for failure in failures} == {"the process is killed by SIGKILL"}


def test_a_hang_is_seen(monkeypatch):
    monkeypatch.setattr(fuzz, "MOST_CPU_S", 0.05)

    def hang():
        end = time.process_time() + 5
        while time.process_time() < end:
            pass

    assert [failure.reason[:5] for failure in of_chat(monkeypatch, hang)] == ["hangs", "hangs"]


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (DataError("a.jsonl line 3: not JSON; save it again"), None),
        (BadImage("a.jsonl is a folder"), None),
        (BadSample("a.jsonl line 3", "the image is cut; replace the file"), None),
        (KeyError("a.jsonl"), "KeyError is no user's"),
        (ValueError("a.jsonl: wrong; save it again"), "ValueError is no user's"),
        (UserError(""), "an empty sentence"),
        (UserError("a.jsonl: check " + "x" * 4000), "a very long sentence"),
        (UserError("not JSON; save it again"), "names no file"),
        (UserError("a.jsonl: wrong"), "says no remedy"),
        (UserError("a.jsonl: 'int' object is not iterable; fix"), "library internals"),
        (UserError("a.jsonl: check it\nTraceback (most recent call"), "library internals"),
    ],
)
def test_what_counts_as_a_sentence(tmp_path, error, wrong):
    (tmp_path / "a.jsonl").write_text("")
    found = fuzz.sentence_problem(error, tmp_path)
    assert found == wrong if wrong is None else wrong in found


def test_an_input_is_made_of_its_name_and_number(tmp_path):
    def content(seed, name):
        folder = tmp_path / name
        folder.mkdir()
        files = fuzz.make_case(READERS["recipe"], seed, folder)
        return [file.read_bytes() if file.is_file() else file.exists() for file in files]

    assert content(5, "a") == content(5, "b") != content(6, "c")
