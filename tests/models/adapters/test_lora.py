"""Adapters: counts and merged weights of the original, PEFT folders, freezing."""

import json

import pytest
import torch
from chat_folders import (
    GOLDEN,
    IMAGE_TOKEN_ID,
    KEPT,
    golden_folder,
    golden_tensors,
    official_folder,
    official_lora_folder,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from internvl.config import LoraConfig
from internvl.errors import ModelFolderError
from internvl.inference import load as loading
from internvl.models import configs, keys
from internvl.models.adapters import dropout as dropout_layers
from internvl.models.adapters import lora
from internvl.models.chat import model as chat_model
from internvl.models.vision import count_parameters

BOTH = ("language_model", "vision_tower")
COUNTS = json.loads((GOLDEN / "lora_count" / "counts.json").read_text())
INTERNVIT_300M = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
}


def tiny(tmp_path, case="chat_internlm2") -> chat_model.ChatModel:
    folder = golden_folder(case, "v2.sel-1", tmp_path / "base")
    return chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


def logits(model, case="chat_internlm2"):
    golden = golden_tensors(case)
    pixels = golden["input.pixel_values"][:2]
    with torch.no_grad():
        return model(input_ids=golden["input.input_ids"][:1], pixel_values=pixels).logits


def randomize(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.slow
def test_golden_counts(name):
    """As the original counts: vision tower, language model and, where frozen, the projector."""
    case = COUNTS[name]
    config = configs.from_official(
        {"vision_config": INTERNVIT_300M, "llm_config": case["config_llm"], "ps_version": "v2"}, 3
    )
    model = chat_model.empty_model(config)
    assert count_parameters(model)[1] == case["base_total_params"]
    lora.select_trainable(model, ("multi_modal_projector",) if case["mlp_trainable"] else ())
    ranks = {"language_model": case["use_llm_lora"], "vision_tower": case["use_backbone_lora"]}
    for part, rank in ranks.items():
        if rank:
            lora.attach(model, LoraConfig(rank=rank, on=(part,)))
    assert count_parameters(model)[0] == case["trainable"]


def test_golden_official_adapters_load_and_merge(tmp_path):
    folder, golden = official_lora_folder(tmp_path)
    model = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu").model
    case = golden_tensors("chat_internlm2")
    mask = case["input.attention_mask"].bool()
    keep = case["input.image_flags"].view(-1).bool()
    given = {
        "input_ids": case["input.input_ids"],
        "attention_mask": mask.long(),
        "pixel_values": case["input.pixel_values"][keep],
    }
    with torch.no_grad():
        found = model(**given).logits
    wanted = golden["output.logits_unmerged"]
    torch.testing.assert_close(found[mask][:, KEPT], wanted[mask], atol=1e-4, rtol=0)
    lora.merge(model)
    with torch.no_grad():
        found = model(**given).logits
    wanted = golden["output.logits_merged"]
    torch.testing.assert_close(found[mask][:, KEPT], wanted[mask], atol=1e-4, rtol=0)
    merged = dict(keys.ours_to_official(model.config, model.state_dict()))
    for name, tensor in golden.items():
        if name.startswith("merged."):
            torch.testing.assert_close(
                merged[name.removeprefix("merged.")], tensor, rtol=1e-5, atol=1e-6
            )


def test_official_adapters_for_an_unknown_layer(tmp_path):
    folder, _ = official_lora_folder(tmp_path)
    stored = load_file(folder / "model.safetensors")
    stem = "language_model.base_model.model.model.layers.9.attention.wo"
    stored |= {f"{stem}.lora_{x}.default.weight": torch.zeros(8, 8) for x in "AB"}
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match="unknown layers, .*layers.9.attention.wo"):
        chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)


@pytest.mark.parametrize("case", ["chat_internlm2", "chat_qwen2"])
def test_plain_peft_loads_what_we_save(case, tmp_path):
    model = tiny(tmp_path, case)
    plain = InternVLForConditionalGeneration(model.config).eval()
    plain.load_state_dict(model.state_dict())
    lora.attach(model, LoraConfig(rank=4, on=BOTH))
    randomize(model)
    lora.save_adapter(model, tmp_path / "adapter", base="someone/base")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, case), logits(model, case), atol=1e-5, rtol=1e-5)


