"""The chat model against golden data of the original and against transformers' own classes."""

import json
import math

import pytest
import torch
from chat_folders import (
    ARCHITECTURES,
    GOLDEN,
    IMAGE_TOKEN_ID,
    KEPT,
    SU,
    golden_folder,
    golden_tensors,
    official_folder,
    shared,
    stock_language_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvl.errors import ModelFolderError
from internvl.inference import load as loading
from internvl.models import keys
from internvl.models import weights as model_weights
from internvl.models.chat import model as chat_model
from internvl.models.chat.model import ChatModel, Supervision

CASES = ("chat_internlm2", "chat_qwen2")
VARIANTS = [
    (case, variant)
    for case in CASES
    for variant in json.loads((GOLDEN / case / "case.json").read_text())["variants"]
]
POSITIONS = GOLDEN / "vit_posemb_resize"
# The tower's rows of each golden sample: two tiles, one tile, none.
TILES = (slice(0, 2), slice(2, 3), slice(3, 3))


def load(folder, **options) -> ChatModel:
    chat = loading.load(
        folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32", **options
    )
    return chat.model


def inputs(golden: dict[str, Tensor], sample: int) -> dict[str, Tensor | None]:
    """One padded row: padding is on the right, where causal attention does not look."""
    pixels = golden["input.pixel_values"][TILES[sample]]
    return {
        "input_ids": golden["input.input_ids"][sample : sample + 1],
        "pixel_values": pixels if len(pixels) else None,
    }


def summed_loss(
    model: ChatModel, golden: dict[str, Tensor], weighted: bool
) -> tuple[Tensor, float]:
    """(sum over the supervised tokens of all samples, sum of their weights)."""
    total, count = torch.zeros(()), 0.0
    for sample in range(3):
        labels = golden["input.labels"][sample, 1:]
        positions = (labels != -100).nonzero().view(-1)
        weights = golden["input.loss_weight"][sample, 1:][positions]
        weights = weights if weighted else torch.ones(len(positions))
        supervision = Supervision(positions, labels[positions], weights)
        total = total + model(**inputs(golden, sample), supervision=supervision).loss
        count += float(weights.sum())
    return total, count


@pytest.mark.parametrize(("case", "variant"), VARIANTS)
@torch.no_grad()
def test_golden_logits_features_and_losses(case, variant, tmp_path):
    golden = golden_tensors(case)
    model = load(golden_folder(case, variant, tmp_path))
    keep = golden["input.image_flags"].view(-1).bool()
    mask = golden["input.attention_mask"].bool()
    pixels = golden["input.pixel_values"]
    logits = model(
        input_ids=golden["input.input_ids"], attention_mask=mask.long(), pixel_values=pixels[keep]
    ).logits
    wanted = golden[f"output.{variant}.logits"]
    torch.testing.assert_close(logits[mask][:, KEPT], wanted[mask], atol=5e-5, rtol=1e-5)
    features = model.get_image_features(pixels).pooler_output
    wanted = golden[f"output.{variant}.image_features"]
    torch.testing.assert_close(features, wanted, atol=2e-5, rtol=1e-5)
    losses = json.loads((GOLDEN / case / "results.json").read_text())["losses"]
    for weighted, name in ((False, "loss"), (True, "loss_weighted")):
        total, count = summed_loss(model, golden, weighted)
        assert float(total) / count == pytest.approx(losses[f"{variant}.{name}"], rel=2e-6)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_golden_hidden_states_of_the_tower(case, tmp_path):
    golden = golden_tensors(case)
    model = load(golden_folder(case, "v2.sel-1", tmp_path))
    pixels = golden["input.pixel_values"][:1]
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 5
    for index, state in enumerate(states):
        wanted = golden[f"output.vision_hidden_states.{index}"]
        torch.testing.assert_close(state, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_golden_gradients(case, tmp_path):
    golden = golden_tensors(case)
    model = load(golden_folder(case, "v2.sel-1", tmp_path))
    total, count = summed_loss(model, golden, weighted=False)
    (total / count).backward()
    results = json.loads((GOLDEN / case / "results.json").read_text())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = {
        name: float(gradient.norm())
        for name, gradient in keys.ours_to_official(model.config, gradients)
    }
    assert norms == pytest.approx(results["grad_norms_v2_sel_m1"], rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_golden_probe_makes_norm_epsilons_visible(case, tmp_path):
    golden = golden_tensors(case)
    folder = golden_folder(case, "v2.sel-1", tmp_path)
    described = json.loads((GOLDEN / case / "case.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for part, factor in described["probe_small_residual"]["factors"].items():
        for name in tensors:
            if part in name:
                tensors[name] *= factor
    save_file(tensors, folder / "model.safetensors")
    model = load(folder)
    mask = golden["input.attention_mask"].bool()
    keep = golden["input.image_flags"].view(-1).bool()
    pixels = golden["input.pixel_values"]
    logits = model(
        input_ids=golden["input.input_ids"], attention_mask=mask.long(), pixel_values=pixels[keep]
    ).logits
    features = model.get_image_features(pixels).pooler_output
    for found, name in ((logits[mask][:, KEPT], "logits"), (features, "image_features")):
        wanted = golden[f"probe.v2.sel-1.{name}"]
        wanted = wanted[mask] if name == "logits" else wanted
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.std())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["v2.sel-1", "v1.sel-4"])
def test_golden_generated_tokens(case, variant, tmp_path):
    golden = golden_tensors(case)
    model = load(golden_folder(case, variant, tmp_path))
    runs = json.loads((GOLDEN / case / "generate.json").read_text())
    rows = {"tiles0-1": slice(0, 2), "tile2": slice(2, 3), "tiles0-2": slice(0, 3)}
    done = 0
    for name, run in runs.items():
        if not name.startswith(variant):
            continue
        pixels = next((golden["input.pixel_values"][r] for k, r in rows.items() if k in name), None)
        ids = torch.tensor(run["input_ids"])
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.tensor(run["attention_mask"]),
            pixel_values=pixels,
            do_sample=False,
            pad_token_id=0,
            **run["kwargs"],
        )[:, ids.shape[1] :]
        width = max(len(row) for row in run["tokens_no_bos"])
        wanted = [row + [0] * (width - len(row)) for row in run["tokens_no_bos"]]
        assert found.tolist() == wanted, name
        done += 1
    assert done == 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_language_model_equals_the_stock_class(architecture, tmp_path):
    stock = stock_language_model(architecture)
    model = load(official_folder(architecture, tmp_path))
    ids = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


@torch.no_grad()
def test_internlm3_with_a_bias_on_q_k_and_v_alone(tmp_path):
    folder = official_folder("InternLM3ForCausalLM", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["qkv_bias"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for part, rows in (("q", 128), ("k", 64), ("v", 64)):
            name = f"language_model.model.layers.{layer}.self_attn.{part}_proj.bias"
            tensors[name] = torch.randn(rows)
    save_file(tensors, folder / "model.safetensors")
    attention = load(folder).model.language_model.layers[0].self_attn
    assert attention.q_proj.bias is not None
    assert attention.o_proj.bias is None


@pytest.mark.parametrize(("length", "factors"), [(40, "short_factor"), (100, "long_factor")])
@torch.no_grad()
def test_phi3_su_rope(length, factors, tmp_path):
    """Original: frequencies divided by the factors, cos and sin scaled by one number."""
    model = load(official_folder("Phi3ForCausalLM", tmp_path))
    positions = torch.arange(length)[None]
    cos, sin = model.model.language_model.rotary_emb(torch.zeros(1), positions)
    inverse = 1 / (torch.tensor(SU[factors]) * 1e4 ** (torch.arange(0, 16, 2) / 16))
    angles = torch.cat([positions[0, :, None] * inverse] * 2, dim=-1)
    scale = math.sqrt(1 + math.log(512 / 64) / math.log(64))
    torch.testing.assert_close(cos[0], angles.cos() * scale)
    torch.testing.assert_close(sin[0], angles.sin() * scale)


def test_tied_embeddings_are_tied_when_the_file_has_no_output_matrix(tmp_path):
    folder = official_folder("Qwen3ForCausalLM", tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = load(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("size", ["84x84", "112x112", "56x98", "126x70", "168x168"])
@torch.no_grad()
def test_golden_position_embeddings_at_forward(size, tmp_path):
    golden = load_file(POSITIONS / "internvl_chat.safetensors")
    if f"chat_embeddings.{size}.input" not in golden:  # too large for the repository
        file = shared("golden/vit_posemb_resize/internvl_chat.safetensors")
        golden = load_file(file)
    model = load(golden_folder("chat_internlm2", "v2.sel-1", tmp_path))
    config = model.config.vision_config
    config.hidden_size = 32
    embeddings = type(model.model.vision_tower.embeddings)(config)
    stem = "chat_embeddings.weights.embeddings"
    embeddings.load_state_dict(
        {
            "cls_token": golden[f"{stem}.class_embedding"],
            "position_embeddings": golden[f"{stem}.position_embedding"],
            "patch_embeddings.projection.weight": golden[f"{stem}.patch_embedding.weight"],
            "patch_embeddings.projection.bias": golden[f"{stem}.patch_embedding.bias"],
        }
    )
    found = embeddings(golden[f"chat_embeddings.{size}.input"])
    wanted = golden[f"chat_embeddings.{size}.output"]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_another_image_size_resizes_the_table(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    table = load_file(folder / "model.safetensors")["vision_model.embeddings.position_embedding"]
    model = chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID, image_size=112)
    found = model.model.vision_tower.embeddings.position_embeddings
    torch.testing.assert_close(found, model_weights.resize_positions(table, 64))
    assert model.config.image_seq_length == 16
    assert model.get_image_features(torch.rand(1, 3, 112, 112)).pooler_output.shape == (1, 16, 64)


def change(folder, remove=(), add=None, reshape=None):
    tensors = load_file(folder / "model.safetensors")
    for name in remove:
        del tensors[name]
    save_file(tensors | (add or {}) | (reshape or {}), folder / "model.safetensors")


def test_computed_buffers_of_old_files_are_harmless(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    name = "language_model.model.layers.0.attention.rotary_emb.inv_freq"
    change(folder, add={name: torch.zeros(8)})
    load(folder)


def test_unknown_language_model_is_named(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("InternLM2ForCausalLM", "MambaForCausalLM"))
    with pytest.raises(ModelFolderError, match="'MambaForCausalLM' is not supported"):
        load(folder)


def test_no_tokenizer_and_no_image_token_id(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    with pytest.raises(ModelFolderError, match="pass image_token_id"):
        chat_model.load_model(folder)


def test_quantize_without_bitsandbytes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_model, "find_spec", lambda _: None)
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'internvl\[quant\]'"):
        chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID, quantize="4bit")
    with pytest.raises(ValueError, match="not '2bit'"):
        chat_model.load_model(folder, image_token_id=IMAGE_TOKEN_ID, quantize="2bit")


def test_a_device_map_never_cuts_a_block(tmp_path):
    folder = golden_folder("chat_internlm2", "v2.sel-1", tmp_path)
    whole, spread = load(folder), load(folder, device_map={"": "cpu"})
    assert all(map(torch.equal, whole.parameters(), spread.parameters()))
    assert set(whole._no_split_modules) == {"InternVLVisionLayer", "LlamaDecoderLayer"}
