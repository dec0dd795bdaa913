"""Workers that are killed, crash or raise: what the main process says of it. Real processes."""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import time

import pytest
import tiny_run
from data_files import chat_line, picture, write_lines
from ranks import Forked

from internvl import check, cli, train
from internvl.config import DataConfig, SourceConfig, TilesConfig
from internvl.config.recipes import load_recipe
from internvl.data import formats, loader, row_steps, workers
from internvl.data.sampler import SampleOrder, UnitRef
from internvl.data.sources import open_source
from internvl.errors import BadSample, DataError, WorkerDied

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def source(tmp_path):
    picture(tmp_path / "a.png", (28, 28))
    rows = [chat_line("<image>\nW?", str(n), image="a.png") for n in range(40)]
    file = write_lines(tmp_path / "chat.jsonl", rows)
    return open_source(SourceConfig(name="chat", annotations=file, images=str(tmp_path)))


def steps(source, num_workers, encode=lambda samples, tiles: list(samples)):
    data = DataConfig(sources=(source.config,), tiles=TilesConfig(size=28, max=1))
    order = SampleOrder([source], share_prefix=False, seed=3)
    reader = loader.UnitReader([source], data, encode)
    yield from loader.steps(
        order, reader, list, first=0, last=2, global_batch=20, total=40, workers=num_workers
    )


def at(line, do):
    """An `encode` that does something at a line of the file, in whatever process reads it."""

    def encode(samples, tiles):
        if any(sample.name.endswith(f" line {line}") for sample in samples):
            do()
        return list(samples)

    return encode


def kill(number):
    def do():
        faulthandler.disable()  # pytest's, which would write the stack of the worker
        os.kill(os.getpid(), number)

    return do


class OfThisProcess:
    """Ends any other process that frees it, as a video's scaler would block it."""

    def __init__(self):
        self.process, self.itself = os.getpid(), self

    def __del__(self):
        if os.getpid() != self.process:
            os._exit(7)


def test_a_worker_leaves_the_garbage_of_its_parent_alone(source):
    gc.disable()
    try:
        OfThisProcess()  # in a cycle with itself: garbage, until somebody collects it
        assert len(list(steps(source, 2, at(17, gc.collect)))) == 2
    finally:
        gc.enable()


# Torch looks every five seconds whether its workers live: few of these tests kill one.
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, r"killed by signal 9 \(SIGKILL\).*memory ran out: lower data\.workers"),
        (signal.SIGSEGV, r"signal 11 \(SIGSEGV\).*a decoder or another library crashed"),
    ],
)
def test_a_worker_that_was_killed_is_a_sentence(source, number, said):
    with pytest.raises(WorkerDied, match=said) as raised:
        list(steps(source, 2, at(17, kill(number))))
    assert "chat.jsonl line" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, DataError)


@pytest.mark.parametrize(
    ("code", "how", "said"),
    [
        (-9, None, r"was killed by signal 9 \(SIGKILL\); it was reading a line 3; most likely the"),
        (None, "Killed", r"was killed by signal 9 \(SIGKILL\).*memory ran out"),
        (None, "Bus error", r"signal 7 \(SIGBUS\).*shared memory is full.*--shm-size"),
        (-6, None, r"signal 6 \(SIGABRT\).*a decoder or another library crashed"),
        (-11, None, r"signal 11 \(SIGSEGV\).*remove the file from the annotations"),
        (-15, None, r"signal 15 \(SIGTERM\).*start the same command again"),
        (-63, None, r"signal 63 \("),
        (7, None, r"ended with exit code 7; it was reading a line 3; if the machine's memory"),
        (None, None, r"\(loader worker, pid 5\) ended; it was reading"),
    ],
)
def test_what_a_death_means(code, how, said):
    assert re.search(said, workers.death_sentence(5, code, how, "a line 3"))


def test_the_samples_that_it_had_are_named(source):
    """One worker, groups of eight in the order of the step: those before are handed over."""
    order = SampleOrder([source], share_prefix=False, seed=3)
    refs = order.step(0, 20, 40)
    last = refs[7].lines[0] + 1  # of the first group
    with pytest.raises(WorkerDied) as raised:
        list(steps(source, 1, at(last, kill(signal.SIGKILL))))
    first_group = workers.describe_refs([source], refs[:8])
    assert f"it was reading {first_group};" in str(raised.value)


def test_a_worker_that_exits_is_a_sentence(source):
    with pytest.raises(WorkerDied, match=r"ended with exit code 3; it was reading .*chat"):
        list(steps(source, 1, at(2, lambda: os._exit(3))))


def test_a_worker_that_is_killed_with_a_result_in_hand_is_a_sentence(source):
    read = steps(source, 1)
    next(read)
    (worker,) = multiprocessing.active_children()
    time.sleep(0.5)  # it has sent what comes next, whose images are fetched from it
    worker.kill()
    with pytest.raises(WorkerDied, match=r"killed by signal 9 \(SIGKILL\); it was reading .*chat"):
        next(read)


def test_a_worker_ends_at_its_parents_sigterm_and_at_no_other(source):
    """A scheduler sends one to every process of a job, which then saves and ends by itself."""
    read = steps(source, 1)
    next(read)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert len(list(read)) == 1
    read = steps(source, 1)
    next(read)
    (worker,) = set(multiprocessing.active_children()) - {worker}
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    with pytest.raises(WorkerDied):
        list(read)


