"""The order of samples: weights, random parts, epochs without any."""

import numpy as np
import pytest
from data_files import chat_line, write_lines
from source_samples import opened, samples

from internvl.config import SourceConfig
from internvl.data import sampler
from internvl.data.sampler import Ending, step_bounds
from internvl.data.sources import open_source
from internvl.errors import DataError


def test_weights(tmp_path):
    def source(name, lines, weight):
        file = write_lines(tmp_path / f"{name}.jsonl", [chat_line(name, "b")] * lines)
        return open_source(SourceConfig(name=name, annotations=file, weight=weight))

    files = [source("a", 30, 1.0), source("b", 10, 3.0)]
    epoch = sampler.SampleOrder(files, share_prefix=True, seed=0)
    shown = [ref.file for ref in epoch.step(0, 40, 40) for _ in ref.lines]
    assert np.bincount(shown).tolist() == [10, 30]


def test_a_random_part(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line(str(i), "b") for i in range(40)])

    def lines(part, seed=0):
        source = opened(file, repeat=0.25, part=part)
        epoch = sampler.SampleOrder([source], share_prefix=True, seed=seed)
        return sorted(line for ref in epoch.step(0, 10, 10) for line in ref.lines)

    assert lines("first") == list(range(10))
    assert lines("random") == lines("random") != lines("first")
    assert lines("random") != lines("random", seed=1)


def test_a_file_that_changes_and_an_epoch_without_samples(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line("a", "b")] * 4)
    source = opened(file, repeat=0.1)
    with pytest.raises(DataError, match="an epoch shows no sample; raise `repeat`"):
        sampler.SampleOrder([source], share_prefix=True, seed=0)
    write_lines(file, [chat_line("a", "b")] * 5)
    with pytest.raises(DataError, match="was changed while it is read"):
        samples(source)


def test_batches_begin_anew_where_a_run_had_ended():
    """23 samples in batches of 5; then 23 more, twice."""
    ended = [Ending(5, 23), Ending(10, 46)]
    bounds = [step_bounds(step, 5, 69, ended) for step in range(15)]
    assert [last - first for first, last in bounds] == [5, 5, 5, 5, 3] * 3
    assert [first for first, _ in bounds[1:]] == [last for _, last in bounds[:-1]]
    assert [step_bounds(step, 5, 23) for step in range(5)] == bounds[:5]
