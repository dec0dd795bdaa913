"""Converts the official configuration to `transformers`' and back.

Original: `internvl_chat/internvl/model/internvl_chat/configuration_internvl_chat.py`. What
`InternVLConfig` has no key for (template, tiling, pixel-shuffle version …) travels in its extra key
`internvl`, which plain `transformers` keeps and ignores.
"""

from typing import Any

from transformers import CONFIG_MAPPING, InternVLConfig, PreTrainedConfig

from internvl.errors import ModelFolderError

LANGUAGE_MODELS = {
    "LlamaForCausalLM": "llama",
    "InternLM2ForCausalLM": "llama",
    "InternLM3ForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GptOssForCausalLM": "gpt_oss",
}
"""Official architecture of the language model -> `transformers` model type."""

_VISION = (
    # official, ours, default of the original class
    ("hidden_size", "hidden_size", 3200),
    ("num_hidden_layers", "num_hidden_layers", 48),
    ("num_attention_heads", "num_attention_heads", 25),
    ("intermediate_size", "intermediate_size", 12800),
    ("num_channels", "num_channels", 3),
    ("patch_size", "patch_size", 14),
    ("image_size", "image_size", 224),
    ("qkv_bias", "attention_bias", False),
    ("qk_normalization", "use_qk_norm", True),
    ("norm_type", "norm_type", "rms_norm"),
    ("layer_norm_eps", "layer_norm_eps", 1e-6),
    ("hidden_act", "hidden_act", "gelu"),
    ("dropout", "projection_dropout", 0.0),
    ("attention_dropout", "attention_dropout", 0.0),
    ("initializer_range", "initializer_range", 0.02),
    ("initializer_factor", "layer_scale_init_value", 0.1),
)
_CHAT: dict[str, Any] = {
    "template": None,
    "system_message": None,
    "ps_version": "v1",
    "pad2square": False,
    "force_image_size": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "normalize": "imagenet",
    "exif": "ignore",
}
"""Official keys that travel in `internvl`, with the original class's defaults; and of a recipe
`data.normalize`, which the original keeps in its command lines, and `data.exif`."""
_OPTIONAL = {"system_message": None, "normalize": "imagenet", "exif": "ignore"}
"""Keys that are not written if they have these values."""

RUN_KEYS = tuple(key for key in _CHAT if key != "ps_version")
"""Keys of `_CHAT` that a recipe sets; the version of the pixel shuffle is the model's."""

HF_CHAT: dict[str, Any] = _CHAT | {
    # What the released -hf folders are: their processor tiles 1 to 12 with a thumbnail.
    "template": "internvl2_5",
    "ps_version": "v2",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "max_dynamic_patch": 12,
}
"""Like `_CHAT`, for an -hf folder, whose files have none of these keys."""
_LORA_KEYS = ("use_backbone_lora", "use_llm_lora")


def from_official(config: dict[str, Any], image_token_id: int) -> InternVLConfig:
    """Converts the official `config.json` to an `InternVLConfig` with the extra key `internvl`.

    Raises:
        ModelFolderError: `transformers` has no class for the architecture.
    """
    vision = vision_from_official(config["vision_config"])
    text, architecture = text_from_official(config["llm_config"])
    chat = {key: config.get(key, default) for key, default in _CHAT.items()}
    chat["language_model"] = architecture
    ratio = config.get("downsample_ratio", 0.5)
    side = vision["image_size"] // vision["patch_size"]
    return InternVLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=image_token_id,
        image_seq_length=int(side**2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=config.get("select_layer", -1),
        # The files store both matrices; transformers' default would tie them.
        tie_word_embeddings=False,
        internvl=chat,
    )


def vision_from_official(config: dict[str, Any]) -> dict[str, Any]:
    """Converts an official `vision_config` (or a standalone InternViT's config) to our keys."""
    return {ours: config.get(official, default) for official, ours, default in _VISION}


def vision_to_official(config: PreTrainedConfig) -> dict[str, Any]:
    """Converts a tower's configuration to an official `vision_config`."""
    vision = config.to_dict()
    return {
        **{official: _plain(vision[ours]) for official, ours, _ in _VISION},
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "drop_path_rate": 0.0,
        "use_flash_attn": True,
    }