def planted():
    raise KeyError("planted")


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_exception_carries_file_and_line(source, num_workers):
    with pytest.raises(KeyError, match="planted") as raised:
        list(steps(source, num_workers, at(17, planted)))
    notes = raised.value.__notes__
    assert notes[0] == f"while reading {source.config.annotations} line 17"
    assert num_workers == 0 or "in planted" in notes[1]  # where the worker was


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_user_can_put_right_arrives_as_it_is(source, num_workers):
    def bad():
        raise BadSample("a.jsonl line 3", "wrong; mend it")

    with pytest.raises(BadSample) as raised:
        list(steps(source, num_workers, at(3, bad)))
    assert str(raised.value) == "a.jsonl line 3: wrong; mend it"


class _TwoArguments(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def test_an_exception_that_cannot_be_pickled_arrives_by_name(source):
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(_TwoArguments(1, 2)))

    def foreign():
        raise _TwoArguments("one", "two")

    with pytest.raises(RuntimeError, match="_TwoArguments: one two") as raised:
        list(steps(source, 1, at(9, foreign)))
    assert raised.value.__notes__[0].endswith("chat.jsonl line 9")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unable to write to file </torch_12_3>: No space left on device (28)", "--shm-size"),
        ("unable to mmap 4 bytes from file </torch_1>: Cannot allocate memory (12)", "--shm-size"),
        ("unable to open shared memory object </torch_1>: Too many open files (24)", "ulimit -n"),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
    ],
)
def test_what_workers_lack_is_a_sentence(source, text, said):
    def lack():
        raise RuntimeError(text)

    with pytest.raises(DataError, match=said):
        list(steps(source, 1, at(5, lack)))


def test_units_are_described_by_file_and_line(source):
    def refs(*lines):
        return [UnitRef(0, lines, 0)]

    file = source.config.annotations
    assert workers.describe_refs([source], refs(4)) == f"{file} line 5"
    assert workers.describe_refs([source], refs(5, 4, 6)) == f"{file} lines 5 to 7"
    assert workers.describe_refs([source], refs(1, 8)) == f"{file} lines 2, 9"


@pytest.mark.parametrize("how", ["is killed by signal: Killed. ", "exited unexpectedly"])
def test_torchs_own_words_from_anywhere(how):
    error = RuntimeError(f"DataLoader worker (pid 12) {how}")
    text = workers.explain(error)
    assert text.startswith("a process that reads data (loader worker, pid 12)")
    assert "memory ran out" in text
    assert workers.explain(RuntimeError("CUDA error")) is None


# The verbs


@pytest.fixture
def project(tmp_path):
    return tiny_run.make(tmp_path / "project")


def kill_at_line_4(monkeypatch):
    """Whoever reads line 4 in a worker is killed, as by the kernel where memory runs out."""
    main, plain = os.getpid(), formats.chat

    def chat(name, row, config):
        if name.endswith(" line 4") and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(name, row, config)

    monkeypatch.setattr(formats, "chat", chat)


def test_check_says_which_lines(monkeypatch, project):
    kill_at_line_4(monkeypatch)
    recipe = load_recipe(project, ["data.workers=1"])
    with pytest.raises(DataError, match=r"SIGKILL.*train\.jsonl lines 1 to 48; most likely the"):
        check.run(recipe)


SPAWNED = """
import multiprocessing
import os
import tiny_run
from pathlib import Path
from internvl import check, cli
from internvl.config.recipes import load_recipe
from internvl.data import loader

# A process that was spawned hands its way of starting on; from Python 3.14 on none forks.
multiprocessing.set_start_method("spawn", force=True)
recipe = tiny_run.make(Path({folder!r}))
assert check.run(load_recipe(recipe, ["data.workers=2"])).problems == []

main, original = os.getpid(), loader.read_rgb

def read(*source):
    with open({read!r}, "a") as file:
        file.write(f"{{os.getpid() == main}} ")
    return original(*source)

loader.read_rgb = read
cli.main(["train", str(recipe), "data.workers=2", "steps=2"])
"""


def test_a_process_that_does_not_fork_by_itself_checks_and_trains(tmp_path):
    """Its workers have what was changed here after the import, which none but a forked one has."""
    folder, read = tmp_path / "project", tmp_path / "read"
    process = Forked(SPAWNED.format(folder=str(folder), read=str(read)))
    _, err = process.communicate()
    assert process.poll() == 0, err
    assert max(tiny_run.losses(folder / "run")) == 2
    assert set(read.read_text().split()) == {"False"}


def test_what_workers_read_with_can_be_pickled(monkeypatch, project):
    """Where a process must not fork (macOS) they are spawned."""
    pickled = []

    class Pickling(workers.Reading):
        def __init__(self, reader, jobs, **options):
            pickled.append(len(pickle.dumps((reader, options["name"]))))
            super().__init__(reader, jobs, **options)

    for module in (check, loader, row_steps):
        monkeypatch.setattr(module, "Reading", Pickling)
    check.run(load_recipe(project, []))
    train.run(load_recipe(project, ["steps=1"]))
    rows = [f"run={project.parent / 'rows'}", "global_batch=null", "global_batch_rows=2"]
    train.run(load_recipe(project, ["steps=1", *rows]))
    assert len(pickled) == 3


def test_the_command_line_says_it(monkeypatch, capsys, project):
    kill_at_line_4(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", str(project), "data.workers=2", "steps=6"])
    err = capsys.readouterr().err
    assert stopped.value.code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("internvl: a process that reads data (loader worker, pid ")
    assert "lower data.workers" in last
    assert "train.jsonl" in last
    assert "Traceback" not in err
