"""Small chat checkpoints for tests: golden ones, and random ones of every language model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from internvl.inference import load as loading

GOLDEN = Path(__file__).parent / "golden"
IMAGE_TOKEN_ID = 590
KEPT = slice(None, None, 8)
"""The part of the vocabulary whose golden logits are stored here."""
PROMPT_RUNS = json.loads((GOLDEN / "chat_prompts" / "runs.json").read_text())
"""The original's chat() and batch_chat(): model, tokenizer, template -> prompts and answers."""

LANGUAGE = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SU = {"short_factor": [1.0, 1.1, 1.2, 1.3] * 2, "long_factor": [1.0, 2.0, 3.0, 4.0] * 2}
GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_bias": True,
}
YARN = {
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
# Official `llm_config` keys beside LANGUAGE; and the stock class's arguments for the same model.
ARCHITECTURES = {
    "LlamaForCausalLM": ({"rope_theta": 5e6}, ("llama", {"rope_theta": 5e6})),
    "Qwen2ForCausalLM": (
        {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ("qwen2", {"rope_theta": 1e6}),
    ),
    "Qwen3ForCausalLM": (
        {"rope_theta": 1e6, "head_dim": 32},
        ("qwen3", {"rope_theta": 1e6, "head_dim": 32}),
    ),
    "Phi3ForCausalLM": (
        {
            "rope_theta": 1e4,
            "num_key_value_heads": 4,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "su", **SU},
        },
        (
            "phi3",
            {
                "num_key_value_heads": 4,
                "original_max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **SU},
            },
        ),
    ),
    "InternLM3ForCausalLM": (
        {"rope_theta": 5e7, "head_dim": 32, "bias": False, "qkv_bias": False},
        ("llama", {"rope_theta": 5e7, "head_dim": 32}),
    ),
    "Qwen3MoeForCausalLM": (
        {
            "rope_theta": 1e6,
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
        (
            "qwen3_moe",
            {
                "rope_theta": 1e6,
                "head_dim": 32,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "norm_topk_prob": True,
            },
        ),
    ),
    "GptOssForCausalLM": (
        GPT_OSS | {"rope_theta": 1.5e5, "rope_scaling": YARN | {"rope_type": "yarn"}},
        (
            "gpt_oss",
            GPT_OSS
            | {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 1.5e5}}
            | {"attn_implementation": "eager"},
        ),
    ),
}


def shared(path: str) -> Path:
    """A file of the shared test data; the test is skipped where it is not."""
    file = Path(os.environ.get("INTERNVL_SHARED", "../shared")) / path
    if not file.exists():
        pytest.skip(f"{file} is not here (INTERNVL_SHARED)")
    return file


def golden_folder(case: str, variant: str, to: Path) -> Path:
    """A golden case as the checkpoint folder its README describes."""
    source = GOLDEN / case
    described = json.loads((source / "case.json").read_text())
    chosen = described["variants"][variant]
    config = described["config"] | {
        "model_type": "internvl_chat",
        "select_layer": chosen["select_layer"],
        "ps_version": chosen["ps_version"],
    }
    config["llm_config"] = config["llm_config"] | chosen["llm_config_overrides"]
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "weights.safetensors", to / "model.safetensors")
    return to


def golden_tensors(case: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / case / "tensors.safetensors")


def add_tokenizer(folder: Path, name: str) -> Path:
    """The golden tokenizer `name` into a folder; its output rows beyond it are never the best."""
    for file in (GOLDEN / "label_masks" / f"tokenizer_{name}").iterdir():
        shutil.copy(file, folder)
    return folder


def training_model(to: Path) -> torch.nn.Module:
    """A small model in float32, ready to train."""
    folder = golden_folder("chat_internlm2", "v2.sel-1", to)
    chat = loading.load(folder, image_token_id=IMAGE_TOKEN_ID, device="cpu", dtype="float32")
    return chat.model.train()


