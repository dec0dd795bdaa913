"""The schedule is the one of transformers; decay reaches what the recipe says."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from internvl.config import OptimConfig
from internvl.errors import UserError
from internvl.training import checkpoint, optim


@pytest.mark.parametrize("num_steps", [10, 100, 1107])
def test_the_schedule_equals_transformers(num_steps):
    config = OptimConfig(lr=4e-5, warmup_ratio=0.03)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.lr)
    warmup = -(-3 * num_steps // 100)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    for step in range(num_steps):
        assert optim.lr_at(step, num_steps, config) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        schedule.step()


def test_the_floor_of_the_schedule():
    config = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_ratio=0.0)
    assert optim.lr_at(100, 100, config) == pytest.approx(0.1)
    assert optim.lr_at(0, 100, config) == pytest.approx(1.0)


@pytest.mark.parametrize(("decay_vectors", "decayed"), [(False, 12), (True, 16)])
def test_decay_groups(decay_vectors, decayed):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[1].requires_grad_(False)
    config = OptimConfig(weight_decay=0.1, decay_vectors=decay_vectors)
    groups = optim.build(model, config).param_groups
    counts = {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in groups}
    assert counts[0.1] == decayed
    assert sum(counts.values()) == 16  # the frozen layer is in none


def test_warm_up_peak_and_short_decay():
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=2, decay_ratio=0.4, min_lr_ratio=0.5)
    rates = [optim.lr_at(step, 10, config) for step in range(10)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625])


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (16, 16)])
def test_orthogonal_keeps_the_directions_and_levels_the_lengths(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for matrix, found in zip(matrices, optim.orthogonal(matrices), strict=True):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        lengths = left.T @ found @ right.T
        assert (lengths - lengths.diag().diag()).abs().max() < 1e-4
        assert lengths.diag().min() > 0.3
        assert lengths.diag().max() < 1.3


SHARED = """
import torch
from internvl import dist
from internvl.training import optim
dist.init_from_env("cpu")
torch.manual_seed(0)
stacks = [torch.randn(3, 4, 6), torch.randn(1, 8, 4), torch.randn(2, 5, 5)]
for updates, stack in zip(optim.orthogonal_on_ranks(stacks), stacks, strict=True):
    torch.testing.assert_close(updates, optim.orthogonal(stack), rtol=0, atol=1e-6)
    print(*updates.flatten().tolist())
"""


def test_ranks_share_the_matrices_and_have_the_same_updates():
    first, second, third = run_ranks(SHARED, num_ranks=3)
    assert first == second == third


def test_muon_is_for_matrices_and_adamw_for_the_rest():
    """One step by hand for a matrix; whatever else trains gets AdamW's update, bit for bit."""
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    config = OptimConfig(name="muon", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98))
    model, other = small_model(), small_model()
    model.lm_head = other.lm_head = None  # an output matrix of this name would be AdamW's
    optimizer = optim.build(model, config)
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.0, "fused": True}
    adamw = torch.optim.AdamW(other.parameters(), **settings)
    before = model[0].weight.detach().clone()
    for each in (model, other):
        each(inputs).pow(2).sum().backward()
    gradient = model[0].weight.grad
    optimizer.step()
    adamw.step()
    averaged = gradient.lerp(torch.zeros_like(gradient).lerp(gradient, 1 - 0.95), 0.95)
    update = 0.2 * math.sqrt(96) * optim.orthogonal(averaged[None])[0]
    torch.testing.assert_close(model[0].weight.data, before * (1 - 1e-3) - 1e-2 * update)
    assert torch.equal(model[0].bias, other[0].bias)
    assert not torch.equal(model[2].weight, other[2].weight)


def test_output_matrix_and_embeddings_are_not_muons():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "layer": nn.Linear(4, 4)})
    model.lm_head = nn.Linear(4, 7, bias=False)
    assert optim.hidden_matrices(model) == {"layer.weight"}


def test_muon_goes_on_from_a_checkpoint(tmp_path):
    config = OptimConfig(name="muon", lr=1e-2, warmup_ratio=0.2)
    model = small_model()
    optimizer = optim.build(model, config)
    steps_of(model, optimizer, config, 0, 7)
    checkpoint.save(tmp_path, 7, model, optimizer, {}, keep=1)
    steps_of(model, optimizer, config, 7, 12)
    again = small_model()
    fresh = optim.build(again, config)
    checkpoint.load(tmp_path, 7, again, fresh)
    steps_of(again, fresh, config, 7, 12)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


