"""One token of every slot: its attention is plain attention to the keys that it sees."""

import pytest
import torch

from internvl.models.attention import decoding

SHAPES = ((3, 8, 2, 700, 64), (2, 4, 4, 300, 32), (4, 14, 2, 513, 64), (2, 16, 8, 256, 128))
"""Slots, heads, key heads, length, head size."""


def drawn(shape, dtype, device):
    batch, heads, key_heads, length, width = shape
    torch.manual_seed(0)
    query = torch.randn(batch, heads, width).to(device, dtype)
    # As in the engine: one slot more than there are queries, and values beside the keys.
    memory = torch.randn(2, batch + 1, key_heads, length, width).to(device, dtype)
    position = torch.randint(0, length, (batch,))
    position[0], position[-1] = 0, length - 1
    return query, memory[0, :batch], memory[1, :batch], position.to(device)


def plain(query, key, value, position, scale):
    """The definition, slot by slot, in float64."""
    rows = []
    for q, k, v, last in zip(query, key, value, position.tolist(), strict=True):
        groups = len(q) // len(k)
        k, v = (t[:, : last + 1].double().repeat_interleave(groups, 0) for t in (k, v))
        weights = (k @ q.double()[..., None] * scale).softmax(1)
        rows.append((weights * v).sum(1))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.float32, "cpu"),
        pytest.param(torch.float32, "cuda", marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_it_is_attention_to_what_a_slot_holds(shape, dtype, device):
    arguments = (*drawn(shape, dtype, device), shape[-1] ** -0.5)
    found, wanted = decoding.attend(*arguments).double(), plain(*arguments)
    allowed = 1e-5 if (dtype, device) == (torch.float32, "cpu") else 8e-3
    assert float((found - wanted).norm() / wanted.norm()) < allowed


def test_the_operator_says_what_it_returns():
    arguments = (*drawn(SHAPES[0], torch.float32, "cpu"), 0.1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.internvl.decode_attention, arguments, test_utils=tests)
