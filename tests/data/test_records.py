"""Records go through a pipe and to a device whole."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from internvl.config import SourceConfig
from internvl.data import formats
from internvl.data.records import PackedBatch, Video
from internvl.errors import BadImage, BadSample


def test_a_bad_sample_comes_out_of_a_worker_as_it_went_in():
    bad = pickle.loads(pickle.dumps(BadSample("x.jsonl line 3", "an answer is empty")))
    assert (bad.name, bad.reason) == ("x.jsonl line 3", "an answer is empty")
    assert str(bad) == "x.jsonl line 3: an answer is empty"


@pytest.mark.parametrize(
    "part",
    [
        *((-1, 1), (1, 0.5), (1, 1), (None, 0.5), (1.5, None), (0, float("inf"))),
        *((float("nan"), 1), (0, float("nan")), (0, 10**400), ("0", "1"), (False, True)),
    ],
)
@pytest.mark.parametrize("path", ["a.mp4", "a.gif", "frames/"])
def test_a_part_of_a_video_is_checked_as_in_a_file(path, part):
    says = "`clip` must be [start, end] in seconds, 0 <= start < end, not "
    with pytest.raises(BadImage) as caught:
        Video(path, *part)
    assert str(caught.value) == f"{says}{[*part]!r}; leave it out for the whole video"
    row = {"conversations": [], "video": path, "clip": [*part]}
    with pytest.raises(BadSample) as of_file:
        formats.chat("x.jsonl line 3", row, SourceConfig(name="x", annotations=Path("x.jsonl")))
    assert str(of_file.value) == f"x.jsonl line 3: {caught.value}"


def test_a_video_is_named_by_its_path():
    assert Video(Path("a.mp4"), np.float32(0.5), np.int64(2)) == Video("a.mp4", 0.5, 2.0)
    assert Video("a.mp4").start_s is None
    for path in (b"a.mp4", None, 3):
        with pytest.raises(BadImage, match=f"by its path, not by {type(path).__name__}$"):
            Video(path)


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