DEPTHS = {"vision": 48, "qllama": 32}


@pytest.mark.parametrize(
    ("name", "layer", "scale"),
    [
        ("vision_model.embeddings.class_embedding", ("vision", 0), 0.9**49),
        ("vision_model.encoder.layers.0.ls1", ("vision", 1), 0.9**48),
        ("vision_model.encoder.layers.47.attn.qkv.weight", ("vision", 48), 0.9),
        ("clip_projector.norm1_q.weight", ("vision", 50), 1.0),
        ("query_tokens", ("qllama", 0), 0.9**33),
        ("logit_scale", ("qllama", 0), 0.9**33),
        ("qllama.model.embed_tokens.weight", ("qllama", 0), 0.9**33),
        ("qllama.model.layers.0.cross_attn.k_proj.weight", ("qllama", 1), 0.9**32),
        ("qllama.model.layers.31.mlp.up_proj.weight", ("qllama", 32), 0.9),
        ("qllama.model.norm.weight", ("qllama", 34), 1.0),
        ("qllama.lm_head.weight", ("qllama", 34), 1.0),
        ("clip_projector2.cross_attn.q_bias", ("qllama", 34), 1.0),
        ("itm_head.bias", ("qllama", 34), 1.0),
        ("text_projection", ("qllama", 34), 1.0),
    ],
)
def test_layers_of_the_full_size_model(name, layer, scale):
    assert optim.layer_of(name, DEPTHS) == layer
    assert optim.lr_scale(layer[1], DEPTHS[layer[0]], 0.9) == pytest.approx(scale, rel=1e-12)


def golden_settings():
    path = Path(__file__).parents[1] / "golden/layer_decay/groups.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("setting", list(golden_settings()))
def test_layer_scales_equal_the_original(setting):
    golden = golden_settings()[setting]
    rates = {"vision": golden["VIT_LAYER_DECAY_RATE"], "qllama": golden["QLLAMA_LAYER_DECAY_RATE"]}
    for name, (scale, lr, _, group) in golden["params"].items():
        tower, number = optim.layer_of(name, {"vision": 3, "qllama": 4})
        assert group.startswith(f"{tower.replace('vision', 'vit')}_layer_{number}_")
        found = optim.lr_scale(number, {"vision": 3, "qllama": 4}[tower], rates[tower])
        assert found == pytest.approx(scale, rel=1e-12)
        assert found * golden["learning_rate"] == pytest.approx(lr, rel=1e-12)


# Update (from 1) -> rate in units of the peak, of 1,420 updates with 100 of warm-up.
AS_SHIPPED = {
    1: 1.0,
    2: 0.0,
    3: 0.15051,
    10: 0.47712,
    50: 0.84510,
    101: 1.0,
    102: 1.0,
    500: 0.69848,
    1420: 0.0015152,
}


def test_the_schedule_as_shipped():
    config = OptimConfig(lr=1e-6, schedule="as_shipped", warmup_steps=100)
    for update, share in AS_SHIPPED.items():
        assert optim.lr_at(update - 1, 1420, config) / 1e-6 == pytest.approx(share, rel=5e-5)


def test_as_shipped_only_the_first_update_has_a_rate_per_layer():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": s} for s in (1.0, 0.5)]
    optimizer = torch.optim.AdamW(groups)
    config = OptimConfig(lr=2.0, schedule="as_shipped", warmup_steps=10)
    for step, wanted in enumerate([[2.0, 1.0], [0.0, 0.0], [2.0 * math.log(2, 10)] * 2]):
        optim.set_lr(optimizer, step, 100, config)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(wanted)
    documented = OptimConfig(lr=2.0, warmup_steps=10)
    assert optim.set_lr(optimizer, 5, 100, documented) == pytest.approx(1.0)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1.0, 0.5])