def large_vocabulary(folder: Path, tokenizer_class: str) -> Path:
    """A tokenizer of more than 100,000 tokens, as most releases have."""
    folder.mkdir(exist_ok=True)
    words = {f"w{token_id}": token_id for token_id in range(100_001)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    config = json.dumps({"tokenizer_class": tokenizer_class})
    (folder / "tokenizer_config.json").write_text(config)
    (folder / "config.json").write_text('{"model_type": "internvl_chat"}')
    return folder


def prompt_folder(key: str, to: Path) -> Path:
    """A golden chat_prompts case: model, tokenizer and template; unused output rows are zero."""
    name, _, template = key.partition(".")
    folder = add_tokenizer(golden_folder(f"chat_{name}", "v2.sel-1", to), name)
    config = json.loads((folder / "config.json").read_text()) | {"template": template}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    head = next(n for n in tensors if n.endswith(("output.weight", "lm_head.weight")))
    tensors[head][PROMPT_RUNS[key]["lm_head_rows_zeroed_from"] :] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


def stock_language_model(architecture: str) -> torch.nn.Module:
    """transformers' own class with random weights, for an architecture of the table above."""
    model_type, values = ARCHITECTURES[architecture][1]
    config = CONFIG_MAPPING[model_type](**(LANGUAGE | values))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def official_folder(architecture: str, to: Path, **overrides: object) -> Path:
    """A random chat checkpoint in the official layout, written without the package's help."""
    language = stock_language_model(architecture)
    golden = load_file(GOLDEN / "chat_internlm2" / "weights.safetensors")
    tensors = {k: v for k, v in golden.items() if not k.startswith("language_model.")}
    split = architecture == "Qwen3MoeForCausalLM"
    for name, tensor in language.state_dict().items():
        stored = f"language_model.{name}"
        tensors |= _per_expert(stored, tensor) if split else {stored: tensor.clone()}
    config = json.loads((GOLDEN / "chat_internlm2" / "case.json").read_text())["config"]
    config |= {"model_type": "internvl_chat", "select_layer": -1, "ps_version": "v2"}
    config["llm_config"] = LANGUAGE | ARCHITECTURES[architecture][0]
    config["llm_config"]["architectures"] = [architecture]
    to.mkdir(parents=True, exist_ok=True)
    (to / "config.json").write_text(json.dumps(config | overrides))
    save_file({k: v.contiguous() for k, v in tensors.items()}, to / "model.safetensors")
    return to


def _per_expert(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Experts as the released files have them: one module each."""
    stem = name.rpartition(".")[0]
    if name.endswith("experts.gate_up_proj"):
        halves = [expert.chunk(2) for expert in tensor]
        return {
            f"{stem}.{e}.{kind}_proj.weight": half.clone()
            for e, pair in enumerate(halves)
            for kind, half in zip(("gate", "up"), pair, strict=True)
        }
    if name.endswith("experts.down_proj"):
        return {f"{stem}.{e}.down_proj.weight": part.clone() for e, part in enumerate(tensor)}
    return {name: tensor.clone()}


def official_lora_folder(to: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The golden merge example as the checkpoint the original writes."""
    folder = golden_folder("chat_internlm2", "v2.sel-1", to)
    golden = load_file(GOLDEN / "lora_count" / "merge_example.safetensors")
    adapters = {k.removeprefix("lora."): v for k, v in golden.items() if k.startswith("lora.")}
    adapted = {k.partition(".lora_")[0] for k in adapters}
    stored = dict(adapters)
    for name, tensor in load_file(folder / "model.safetensors").items():
        part, _, rest = name.partition(".")
        if part in ("language_model", "vision_model"):
            name = f"{part}.base_model.model.{rest}"
        stem, _, kind = name.rpartition(".")
        stored[f"{stem}.base_layer.{kind}" if stem in adapted else name] = tensor
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_llm_lora": 8, "use_backbone_lora": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, golden
