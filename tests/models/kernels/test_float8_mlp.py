"""MLPs in float8 whose activation and rounding are one pass: the same rounding, less often."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model

from internvl.models import kernels
from internvl.models.kernels import float8, float8_mlp

SIZES = ((5, 160), (3, 1000), (130, 4096), (1, 8192))


def definition(states, gate):
    wide = states.double()
    return F.gelu(wide) if gate is None else F.silu(gate.double()) * wide


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_is_the_activation_rounded(size, gated, device):
    torch.manual_seed(0)
    states, gate = (3 * torch.randn(size) for _ in range(2))
    states[0] *= 1e-3
    states, gate = (t.to(device, torch.bfloat16) for t in (states, gate))
    gate = gate if gated else None
    small, scale = float8_mlp.activate(states, gate)
    wanted, wanted_scale = float8.quantize(definition(states, gate))
    assert torch.equal(scale, wanted_scale)
    found = small.double() * scale.double()
    # A tie of the rounding may go either way.
    wrong = found != wanted.double() * wanted_scale.double()
    assert wrong.double().mean() < 1e-3
    error = (found - definition(states, gate)).norm(dim=1) / definition(states, gate).norm(dim=1)
    assert error.max() < 0.035


@pytest.mark.gpu
def test_rows_that_are_zero_or_not_finite():
    states = torch.zeros(4, 64, device="cuda", dtype=torch.bfloat16)
    states[1], states[2, 3], states[3, 5] = 2, torch.inf, torch.nan
    small, scale = float8_mlp.activate(states)
    assert torch.isfinite(scale).all()
    assert small[0].float().eq(0).all()
    assert torch.isfinite(small[1].float()).all()
    assert small[2:].float().isnan().any(1).all()


def test_the_operator_says_what_it_returns():
    states, gate = torch.randn(2, 6, 32).unbind()
    tests = ("test_schema", "test_faketensor")
    operator = torch.ops.internvl.activate_rounded
    torch.library.opcheck(operator, (states, None), test_utils=tests)
    torch.library.opcheck(operator, (states, gate), test_utils=tests)


@pytest.mark.parametrize("name", ["InternVL2-2B", "InternVL2-1B", "InternVL3_5-1B"])
def test_a_model_computes_as_before(name):
    torch.manual_seed(0)
    model = small_model(name, (), 0, dtype="bfloat16").eval()
    kernels.convert_frozen_linears(model, torch.device("cpu"))
    fused = copy.deepcopy(model)
    kernels.fuse_frozen_mlps(fused)
    mlps = [m for m in fused.modules() if type(m).__module__ == float8_mlp.__name__]
    assert len(mlps) == 4
    assert fused.state_dict().keys() == model.state_dict().keys()
    ids = torch.arange(20, 50)[None]
    tiles = torch.randn(1, 3, 56, 56).bfloat16()
    with torch.no_grad():
        for run in (
            lambda m: m(input_ids=ids).logits,
            lambda m: m.model.get_image_features(pixel_values=tiles).pooler_output,
        ):
            a, b = run(fused).float(), run(model).float()
            assert float((a - b).norm() / b.norm()) < 0.03
    # With a gradient it is the layer as it was.
    assert torch.equal(fused(input_ids=ids).logits, model(input_ids=ids).logits)
