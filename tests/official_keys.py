"""The weights an official checkpoint holds, written down from its layout alone."""

from collections.abc import Iterator
from typing import Any


def official_keys(config: dict[str, Any]) -> set[str]:
    """Every weight name of an official `config.json`."""
    return {
        *_tower(config["vision_config"]),
        *(f"mlp1.{part}.{kind}" for part in (0, 1, 3) for kind in ("weight", "bias")),
        *_language_model(config["llm_config"]),
    }


def official_dual_keys(config: dict[str, Any]) -> set[str]:
    """Every weight name of an official InternVL-14B `config.json`."""
    text = config["qllama_config"]
    language = text | {"architectures": ["LlamaForCausalLM"]}
    cross = range(0, text["num_hidden_layers"], text["cross_attention_frequency"])
    return {
        *_tower(config["vision_config"]),
        *(f"qllama.{name.removeprefix('language_model.')}" for name in _language_model(language)),
        *(f"qllama.model.layers.{n}.cross_attn.{x}.weight" for n in cross for x in _CROSS),
        *("query_tokens", "text_projection", "logit_scale", "itm_head.weight", "itm_head.bias"),
        *(f"{pool}.{name}" for pool in ("clip_projector", "clip_projector2") for name in _POOL),
    }


_CROSS = ("q_proj", "k_proj", "v_proj", "o_proj", "norm1", "norm2")
_POOL = (
    *(f"norm1_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")),
    *(f"cross_attn.{x}.weight" for x in "qkv"),
    *(f"cross_attn.{x}_bias" for x in "qkv"),
    *("cross_attn.proj.weight", "cross_attn.proj.bias"),
)


def _tower(config: dict[str, Any]) -> Iterator[str]:
    stem = "vision_model.embeddings"
    yield from (f"{stem}.class_embedding", f"{stem}.position_embedding")
    yield from (f"{stem}.patch_embedding.weight", f"{stem}.patch_embedding.bias")
    for layer in range(config["num_hidden_layers"]):
        stem = f"vision_model.encoder.layers.{layer}"
        yield from (f"{stem}.ls1", f"{stem}.ls2", f"{stem}.attn.qkv.weight")
        if config["qkv_bias"]:
            yield f"{stem}.attn.qkv.bias"
        if config["qk_normalization"]:
            yield from (f"{stem}.attn.q_norm.weight", f"{stem}.attn.k_norm.weight")
        for part in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            yield from (f"{stem}.{part}.weight", f"{stem}.{part}.bias")
        for part in ("norm1", "norm2"):
            yield f"{stem}.{part}.weight"
            if config["norm_type"] == "layer_norm":
                yield f"{stem}.{part}.bias"


_ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_NORMS = ["input_layernorm", "post_attention_layernorm"]
_LAYERS = {
    "InternLM2ForCausalLM": [
        *("attention.wqkv", "attention.wo", "attention_norm", "ffn_norm"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ],
    "LlamaForCausalLM": _ATTENTION + _MLP + _NORMS,
    "InternLM3ForCausalLM": _ATTENTION + _MLP + _NORMS,
    "Qwen2ForCausalLM": _ATTENTION + _MLP + _NORMS,
    "Qwen3ForCausalLM": [
        *_ATTENTION,
        *_MLP,
        *_NORMS,
        "self_attn.q_norm",
        "self_attn.k_norm",
    ],
    "Qwen3MoeForCausalLM": [
        *_ATTENTION,
        *_NORMS,
        *("self_attn.q_norm", "self_attn.k_norm", "mlp.gate"),
    ],
    "Phi3ForCausalLM": [
        *("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        *_NORMS,
    ],
    "GptOssForCausalLM": [*_ATTENTION, *_NORMS, "mlp.router"],
}


def _language_model(config: dict[str, Any]) -> Iterator[str]:
    kind, stem = config["architectures"][0], "language_model"
    ends = {"InternLM2ForCausalLM": ("tok_embeddings", "output")}
    embeddings, head = ends.get(kind, ("embed_tokens", "lm_head"))
    yield from (f"{stem}.model.{embeddings}.weight", f"{stem}.{head}.weight")
    yield f"{stem}.model.norm.weight"
    for layer in range(config["num_hidden_layers"]):
        for part in _LAYERS[kind]:
            yield f"{stem}.model.layers.{layer}.{part}.weight"
        yield from (f"{stem}.model.layers.{layer}.{part}" for part in _extras(config))


def _extras(config: dict[str, Any]) -> Iterator[str]:
    kind = config["architectures"][0]
    if kind == "Qwen2ForCausalLM":
        yield from (f"self_attn.{x}_proj.bias" for x in "qkv")
    elif kind == "Qwen3MoeForCausalLM":
        for expert in range(config["num_experts"]):
            yield from (f"mlp.experts.{expert}.{x}_proj.weight" for x in ("gate", "up", "down"))
    elif kind == "GptOssForCausalLM":
        yield from (f"self_attn.{x}_proj.bias" for x in "qkvo")
        yield from ("self_attn.sinks", "mlp.router.bias")
        yield from (f"mlp.experts.{x}_proj{y}" for x in ("gate_up", "down") for y in ("", "_bias"))
