"""Attention backends and row lengths that a recipe resolves to."""

import pytest
import torch
from transformers import LlamaConfig

from internvl.compute import backends
from internvl.config import ComputeConfig, DataConfig
from internvl.models.attention import packed
from internvl.models.attention.packed import BLOCK

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SOURCES = [{"name": "x", "annotations": "x.jsonl"}]


@pytest.mark.parametrize(
    ("compute", "device", "lengths"),
    [
        ({}, CPU, ()),
        ({}, GPU, (640, 1024)),
        ({"attention": "dense", "compile": False}, GPU, ()),
        ({"attention": "flash"}, GPU, (640, 1024)),  # a plan needs no GPU
        ({"compile": True}, CPU, (640, 1024)),
    ],
)
def test_lengths_of_rows(compute, device, lengths):
    data = DataConfig(sources=SOURCES, max_tokens=500, row_tokens=1000)
    assert backends.row_lengths(ComputeConfig(**compute), device, data) == lengths
    assert all(length % BLOCK == 0 for length in lengths)


@pytest.mark.parametrize(
    ("heads", "kind"), [(8, packed.FLASH), (4, packed.FLASH), (16, packed.FLEX)]
)
def test_heads_of_other_sizes_are_left_to_flex(heads, kind):
    """A kernel of FlashAttention 4 did not compile for heads of 16."""
    text = LlamaConfig(hidden_size=512, num_attention_heads=heads)
    names = backends.attention_kernels("flash", text)
    assert names == {"text_config": kind, "vision_config": packed.TOWER}


def test_eager_attention_writes_scores_out() -> None:
    """Fused attention is off inside, and back on afterwards."""
    for kind, fused in (("eager", False), ("auto", True), ("dense", True)):
        with backends.math_attention(ComputeConfig(attention=kind)):
            assert torch.backends.cuda.flash_sdp_enabled() == fused
    assert torch.backends.cuda.flash_sdp_enabled()
