"""dropped: LoRA's dropout from a seed is dropout, the same in every kernel and on every device."""

import pytest
import torch
from peft.tuners.lora import Linear
from small_models import small_model
from torch import nn

from internvl.models.adapters import dropout as dropout_layers
from internvl.models.adapters import fused_lora, seeded_dropout

RATE = 0.05


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


def test_the_mask_of_a_backward_pass_is_that_of_the_forward_pass():
    seed = seeded_dropout.seed(torch.device("cpu"))
    mask = seeded_dropout.mask(seed, 70, 201, 0.3)
    assert torch.equal(mask, seeded_dropout.mask(seed, 70, 201, 0.3, again=True))
    x = torch.randn(2, 35, 201, requires_grad=True)
    output = seeded_dropout.drop(x, seed, 0.3)
    torch.testing.assert_close(output, x.masked_fill(mask.view(x.shape), 0) / 0.7)
    output.backward(gradient := torch.randn_like(output))
    torch.testing.assert_close(x.grad, gradient.masked_fill(mask.view(x.shape), 0) / 0.7)


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
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("unknown", [(), (0,), (0, 1)])
# The last one has more entries than 31 bits count, so the kernel's indices have 64.
@pytest.mark.parametrize("shape", [(2, 96), (4200, 4096), (500, 12801), (2**17 + 1, 2**14)])
def test_a_gpu_draws_the_mask_of_a_cpu(shape, unknown, again):
    def drawn(seed, x):
        return seeded_dropout.mask(seed, *x.shape, RATE, again=again)

    seed = seeded_dropout.seed(torch.device("cpu"))
    x = torch.empty(shape, device="cuda", dtype=torch.uint8)
    torch._dynamo.reset()  # or sizes of this case would be unknown for having been others before
    for dimension in unknown:
        torch._dynamo.mark_dynamic(x, dimension)
    found = torch.compile(drawn, dynamic=bool(unknown))(seed.cuda(), x)
    # The first rows and the last ones, which start where a seed moved on would.
    count = min(shape[0], 300)
    skipped = shape[0] - count
    last = seed + torch.tensor([skipped * shape[1] % 2**32, 0]).to(torch.int32)
    for rows, start in ((found[:count], seed), (found[skipped:], last)):
        assert torch.equal(rows.cpu(), seeded_dropout.mask(start, count, shape[1], RATE))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_a_compiled_layer_on_a_gpu(monkeypatch, fused):
    model = block_with_adapters("cuda")
    if fused:
        fused_lora.fuse(model)
    layers = model.model.language_model.layers
    for kind in (dropout_layers.DrawnDropout, dropout_layers.RepeatedDropout):
        monkeypatch.setattr(kind, "draw", masked_draw(kind.draw_seed))
    wanted = gradients(model, "cuda")
    for layer in layers:
        layer.compile(dynamic=True, options={"fallback_random": True})
    found = gradients(model, "cuda")
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-4)
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 1e-3, name
