"""fused_lora: LoRA in one product with its base computes what PEFT's two products do."""

import copy

import pytest
import torch
from peft.tuners.lora import Linear
from small_models import small_model

from internvl.models.adapters import fused_lora, lora
from internvl.training import checkpoint, optim

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
    assert fused_lora.fuse(model) == len(layers(model)) > 0
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
    for fuse in (False, True):
        if fuse:
            fused_lora.fuse(model)
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
    fused_lora.fuse(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    lora.save_adapter(model, tmp_path)


def halves(model):
    for layer in layers(model):
        layer.lora_B["default"].weight.mul_(0.5)


def steps(make):
    def change(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        make([{"params": parameters, "muon": True}]).step()
        model.zero_grad()

    return change


def assigns(model):
    state = {name: 0.9 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for layer in layers(model):
        layer.base_layer.requires_grad_(False)


CHANGES = {
    "in place": torch.no_grad()(halves),
    "fused AdamW": steps(lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True)),
    "AdamW": steps(lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True)),
    "offloaded AdamW": steps(lambda groups: optim.OffloadedAdamW(groups, lr=0.1, fused=True)),
    "SGD": steps(lambda groups: torch.optim.SGD(groups, lr=0.1, fused=True)),
    "Muon": steps(lambda groups: optim.Muon(groups, 0.9, lr=0.1)),
    "loaded": lambda model: model.load_state_dict(
        {name: 0.9 * tensor for name, tensor in model.state_dict().items()}
    ),
    "assigned": assigns,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_a_weight_the_next_forward_has_it(change):
    """Nobody tells the fused layers."""
    fused, plain = adapted().eval(), adapted().eval()
    plain.load_state_dict(fused.state_dict())
    fused_lora.fuse(fused)
    before, _ = run(fused, "float32")
    change(fused)
    change(plain)
    expected, _ = run(plain, "float32")
    assert error(run(fused, "float32")[0], expected) < 2e-6 < error(before, expected)


def test_stacks_of_compiled_blocks_copy_before_they_run():
    """Inside compiled code no layer looks at its weights' versions."""
    model = adapted().eval()
    fused_lora.fuse(model)
    leaders = [m for m in model.modules() if isinstance(m, fused_lora.FusedLinear)]
    halves_of = torch.no_grad()(halves)
    halves_of(model)
    assert all(leader.is_stale() for leader in leaders)
    hidden = model.get_input_embeddings()(torch.arange(20)[None])
    for block in model.model.language_model.layers:
        block.forward = lambda hidden_states, **kwargs: hidden_states
    model.model.language_model(inputs_embeds=hidden)
    assert not any(leader.is_stale() for leader in leaders)


def test_a_deep_copy_follows_its_own_weights():
    model = adapted().eval()
    fused_lora.fuse(model)
    twin = copy.deepcopy(model)
    before, _ = run(model, "float32")
    torch.no_grad()(halves)(twin)
    changed, _ = run(twin, "float32")
    assert error(changed, before) > 1e-3
    assert torch.equal(run(model, "float32")[0], before)
    fused_lora.unfuse(twin)
    assert error(changed, run(twin, "float32")[0]) < 2e-6


def test_unfused_layers_are_pefts_own():
    model = adapted().eval()
    before = [vars(layer).keys() for layer in layers(model)]
    fused_lora.fuse(model)
    expected, _ = run(model, "float32")
    fused_lora.unfuse(model)
    assert all(type(layer) is Linear for layer in layers(model))
    assert all(layer.base_layer.weight.is_contiguous() for layer in layers(model))
    assert not model.model.language_model._forward_pre_hooks
    assert [vars(layer).keys() - {"output"} for layer in layers(model)] == before
    assert error(run(model, "float32")[0], expected) < 2e-6


def test_a_loaded_checkpoint_counts(tmp_path):
    saved, loaded = adapted().eval(), adapted().eval()
    optimizer = torch.optim.AdamW([p for p in saved.parameters() if p.requires_grad])
    checkpoint.save(tmp_path, 1, saved, optimizer, {}, keep=1)
    loaded.load_state_dict(saved.state_dict())
    with torch.no_grad():
        for layer in layers(loaded):
            layer.lora_B["default"].weight.zero_()
    fused_lora.fuse(loaded)
    wanted, _ = run(saved, "float32")
    assert error(run(loaded, "float32")[0], wanted) > 1e-3
    checkpoint.load_weights(tmp_path, 1, loaded)
    assert error(run(loaded, "float32")[0], wanted) < 2e-6


def test_merging_unfuses_them():
    model = adapted().eval()
    wanted, _ = run(model, "float32")
    fused_lora.fuse(model)
    lora.merge(model)
    model.requires_grad_(True)
    found, _ = run(model, "float32")
    assert error(found, wanted) < 2e-5  # of rounded float32 sums
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_base_that_trains_stays_apart():
    model = adapted()
    model.requires_grad_(True)
    assert fused_lora.fuse(model) == 0
