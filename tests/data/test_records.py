"""Records go through a pipe and to a device whole."""

import pickle

import torch

from internvl.data.records import PackedBatch
from internvl.errors import BadSample


def test_a_bad_sample_comes_out_of_a_worker_as_it_went_in():
    bad = pickle.loads(pickle.dumps(BadSample("x.jsonl line 3", "an answer is empty")))
    assert (bad.name, bad.reason) == ("x.jsonl line 3", "an answer is empty")
    assert str(bad) == "x.jsonl line 3: an answer is empty"


def test_a_batch_moves_with_all_its_tensors():
    numbers = torch.arange(4)
    batch = PackedBatch(
        input_ids=numbers[None],
        position_ids=numbers[None],
        document=torch.tensor([0, 0, 0, -1]),
        branch=torch.tensor([0, 0, 1, 0]),
        pixel_values=None,
        loss_positions=numbers[:1],
        targets=numbers[:1],
        loss_weights=torch.ones(1),
        names=("a", "b"),
    )
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.loss_weights.device.type == "meta"
    assert (moved.pixel_values, moved.names) == (None, ("a", "b"))
    assert (batch.num_samples, batch.num_tokens, batch.num_tiles) == (2, 3, 0)
