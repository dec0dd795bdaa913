"""Steps counted in rows: every sample once, the same rows for any ranks, and from any position."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from data_files import chat_line, write_lines

from internvl.config import DataConfig, SourceConfig
from internvl.data.loader import Read
from internvl.data.packing import Buffer, official_rows
from internvl.data.records import IGNORE, Example, Unit
from internvl.data.row_steps import row_steps
from internvl.data.sampler import Position, SampleOrder
from internvl.data.sources import open_source
from internvl.errors import BadSample, DataError


class Lengths:
    """A unit per line, of as many tokens and tiles as drawn from its number; some lines are bad."""

    def __init__(self, bad=()):
        self.bad = bad

    def __getitem__(self, ref):
        read = Read()
        for line in ref.lines:
            name = f"{ref.epoch}:{line}"
            if line in self.bad:
                read.bad.append(BadSample(name, "unreadable"))
                continue
            draw = np.random.default_rng((line, ref.epoch))
            ids = np.full(int(draw.integers(4, 60)), line)
            tiles = int(draw.integers(0, 4))
            pixels = torch.full((tiles, 3, 2, 2), line, dtype=torch.uint8) if tiles else None
            example = Example(name, ids, np.full(len(ids), IGNORE))
            read.units.append(Unit((example,), 0, pixels))
        return read


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    write_lines(path, [chat_line("Say", str(n)) for n in range(50)])
    return [open_source(SourceConfig(name="s", annotations=path))]


def data_of(packing, workers=0):
    limits = {"max_tokens": 64, "row_tokens": 100, "max_tiles": 7, "packing_buffers": 5}
    return DataConfig(packing=packing, workers=workers, **limits)


def run(files, packing, *, rows=4, first=0, last=12, position=None, workers=0, bad=()):
    order = SampleOrder(files, share_prefix=False, seed=5)
    return list(
        row_steps(
            order,
            Lengths(bad),
            lambda groups: [list(group) for group in groups],
            data_of(packing, workers),
            num_rows=rows,
            position=position or Position(),
            first=first,
            last=last,
        )
    )


def names(step):
    return [[unit.examples[0].name for unit in row] for row in step.batches]


def flat(step):
    return [name for row in names(step) for name in row]


def waiting(files, position):
    order = SampleOrder(files, share_prefix=False, seed=5)
    refs = [
        order.group_at(sample) for row in (*position.closed, *position.open) for sample, _ in row
    ]
    return [f"{ref.epoch}:{ref.lines[0]}" for ref in refs]


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("packing", ["best-fit", "official"])
def test_a_step_has_its_rows_and_no_sample_is_lost_or_comes_twice(files, packing, rows):
    steps = run(files, packing, rows=rows, bad={7, 31})
    assert all(len(step.batches) == rows for step in steps)
    trained = [name for step in steps for name in flat(step)]
    held = waiting(files, steps[-1].position)
    order = SampleOrder(files, share_prefix=False, seed=5)
    read = [
        f"{ref.epoch}:{line}"
        for ref in islice(order.groups_from(0), steps[-1].num_seen)
        for line in ref.lines
    ]
    listed = [bad.name for step in steps for bad in step.bad]
    assert Counter(trained) + Counter(held) + Counter(listed) == Counter(read)
    assert max(Counter(read).values()) == 1
    for step in steps:
        for row in step.batches:
            assert sum(unit.num_tokens for unit in row) <= 100
            assert sum(unit.num_tiles for unit in row) <= 7


def test_no_sample_waits_for_ever(files):
    """The piece at the head of the queue is in the next step, whatever its size."""
    for rows in (1, 3):
        previous = None
        for step in run(files, "best-fit", rows=rows, last=30):
            if previous is not None and previous.open[0]:
                head = waiting(files, replace(previous, open=(previous.open[0][:1],)))
                assert head[0] in flat(step)
            previous = step.position


def test_official_rows_are_one_stream_whatever_a_step_takes(files):
    def stream(rows):
        return [
            row
            for step in run(files, "official", rows=rows, last=24 // rows)
            for row in names(step)
        ]

    order = SampleOrder(files, share_prefix=False, seed=5)
    units = [u for ref in islice(order.groups_from(0), 150) for u in Lengths()[ref].units]
    pieces = [Buffer(u.num_tokens, max(1, u.num_tiles), [u.examples[0].name]) for u in units]
    wanted = [row.pieces for row in official_rows(pieces, 100, 7, 5)][:24]
    assert stream(1) == stream(4) == stream(8) == wanted


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of few cores
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("packing", ["best-fit", "official"])
def test_it_goes_on_from_the_position_of_any_step(files, packing, workers):
    whole = run(files, packing, bad={7, 31})
    for done in (1, 5, 10):
        position = whole[done - 1].position
        rest = run(files, packing, bad={7, 31}, first=done, position=position, workers=workers)
        assert [names(step) for step in rest] == [names(step) for step in whole[done:]]
        assert [step.position for step in rest] == [step.position for step in whole[done:]]
        assert [[str(b) for b in s.bad] for s in rest] == [
            [str(b) for b in s.bad] for s in whole[done:]
        ]


def test_a_group_of_an_image_stays_whole(tmp_path):
    lines = [chat_line("<image>\nWhat?", str(n), image=f"{n // 3}.png") for n in range(30)]
    write_lines(tmp_path / "chat.jsonl", lines)
    source = SourceConfig(name="s", annotations=tmp_path / "chat.jsonl")
    order = SampleOrder([open_source(source)], share_prefix=True, seed=1)
    refs = list(islice(order.groups_from(0), 25))
    for window in (1, 2, 7, 30):
        assert list(islice(order.groups_from(0, window), 25)) == refs
    assert all(len(ref.lines) == 3 for ref in refs)
    assert order.group_at(33) == refs[11]
    assert order.between(0, 60) == refs[:20]


def test_data_of_which_nothing_can_be_read_end_in_a_sentence(files):
    with pytest.raises(DataError, match="no sample of a whole epoch can be read; the last: "):
        run(files, "best-fit", bad=range(50))


def test_a_waiting_sample_that_is_gone_is_named(files):
    position = run(files, "official", last=1)[0].position
    line = int(waiting(files, position)[0].split(":")[1])
    with pytest.raises(DataError, match=r"waits for a row and cannot be read as it was: .*unread"):
        run(files, "official", first=1, position=position, bad={line})
