"""Converts InternVL-14B's official configuration to ours and back.

Original: `internvl_g/internvl/model/internvl_stage2/configuration_internvl.py`.
"""

from typing import Any

from transformers import InternVLVisionConfig, PreTrainedConfig

from internvl.models import configs
from internvl.models.dual.qllama import QLlamaConfig

_QLLAMA = {
    "vocab_size": 49954,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Keys of the same name in `qllama_config` and Llama's configuration, with the release's values."""

_TOP = (
    # official, ours, default of the original class
    ("clip_embed_dim", "embed_dim", 768),
    ("attn_pool_num_heads", "pool_num_heads", 16),
    ("label_smoothing", "label_smoothing", 0.0),
    ("initializer_range", "initializer_range", 0.02),
    ("force_image_size", "force_image_size", None),
)


class DualConfig(PreTrainedConfig):
    """InternVL-14B: an InternViT, a QLLaMA, and the heads of InternVL-C and -G."""

    model_type = "internvl_14b"
    sub_configs = {  # noqa: RUF012 (transformers' way)
        "vision_config": InternVLVisionConfig,
        "text_config": QLlamaConfig,
    }

    vision_config: Any = None
    """InternVLVisionConfig, or a dict of its keys."""
    text_config: Any = None
    """QLlamaConfig, or a dict of its keys."""
    embed_dim: int = 768
    """Width (E) of the embeddings."""
    pool_num_heads: int = 16
    label_smoothing: float = 0.0
    """Label smoothing of the contrastive loss in stage 2."""
    force_image_size: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # `from_pretrained` passes the sections as dicts, our own code passes configurations.
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = InternVLVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = QLlamaConfig(**(self.text_config or {}))
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Side (S) of the square image, px."""
        return self.vision_config.image_size[0]


def from_official(config: dict[str, Any], *, queries: bool = True) -> DualConfig:
    """Converts the official `config.json`; without `queries`, of a file of InternVL-C alone."""
    vision = configs.vision_from_official(config["vision_config"])
    text = config["qllama_config"]
    top = {ours: config.get(official, default) for official, ours, default in _TOP}
    # It replaces the tower's image size; a position table of another grid is resized on load.
    if top["force_image_size"]:
        vision["image_size"] = top["force_image_size"]

    def query_setting(key: str, default: int) -> int:
        # The top level first: the original reads these keys there but forgets to write
        # `cross_attention_frequency`, so that a value other than 2 is only in the section.
        return config.get(key) or text.get(key) or default

    values = {key: text.get(key, default) for key, default in _QLLAMA.items()}
    values |= {
        "num_query_tokens": query_setting("num_query_token", 96) if queries else 0,
        "cross_attention_frequency": query_setting("cross_attention_frequency", 2),
        "vision_hidden_size": vision["hidden_size"],
        "tie_word_embeddings": False,
    }
    return DualConfig(vision_config=vision, text_config=values, **top)


def to_official(config: DualConfig) -> dict[str, Any]:
    """Converts to the official `config.json`, without `auto_map` and LoRA ranks."""
    text = config.text_config
    queries = {
        "num_query_token": text.num_query_tokens,
        "cross_attention_frequency": text.cross_attention_frequency,
    }
    return {
        "architectures": ["InternVLModel"],
        "model_type": "internvl",
        **{official: getattr(config, ours) for official, ours, _ in _TOP},
        **queries,
        "hidden_size": text.hidden_size,
        "use_backbone_lora": 0,
        "use_qllama_lora": 0,
        # Written, because the original's default of true would replace the embeddings by the output
        # matrix when it loads.
        "tie_word_embeddings": False,
        "vision_config": configs.vision_to_official(config.vision_config),
        "qllama_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: getattr(text, key) for key in _QLLAMA},
            **queries,
            "tie_word_embeddings": False,
            "use_cache": True,
        },
    }