def test_fused_projections_share_one_a(tmp_path):
    model = lora.attach(tiny(tmp_path), LoraConfig(rank=4, on=BOTH))
    attention = model.model.language_model.layers[0].self_attn
    assert attention.q_proj.lora_A["default"] is attention.v_proj.lora_A["default"]
    attention = model.model.vision_tower.encoder.layer[0].attention
    assert attention.q_proj.lora_A["default"] is attention.k_proj.lora_A["default"]
    lora.save_adapter(randomize(model), tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.model.language_model.layers.0.self_attn"
    first = state[f"{stem}.q_proj.lora_A.weight"]
    assert torch.equal(first, state[f"{stem}.v_proj.lora_A.weight"])
    assert not torch.equal(
        state[f"{stem}.k_proj.lora_B.weight"], state[f"{stem}.v_proj.lora_B.weight"]
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_fused_projections_share_one_mask_of_dropout(recompute, tmp_path):
    """The original drops from the input of its one adapter; a recomputed forward drops the same."""
    model = lora.attach(tiny(tmp_path), LoraConfig(rank=4, dropout=0.5, on=BOTH))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.get_input_embeddings().requires_grad_(True)
    randomize(model).train()
    outputs = []
    for block in (model.model.language_model.layers[0], model.model.vision_tower.encoder.layer[1]):
        attention = getattr(block, "self_attn", None) or block.attention
        down = attention.q_proj.lora_A["default"]
        down.register_forward_hook(lambda *found: outputs.append(found[2].detach()))
    golden = golden_tensors("chat_internlm2")
    ids, pixels = golden["input.input_ids"][:1], golden["input.pixel_values"][:2]
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    assert len(outputs) == (12 if recompute else 6)
    threes = [outputs[i : i + 3] for i in range(0, len(outputs), 3)]
    for q, k, v in threes:
        assert torch.equal(q, k)
        assert torch.equal(q, v)
    if recompute:  # backward goes through the language model first
        assert torch.equal(threes[0][0], threes[3][0])
        assert torch.equal(threes[1][0], threes[2][0])
    kept = [m for m in model.modules() if getattr(m, "dropped", None) is not None]
    assert kept == []


def test_shared_dropout_keeps_the_mean_and_rests_in_evaluation():
    torch.manual_seed(0)
    drawn = dropout_layers.DrawnDropout(0.25, keep=True)
    repeated = dropout_layers.RepeatedDropout(drawn, last=True)
    inputs = torch.ones(50, 400)
    found = drawn(inputs)
    assert found.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(found.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(repeated(inputs), found)
    assert torch.equal(drawn.eval()(inputs), inputs)
    assert torch.equal(repeated.eval()(inputs), inputs)


def test_separate_projections_have_their_own_a(tmp_path):
    model = lora.attach(tiny(tmp_path, "chat_qwen2"), LoraConfig(rank=4))
    attention = model.model.language_model.layers[0].self_attn
    assert attention.q_proj.lora_A["default"] is not attention.v_proj.lora_A["default"]


def test_phi3_adapters_sit_on_its_fused_layers(tmp_path):
    folder = official_folder("Phi3ForCausalLM", tmp_path)
    model = chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)
    lora.attach(model, LoraConfig(rank=4))
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in lora.adapter_state(model)}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("case", ["chat_internlm2", "chat_qwen2"])
def test_saved_adapters_load_again(case, tmp_path):
    model = randomize(lora.attach(tiny(tmp_path, case), LoraConfig(rank=4, on=BOTH)))
    lora.save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    chat = loading.load(tmp_path / "adapter", image_token_id=IMAGE_TOKEN_ID, device="cpu")
    assert torch.equal(logits(chat.model, case), logits(model, case))
    assert lora.adapter_state(chat.model).keys() == lora.adapter_state(model).keys()


def test_ranks_and_scales_that_differ_by_part(tmp_path):
    model = tiny(tmp_path)
    adapters = {"language_model": lora.Adapter(4, 8.0), "vision_tower": lora.Adapter(2, 10.0)}
    randomize(lora.inject(model, adapters))
    lora.save_adapter(model, tmp_path / "adapter")
    other = lora.load_adapter(tiny(tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(logits(other), logits(model))
    plain = InternVLForConditionalGeneration(model.config).eval()
    plain.load_state_dict(tiny(tmp_path).state_dict())
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


def test_new_adapters_change_nothing_and_a_step_changes_something(tmp_path):
    model = tiny(tmp_path)
    before = logits(model)
    lora.attach(model, LoraConfig(rank=4, dropout=0.0))
    assert torch.equal(logits(model), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    golden = golden_tensors("chat_internlm2")
    ids, pixels = golden["input.input_ids"][:1], golden["input.pixel_values"][:2]
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)


def test_merge_is_the_sum_and_only_once(tmp_path):
    model = randomize(lora.attach(tiny(tmp_path), LoraConfig(rank=4, alpha=12, on=BOTH)))
    plain = tiny(tmp_path)
    wanted, name = logits(model), "model.language_model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    expected = plain.get_submodule(name).weight + b @ a * 3
    lazily = {key: lora.MergedState(model)[key].clone() for key in lora.MergedState(model)}
    lora.merge(model)
    torch.testing.assert_close(model.get_submodule(name).weight, expected)
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == set(plain.state_dict()) == set(lazily)
    assert all(torch.equal(lazily[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="merged already"):
        lora.merge(model)


def test_adapters_are_float32_on_a_bfloat16_base(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    model = chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID, dtype=torch.bfloat16)
    lora.attach(model, LoraConfig(rank=4))
    kinds = {p.dtype for n, p in model.named_parameters() if ".lora_" in n}
    assert kinds == {torch.float32}
    lora.merge(randomize(model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def trained_parts(model):
    return {
        part
        for part in ("vision_tower", "multi_modal_projector", "language_model")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.startswith(lora.PARTS[part])
    }


def test_only_the_chosen_parts_train(tmp_path):
    model = tiny(tmp_path)
    for parts in ((), ("multi_modal_projector",), ("vision_tower", "language_model")):
        lora.select_trainable(model, parts)
        assert trained_parts(model) == set(parts)
    assert model.lm_head.weight.requires_grad
    lora.select_trainable(model, ())
    assert count_parameters(model)[0] == 0


def test_the_last_blocks_of_the_tower(tmp_path):
    model = tiny(tmp_path)
    lora.select_trainable(model, ("multi_modal_projector",), last_vision_blocks=2)
    trained = [
        all(p.requires_grad for p in block.parameters())
        for block in model.model.vision_tower.encoder.layer
    ]
    assert trained == [False, False, True, True]
    assert not model.model.vision_tower.embeddings.cls_token.requires_grad
    with pytest.raises(ValueError, match="has 4 blocks, cannot train the last 5"):
        lora.select_trainable(model, (), last_vision_blocks=5)


def test_attaching_keeps_what_was_chosen(tmp_path):
    model = tiny(tmp_path)
    lora.select_trainable(model, ("multi_modal_projector",))
    lora.attach(model, LoraConfig(rank=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("multi_modal_projector" in name or ".lora_" in name for name in trained)
    assert any("multi_modal_projector" in name for name in trained)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda m, _: lora.select_trainable(m, ("mlp1",)), "unknown part 'mlp1'; parts are"),
        (
            lambda m, _: lora.attach(m, LoraConfig(rank=2, on=("multi_modal_projector",))),
            "no adapter goes on 'multi_modal_projector'",
        ),
        (lambda m, _: lora.merge(m), "no adapters"),
        (lambda m, to: lora.save_adapter(m, to), "no adapters to save"),
        (
            lambda m, _: lora.attach(lora.attach(m, LoraConfig(rank=2)), LoraConfig(rank=2)),
            "has adapters already",
        ),
    ],
)
def test_what_cannot_be_done_is_said(act, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        act(tiny(tmp_path), tmp_path / "out")


def test_adapters_of_another_model_are_refused(tmp_path):
    model = randomize(lora.attach(tiny(tmp_path), LoraConfig(rank=4)))
    lora.save_adapter(model, tmp_path / "adapter")
    folder = official_folder("Qwen3ForCausalLM", tmp_path / "other")
    other = chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID)
    with pytest.raises(ModelFolderError, match="of another model"):
        lora.load_adapter(other, tmp_path / "adapter")
    with pytest.raises(ModelFolderError, match="names no base_model_name_or_path"):
        loading.load(tmp_path / "adapter")
