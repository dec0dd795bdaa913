"""dropped: LoRA's dropout from a seed is dropout, the same in every kernel and on every device."""

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from small_models import small_model
from torch import nn

from internvl.models.adapters import dropout as dropout_layers
from internvl.models.adapters import fused_lora, seeded_dropout

RATE = 0.05


def tensors(rows, inputs, rank, dtype=torch.float32, device="cpu"):
    """(x, A, gradient of A x as the product with the base leaves it, seed)."""
    torch.manual_seed(0)
    x, a = torch.randn(rows, inputs), torch.randn(rank, inputs)
    du = torch.randn(rows, inputs + rank)
    return *(t.to(device, dtype) for t in (x, a, du)), seeded_dropout.seed(torch.device(device))


def test_masks_are_independent_draws_at_the_rate():
    seeds = [seeded_dropout.seed(torch.device("cpu")) for _ in range(3)]
    masks = [seeded_dropout.mask(seed, 800, 1000, RATE).float() for seed in seeds]
    for mask in masks:
        spread = (RATE * (1 - RATE) / mask.numel()) ** 0.5
        assert abs(float(mask.mean()) - RATE) < 5 * spread
        # As far between rows and between columns as binomial draws are.
        assert float(mask.mean(0).std()) == pytest.approx((RATE * (1 - RATE) / 800) ** 0.5, rel=0.1)
        assert float(mask.mean(1).std()) == pytest.approx(
            (RATE * (1 - RATE) / 1000) ** 0.5, rel=0.1
        )
        for shift in ((0, 1), (1, 0), (1, 1), (0, 8)):
            both = (mask * mask.roll(shift, (0, 1))).mean()
            assert abs(float(both) - RATE**2) < 5 * spread * RATE**0.5
    both = (masks[0] * masks[1]).mean()
    assert abs(float(both) - RATE**2) < 5 * spread * RATE**0.5
    torch.manual_seed(3)
    first = seeded_dropout.seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, seeded_dropout.seed(torch.device("cpu")))


def test_the_operators_apply_that_mask():
    x, a, du, seed = tensors(70, 200, 16)
    mask = seeded_dropout.mask(seed, 70, 200, 0.3)
    seen = x.masked_fill(mask, 0) / 0.7
    torch.testing.assert_close(seeded_dropout.down(x, a, seed, 0.3), F.linear(seen, a))
    du = du[:, 200:]
    through, da = seeded_dropout.back(du, x, a, seed, 0.3)
    torch.testing.assert_close(through, (du @ a).masked_fill(mask, 0) / 0.7)
    torch.testing.assert_close(da / 0.7, du.t() @ seen)
    operators = torch.ops.internvl
    for operator, arguments in (
        (operators.dropped_down, (x, a)),
        (operators.dropped_back, (du, x, a)),
    ):
        tests = ("test_schema", "test_faketensor")  # no gradient: fused_lora.py has its own
        torch.library.opcheck(operator, (*arguments, seed, 0.3), test_utils=tests)


def block_with_adapters(device="cpu"):
    """A decoder layer, its adapters with dropout, in float32."""
    torch.manual_seed(0)
    sizes = {"text": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}}
    model = small_model("InternVL2-2B", (), 8, dropout=0.25, dtype="float32", sizes=sizes)
    for module in model.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.lora_B["default"].weight, std=0.05)
    return model.to(device).train()


def gradients(model, device):
    ids = torch.arange(40, device=device)[None] % 30 + 10
    torch.manual_seed(1)
    output = model(input_ids=ids).logits.float()
    output.square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.detach(), found


def masked_draw(seed_of):
    """`draw` of a layer: the mask of the seed that the kernels would have."""

    def draw(self, inputs):
        rows = inputs.numel() // inputs.shape[-1]
        return seeded_dropout.mask(
            seed_of(self, inputs), rows, inputs.shape[-1], self.rate
        ).view_as(inputs)

    return draw


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_with_it_trains_as_with_the_same_masks_in_memory(monkeypatch, compiled):
    plain = block_with_adapters()
    seeded = block_with_adapters()
    fused_lora.fuse(seeded)
    monkeypatch.setattr(seeded_dropout, "used", lambda x: True)
    if compiled:
        for layer in seeded.model.language_model.layers:
            layer.compile(dynamic=True, options={"fallback_random": True})
    found = gradients(seeded, "cpu")
    for kind in (dropout_layers.DrawnDropout, dropout_layers.RepeatedDropout):
        monkeypatch.setattr(kind, "draw", masked_draw(kind.draw_seed))
    wanted = gradients(plain, "cpu")
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 96, 16), (770, 3200, 16), (4200, 4096, 8), (500, 2048, 128)])
def test_the_kernels_on_a_gpu(shape, dtype):
    x, a, du, seed = tensors(*shape, dtype, "cuda")
    du = du[:, shape[1] :]
    allowed = 1e-5 if dtype == torch.float32 else 8e-3
    mask = seeded_dropout.mask(seed, *shape[:2], RATE)
    seen = x.double().masked_fill(mask, 0)
    through, da = seeded_dropout.back(du, x, a, seed, RATE)
    through_a = (du.double() @ a.double()).masked_fill(mask, 0) / (1 - RATE)
    for found, wanted in (
        (seeded_dropout.down(x, a, seed, RATE), seen @ a.double().t() / (1 - RATE)),
        (through, through_a),
        (da, du.double().t() @ seen),
    ):
        assert float((found.double() - wanted).norm() / wanted.norm()) < allowed


@pytest.mark.gpu
def test_a_compiled_layer_on_a_gpu():
    model = block_with_adapters("cuda")
    fused_lora.fuse(model)
    wanted = gradients(model, "cuda")
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True, options={"fallback_random": True})
    found = gradients(model, "cuda")
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-4)
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 1e-3, name