def text_from_official(config: dict[str, Any]) -> tuple[PreTrainedConfig, str]:
    """Returns (the language model's `transformers` config, its official architecture)."""
    architecture = (config.get("architectures") or [""])[0]
    if architecture not in LANGUAGE_MODELS:
        raise ModelFolderError(
            f"config.json: language model {architecture!r} is not supported; supported are "
            f"{', '.join(LANGUAGE_MODELS)}"
        )
    model_type = LANGUAGE_MODELS[architecture]
    if architecture == "InternLM3ForCausalLM" and config.get("qkv_bias") and not config.get("bias"):
        model_type = "qwen2"  # the class with a bias on q, k and v only
    config_class = CONFIG_MAPPING[model_type]
    # The class's own fields only: general keys of old files (torch_dtype …) stay out.
    fields = set(config_class.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    values = {key: value for key, value in config.items() if key in fields | {"head_dim"}}
    values["rope_parameters"] = _rope_parameters(config)
    values["tie_word_embeddings"] = False
    if architecture.startswith("InternLM") and model_type == "llama":
        values["attention_bias"] = values["mlp_bias"] = bool(config.get("bias"))
    if values.get("head_dim") is None:  # null in a file would replace the class's computed one
        values.pop("head_dim", None)
    return config_class(**values), architecture


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Returns `rope_parameters` from the original's `rope_theta` and `rope_scaling`."""
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    rope_type = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)
    rope_type = "longrope" if rope_type == "su" else rope_type  # Phi-3's name before
    return {"rope_type": rope_type, "rope_theta": config.get("rope_theta") or 10000.0, **scaling}


def to_official(config: InternVLConfig) -> dict[str, Any]:
    """Converts to the official `config.json`, without `auto_map` and LoRA ranks."""
    chat = chat_settings(config)
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        **{key: chat[key] for key in _CHAT if key not in _OPTIONAL or chat[key] != _OPTIONAL[key]},
        **dict.fromkeys(_LORA_KEYS, 0),
        "select_layer": config.vision_feature_layer,
        "downsample_ratio": config.downsample_ratio,
        "hidden_size": config.text_config.hidden_size,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "vision_config": vision_to_official(config.vision_config),
        "llm_config": _text_to_official(config.text_config, language_model(config))
        | {"tie_word_embeddings": bool(config.tie_word_embeddings)},
    }


def _text_to_official(text: PreTrainedConfig, architecture: str) -> dict[str, Any]:
    values = text.to_dict()
    for key in ("transformers_version", "_name_or_path", "dtype"):
        values.pop(key, None)
    if architecture != "GptOssForCausalLM":  # the other original classes do not have it
        values.pop("layer_types", None)
    if architecture == "Qwen3MoeForCausalLM":  # today's classes say num_local_experts
        values["num_experts"] = text.num_experts
        values.pop("num_local_experts", None)
    rope = dict(values.pop("rope_parameters", None) or {})
    rope_type = rope.pop("rope_type", "default")
    values["rope_theta"] = rope.pop("rope_theta", 10000.0)
    rope.pop("partial_rotary_factor", None)
    rope.pop("type", None)
    if architecture == "Phi3ForCausalLM" and rope_type == "longrope":
        rope_type = "su"
        rope.pop("original_max_position_embeddings", None)
    # The 3.5 code imports Qwen3 and GPT-OSS from a transformers that reads the new key only.
    key = "rope_type" if architecture.startswith(("Qwen3", "GptOss")) else "type"
    values["rope_scaling"] = None if rope_type == "default" else {**rope, key: rope_type}
    values["architectures"] = [architecture]
    if architecture == "InternLM2ForCausalLM":
        values["model_type"] = "internlm2"
        values["bias"] = values.pop("attention_bias", False)
        values.pop("mlp_bias", None)
        values.pop("head_dim", None)
        values["attn_implementation"] = "eager"  # the key that its remote code reads
    elif architecture == "InternLM3ForCausalLM":
        values["bias"] = values.pop("mlp_bias", False)
        values["qkv_bias"] = values["model_type"] == "qwen2" or values.pop("attention_bias", False)
        values["model_type"] = "internlm3"
    return values


def chat_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns template, tiling and pixel-shuffle version; by default those of -hf releases."""
    return HF_CHAT | (getattr(config, "internvl", None) or {})


def language_model(config: PreTrainedConfig) -> str:
    """Returns the official architecture of the language model, such as "InternLM2ForCausalLM"."""
    architecture = chat_settings(config).get("language_model")
    if architecture:
        return architecture
    model_type = config.text_config.model_type
    # Reversed, so that "llama" gives the first of its three architectures.
    names = {value: key for key, value in reversed(LANGUAGE_MODELS.items())}
    if model_type not in names:
        raise ModelFolderError(f"config.json: language model type {model_type!r} is not supported")
    return names[model_type]


def head_width(text: Any) -> int:
    """Returns the width of an attention head of a language model."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _plain(value: Any) -> Any:
    """Returns one side of a pair: the original keeps a single number."""
    return value[0] if isinstance(value, list | tuple) else value
