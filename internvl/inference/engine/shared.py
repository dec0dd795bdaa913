"""Answers of many requests by one scheduler: images read ahead, memory kept between calls."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from internvl.inference.engine.reading import Prompts, processes_for
from internvl.inference.engine.scheduler import Job, Scheduler
from internvl.inference.requests import Prompt

_WORTH_COMPILING = 1000
"""Requests that make up for a minute of compilation."""

Form = tuple[int | None, int]
"""Slots and beams of a scheduler."""


@dataclass
class _Shared:
    """What `one_engine` keeps between calls: requests in all, and a scheduler by its form."""

    count: int
    schedulers: dict[Form, Scheduler] = field(default_factory=dict)


_SHARED: dict[int, _Shared] = {}
"""By the id of a model, inside `one_engine`."""


@contextmanager
def one_engine(model: Any, count: int) -> Iterator[None]:
    """Inside, calls of `ended_jobs` share an engine: its memory, captured graphs, compiled blocks.

    The model's weights must stay as they are. On a GPU the memory stays taken until the end.

    Args:
        count: requests of all calls together. If they are many, a model of which nothing trains
            is compiled; training has compiled its own as it wants it.
    """
    _SHARED[id(model)] = _Shared(count)
    try:
        yield
    finally:
        del _SHARED[id(model)]


def ended_jobs(
    model: Any,
    make: Callable[[bool], Scheduler],
    form: Form,
    read: Callable[[int], Prompt],
    job: Callable[[int, Prompt], Job],
    order: Sequence[int],
    *,
    files: bool,
    most: int = sys.maxsize,
    too_long: Callable[[Job], None] = lambda job: None,
) -> Iterator[Job]:
    """Yields the jobs of requests as they end.

    Args:
        make: builds a scheduler, compiled or not; `form` tells it from others of the model.
        read: encodes request i. job: makes a job of it.
        order: requests in the order in which they are begun.
        files: whether all images are files, which worker processes can read.
        most: jobs whose text reaches so many tokens go to `too_long` at the end, once the memory of
            the scheduler is free.
    """
    on_gpu = model.device.type == "cuda"
    shared = _SHARED.get(id(model))
    scheduler = _scheduler(model, make, form, len(order))
    # As many wait in the scheduler: one row may end many answers at once.
    ahead = scheduler.most_slots // 2 + 8
    processes = processes_for(len(order)) if on_gpu and files else 0
    options: dict[str, Any] = {"ahead": ahead, "most": most, "pin": on_gpu}
    with Prompts(read, job, order, processes=processes, **options) as prompts:
        for answered in scheduler.run(prompts):
            if answered.ended:
                yield answered
    # Only now, for whoever stops earlier leaves requests in it.
    if shared is not None:
        shared.schedulers[form] = scheduler
    del scheduler  # its memory, before the model needs it
    for left in prompts.too_long:
        too_long(left)


def _scheduler(model: Any, make: Callable[[bool], Scheduler], form: Form, count: int) -> Scheduler:
    """Returns the scheduler that `one_engine` keeps, taken out of it, else a new one."""
    shared = _SHARED.get(id(model))
    if shared is not None and form in shared.schedulers:
        return shared.schedulers.pop(form)
    is_frozen = not any(p.requires_grad for p in model.parameters())
    if shared is not None and is_frozen and getattr(model, "hf_quantizer", None) is None:
        count = max(count, shared.count)
    return make(model.device.type == "cuda" and count >= _WORTH_COMPILING)
