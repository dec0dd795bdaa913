"""The fused norm is transformers' in float32 and, in bfloat16, nearer to the exact one."""

import torch
from dual_folders import dual_folder
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from internvl.inference import load as loading
from internvl.models.dual.rms_norm import RMSNorm


def both(dtype):
    """Ours and theirs with the same weights, and hidden states."""
    torch.manual_seed(0)
    ours, theirs = (kind(96, eps=1e-5).to(dtype) for kind in (RMSNorm, LlamaRMSNorm))
    weight = torch.randn(96).to(dtype)
    for norm in (ours, theirs):
        norm.weight.data = weight
    return ours, theirs, (3 * torch.randn(32, 96)).to(dtype)


def test_float32_is_equal():
    ours, theirs, hidden = both(torch.float32)
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=1e-6, atol=1e-6)


def test_bfloat16_is_rounded_once():
    ours, theirs, hidden = both(torch.bfloat16)
    exact = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    exact = exact * ours.weight.double()
    errors = [(norm(hidden).double() - exact).abs().mean() for norm in (ours, theirs)]
    assert errors[0] < 0.9 * errors[1]


def test_training_computes_as_transformers():
    """Hidden states keep their type, and a gradient reaches both."""
    ours, theirs, hidden = both(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(hidden), theirs(hidden))
        assert ours(hidden).dtype == torch.bfloat16
    kept = ours.float()(hidden)  # trained weights are in float32, frozen layers' outputs are not
    assert torch.equal(kept, theirs.float()(hidden))


def test_every_norm_of_the_model_is_fused(tmp_path):
    model = loading.load(dual_folder(tmp_path / "model"), device="cpu").model
    found = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert {type(module) for module in found} == {RMSNorm}
    assert len(found) == 3 * 4 + 4 * 2 + 2 * 2 + 1  # of the tower, the layers, cross-attention
