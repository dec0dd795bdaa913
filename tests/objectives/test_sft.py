"""What an objective promises: counts on the CPU, sums of terms, rows that hold what they say."""

import numpy as np
import pytest
import torch

from internvl.config import DataConfig, SftConfig
from internvl.data.packing import make_units
from internvl.data.records import IGNORE, Example
from internvl.objectives import OBJECTIVES

CONTEXT, K = 9, 4
SOURCES = [{"name": "x", "annotations": "x.jsonl"}]


class Encoder:
    context_id = CONTEXT
    tokens_per_tile = K


def units(num_placeholders):
    ids = np.array([1, *[CONTEXT] * num_placeholders, 2, 3, 4])
    labels = np.full(len(ids), IGNORE)
    labels[-2:] = ids[-2:]
    pixels = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    return make_units([Example("a.jsonl line 3", ids, labels, (2,))], pixels, CONTEXT, share=False)


def objective(weighting="token"):
    config = SftConfig(weighting=weighting)
    return OBJECTIVES["sft"](config, DataConfig(sources=SOURCES, max_tokens=64), Encoder())


@pytest.mark.parametrize(("weighting", "count"), [("token", 2), ("sample", 1), ("square", 2**0.5)])
def test_sft_counts_weights(weighting, count):
    sft = objective(weighting)
    (row,) = sft.batches(units(2 * K))
    assert sft.counts(row) == {"sft": pytest.approx(count)}
    assert sft.weights.keys() == {"sft"}


def test_made_up_rows_have_every_shape_and_are_as_real_ones():
    rows = objective().warmup_batches((2, K + 1, 64))
    shapes = [(len(row.document), row.num_tiles) for row in rows]
    assert sorted(shapes) == [(2, 0), (K + 1, 0), (K + 1, 1), (64, 0), (64, 2)]
    for row in rows:
        assert int((row.input_ids == CONTEXT).sum()) == K * row.num_tiles
        assert objective().counts(row) == {"sft": 1}
    assert objective().warmup_batches(()) == []


def test_placeholders_are_counted_before_the_model_sees_them():
    with pytest.raises(AssertionError, match="a.jsonl line 3.*7 placeholders, 8 visual tokens"):
        objective().batches(units(2 * K - 1))