def test_8_bits_without_torchao_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'internvl\[lowbit\]'"):
        optim.build(nn.Linear(2, 2), OptimConfig(name="adamw-8bit"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_8_bit_moments_are_small_follow_the_schedule_and_resume_exactly(tmp_path):
    pytest.importorskip("torchao", reason="moments in 8 bits need torchao: internvl[lowbit]")
    config = OptimConfig(name="adamw-8bit", lr=1e-2, warmup_ratio=0.5)

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        return model, optim.build(model, config)

    def train(model, optimizer, first, last):
        for step in range(first, last):
            inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            optim.set_lr(optimizer, step, 10, config)
            (model(inputs) - inputs).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    model, optimizer = made()
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer, 0, 1)  # at a rate of 0
    assert all(map(torch.equal, before, model.parameters()))
    train(model, optimizer, 1, 4)
    moments = optimizer.state[model[0].weight]
    assert moments["exp_avg"].codes.dtype == torch.uint8
    checkpoint.save(tmp_path, 4, model, optimizer, {}, keep=1)
    train(model, optimizer, 4, 8)
    again, fresh = made()
    checkpoint.load(tmp_path, 4, again, fresh)
    train(again, fresh, 4, 8)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def small_model(device="cpu"):
    torch.manual_seed(0)
    parts = nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Linear(64, 5)
    return nn.Sequential(*parts).to(device)


def steps_of(model, optimizer, config, first, last):
    """Clipped, under a schedule, every fifth refused by a guard; a layer without gradients."""
    for step in range(first, last):
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        inputs = inputs.to(model[0].weight.device)
        optim.set_lr(optimizer, step, 20, config)
        (model[:3](inputs) - inputs).pow(2).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if step % 5 != 3:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("bucket", [1, 6500, 2**25])
def test_offloaded_moments_change_no_bit(tmp_path, monkeypatch, bucket):
    """Not in steps on end, and not where a run goes on with or without them from a checkpoint."""
    monkeypatch.setattr(optim, "_BUCKET", bucket)
    configs = [OptimConfig(lr=1e-2, warmup_ratio=0.2, offload=o) for o in (False, True)]
    wanted, found = small_model(), small_model()
    plain, offloaded = (optim.build(m, c) for m, c in zip((wanted, found), configs, strict=True))
    for model, optimizer, config in ((wanted, plain, configs[0]), (found, offloaded, configs[1])):
        steps_of(model, optimizer, config, 0, 7)
        checkpoint.save(tmp_path / str(config.offload), 7, model, optimizer, {}, keep=1)
        steps_of(model, optimizer, config, 7, 12)
    assert all(map(torch.equal, found.parameters(), wanted.parameters()))
    assert [len(g["params"]) for g in offloaded.param_groups] == [3, 3]
    for before in (False, True):
        for after in configs:
            again = small_model()
            fresh = optim.build(again, after)
            checkpoint.load(tmp_path / str(before), 7, again, fresh)
            steps_of(again, fresh, after, 7, 12)
            assert all(map(torch.equal, again.parameters(), wanted.parameters()))
            for parameter, theirs in zip(again.parameters(), wanted.parameters(), strict=True):
                for key, value in plain.state.get(theirs, {}).items():
                    assert torch.equal(fresh.state[parameter][key], value), key


@pytest.mark.gpu
def test_offloaded_moments_are_not_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "_BUCKET", 6500)
    config, plain = (OptimConfig(lr=1e-2, offload=offload) for offload in (True, False))
    model, wanted = small_model("cuda"), small_model("cuda")
    optimizer = optim.build(model, config)
    steps_of(model, optimizer, config, 0, 7)
    checkpoint.save(tmp_path, 7, model, optimizer, {}, keep=1)
    steps_of(model, optimizer, config, 7, 12)
    steps_of(wanted, optim.build(wanted, plain), plain, 0, 12)
    assert all(map(torch.equal, model.parameters(), wanted.parameters()))
    again = small_model("cuda")
    fresh = optim.build(again, config)
    checkpoint.load(tmp_path, 7, again, fresh)
    for held in (optimizer, fresh):
        moments = [s[key] for s in held.state.values() for key in ("exp_avg", "exp_avg_sq")]
        assert {moment.device.type for moment in moments} == {"cpu"}
    assert all(
        moment.is_pinned() for s in optimizer.state.values() for moment in s.values() if moment.ndim
    )
    steps_of(again, fresh, config, 7, 12)
    assert all(map(torch.equal, again.parameters(), wanted.parameters()))
