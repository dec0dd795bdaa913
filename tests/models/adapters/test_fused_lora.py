"""joined: LoRA in one product with its base computes what PEFT's two products do."""

import pytest
import torch
from peft.tuners.lora import Linear
from small_models import small_model

from internvl.models.adapters import fused_lora, lora
from internvl.training import checkpoint

TEXT = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}


def adapted(name="InternVL2-2B", dropout=0.0, dtype="float32"):
    model = small_model(name, (), 8, dropout=dropout, dtype=dtype, sizes={"text": TEXT})
    for layer in layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


def run(model, dtype, seed=0):
    """(output, gradients by name) of the language model."""
    torch.manual_seed(seed)
    ids = torch.arange(40)[None] % 30 + 10
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        output = model(input_ids=ids).logits.float()
    output.square().mean().backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.detach(), trained


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", ["InternVL2-2B", "InternVL2-1B"])  # one A for q, k, v; biases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 2e-6), ("bfloat16", 5e-2)])
def test_outputs_and_gradients_are_those_of_two_products(name, dropout, dtype, allowed):
    model = adapted(name, dropout, dtype).train()
    wanted = run(model, dtype)
    assert fused_lora.join(model) == len(layers(model)) > 0
    found = run(model, dtype)
    assert error(found[0], wanted[0]) < allowed
    assert found[1].keys() == wanted[1].keys()
    for key, gradient in wanted[1].items():
        assert error(found[1][key], gradient) < allowed, key


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_tower_whose_q_k_and_v_are_one_product(dropout):
    """As many keys as queries, and biases; the layers that follow the first have its dropout."""
    model = small_model(
        "InternVL2-2B", ("multi_modal_projector",), 8, on=("vision_tower",), dropout=dropout
    )
    for layer in layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    pixels, found = torch.rand(2, 3, 56, 56), []
    for join in (False, True):
        if join:
            fused_lora.join(model)
            first = model.model.vision_tower.encoder.layer[0].attention.q_proj
            assert [type(layer).__name__ for layer in first.followers] == ["Follower"] * 2
        torch.manual_seed(0)
        output = model.model.get_image_features(pixels).pooler_output
        output.square().mean().backward()
        trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((output.detach(), trained))
    assert error(found[1][0], found[0][0]) < 2e-6
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert float((found[1][1][name] - gradient).norm()) < 2e-5 * float(gradient.norm()) + 1e-9
    drawn = first.lora_dropout["default"]
    assert getattr(drawn, "dropped", None) is None  # nothing waits for the next step


def test_names_and_values_stay(tmp_path):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused_lora.join(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    lora.save_adapter(model, tmp_path)


def test_a_changed_b_counts_once_it_is_copied():
    model = adapted().eval()
    fused_lora.join(model)
    stale, _ = run(model, "float32")
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B["default"].weight.mul_(3)
    assert torch.equal(run(model, "float32")[0], stale)
    fused_lora.refresh(model)
    found, _ = run(model, "float32")
    fused_lora.part(model)
    assert all(type(layer) is Linear for layer in layers(model))
    assert all(layer.base_layer.weight.is_contiguous() for layer in layers(model))
    wanted, _ = run(model, "float32")
    assert error(found, wanted) < 2e-6 < error(stale, wanted)


def test_a_loaded_checkpoint_counts(tmp_path):
    saved, loaded = adapted().eval(), adapted().eval()
    optimizer = torch.optim.AdamW([p for p in saved.parameters() if p.requires_grad])
    checkpoint.save(tmp_path, 1, saved, optimizer, {}, keep=1)
    loaded.load_state_dict(saved.state_dict())
    with torch.no_grad():
        for layer in layers(loaded):
            layer.lora_B["default"].weight.zero_()
    fused_lora.join(loaded)
    wanted, _ = run(saved, "float32")
    assert error(run(loaded, "float32")[0], wanted) > 1e-3
    checkpoint.load_weights(tmp_path, 1, loaded)
    assert error(run(loaded, "float32")[0], wanted) < 2e-6


def test_merging_parts_them():
    model = adapted().eval()
    wanted, _ = run(model, "float32")
    fused_lora.join(model)
    lora.merge(model)
    model.requires_grad_(True)
    found, _ = run(model, "float32")
    assert error(found, wanted) < 2e-5  # of rounded float32 sums
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_base_that_trains_stays_apart():
    model = adapted()
    model.requires_grad_(True)
    assert fused_lora.join(model) == 0
