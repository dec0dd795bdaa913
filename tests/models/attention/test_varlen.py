"""A row's documents by torch's FlashAttention 2, against dense attention under the row's mask."""

import pytest
import torch
import torch.nn.functional as F

from internvl.models.attention import packed, varlen

SIZES = (3, 1, 130, 66)


def row(heads, key_heads, width, dtype, device):
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(SIZES), h, width) for h in (heads, key_heads, key_heads))
    starts = torch.tensor([0, *SIZES]).cumsum(0).to(torch.int32)
    documents = varlen.Documents(starts.to(device), torch.tensor(max(SIZES)))
    return *(t.to(device, dtype) for t in (q, k, v)), documents


def dense(q, k, v, scale):
    """The definition, in float64."""
    document = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    seen = packed.dense_mask(document, torch.zeros_like(document)).to(q.device)
    q, k, v = (t.double().transpose(0, 1)[None] for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
    return mixed[0].transpose(0, 1)


@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (16, 8)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.float32, "cpu"),
        pytest.param(torch.bfloat16, "cuda", marks=pytest.mark.gpu),
        pytest.param(torch.float16, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_each_document_attends_to_itself(heads, width, dtype, device):
    q, k, v, documents = row(*heads, width, dtype, device)
    if device == "cuda":
        assert varlen.supported(q.device, dtype, width)
    mixed, wanted = varlen.attend(q, k, v, documents, 0.11), dense(q, k, v, 0.11)
    assert mixed.is_contiguous()
    allowed = 1e-5 if device == "cpu" else 8e-3
    assert float((mixed.double() - wanted).norm() / wanted.norm()) < allowed


def test_the_operator_says_what_it_returns():
    q, k, v, documents = row(4, 2, 64, torch.float32, "cpu")
    tests = ("test_schema", "test_faketensor")
    arguments = (q, k, v, *documents, 0.1)
    torch.library.opcheck(torch.ops.internvl.documents, arguments, test_utils=tests)


def test_what_it_does_not_take():
    assert not varlen.supported(torch.device("cpu"), torch.bfloat16, 64)
    assert not varlen.supported(torch.device("cuda"), torch.float32, 64)
    assert not varlen.supported(torch.device("cuda"), torch.bfloat16, 512)
