"""Requests read ahead: in order, errors as they were raised, in threads and in processes."""

import json
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import tiny_run
import torch
from ranks import Forked

from internvl.errors import BadImage
from internvl.inference.engine import reading
from internvl.inference.engine.scheduler import Job
from internvl.inference.requests import Prompt
from internvl.inference.settings import Settings


def read(index):
    if index == 13:
        raise BadImage("image 13 is broken")
    return Prompt(np.full(index + 1, index), torch.full((1, 3, 4, 4), index, dtype=torch.uint8))


def job(index, prompt):
    return Job(index, prompt, Settings(max_new_tokens=4))


@pytest.fixture(params=[0, 2], ids=["threads", "processes"])
def processes(request):
    return request.param


def prompts(order, processes, most=10**9):
    return reading.Prompts(read, job, order, ahead=5, most=most, processes=processes)


def test_in_order(processes):
    order = [3, 0, 2, 9, 1, 8, 7, 12, 10, 11]
    with prompts(order, processes) as source:
        taken = []
        while (one := source.take(wait=True)) is not None:
            taken.append(one)
        assert source.take(wait=False) is None
    assert [one.key for one in taken] == order
    for one in taken:
        assert one.prompt.input_ids.tolist() == [one.key] * (one.key + 1)
        assert torch.equal(one.prompt.tiles, read(one.key).tiles)


def test_an_error_comes_where_its_request_is_taken(processes):
    with prompts([1, 2, 13, 3], processes) as source:
        assert [source.take(wait=True).key for _ in range(2)] == [1, 2]
        with pytest.raises(BadImage, match="image 13 is broken"):
            source.take(wait=True)


def test_whoever_stops_early_leaves_nothing_behind(processes):
    threads, children = threading.active_count(), len(multiprocessing.active_children())
    with prompts(range(12), processes) as source:
        assert source.take(wait=True).key == 0
    # The queues to the workers are closed by threads of their own.
    until = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    assert len(multiprocessing.active_children()) <= children


def test_requests_that_are_too_long_go_elsewhere(processes):
    with prompts([2, 9, 3], processes, most=8) as source:
        assert [source.take(wait=True).key for _ in range(2)] == [2, 3]
        assert source.take(wait=True) is None
    assert [left.key for left in source.too_long] == [9]


def test_processes_where_they_pay(monkeypatch):
    assert reading.processes_for(5) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert reading.processes_for(10**4) in (0, 8)  # 0 where little memory can be shared
    monkeypatch.setattr(reading, "_SHARED", 2**60)
    assert reading.processes_for(10**4) == 0
    monkeypatch.setattr(reading, "_SHARED", 0)
    monkeypatch.setattr(reading, "START_METHOD", None)
    assert reading.processes_for(10**4) == 0


SPAWNED = """
import json
import multiprocessing
from pathlib import Path
import internvl
from internvl.inference.engine import Prompts, shared

# A process that was spawned hands its way of starting on; from Python 3.14 on none forks.
multiprocessing.set_start_method({method!r}, force=True)
processes = 0

def prompts(*args, **options):
    # As on a GPU, whatever cores and memory there are.
    return Prompts(*args, **options | {{"processes": processes}})

shared.Prompts = prompts
chat = internvl.load({model!r}, device="cpu", dtype="float32")
images = sorted(Path({folder!r}).glob("*.png"))
requests = [internvl.Request("What is this?", [images[n % len(images)]]) for n in range(66)]
answers = []
for processes in (0, 2):
    answers.append(chat.answer(requests, max_new_tokens=3))
print(json.dumps(answers))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_does_not_fork_by_itself_reads_by_processes(method, tmp_path):
    tiny_run.make(tmp_path)
    model = str(tmp_path / "start")
    process = Forked(SPAWNED.format(method=method, model=model, folder=str(tmp_path)))
    out, err = process.communicate()
    assert process.poll() == 0, err
    by_threads, by_processes = json.loads(out)
    assert by_processes == by_threads
    assert len(by_threads) == 66
