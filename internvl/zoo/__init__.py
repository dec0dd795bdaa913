"""The released models as one table of data: parts, sizes, template, tiling, published scores.

Imports no torch. A part's numbers are those of its configuration file, under the official keys.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from internvl.errors import UnknownModel

BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes of a weight; in 4 bits, 64 weights share a float32 scale. Only the blocks' linear layers
are kept in 8 or 4 bits (bitsandbytes), everything else is then bfloat16."""

_VIT_6B = {
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
}
_VIT_300M = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "qkv_bias": True,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "image_size": 448,
}
VISION_TOWERS: dict[str, dict[str, Any]] = {
    "InternViT-6B-224px": _VIT_6B | {"num_hidden_layers": 48, "image_size": 224},
    "InternViT-6B-364px": _VIT_6B | {"num_hidden_layers": 48, "image_size": 364},
    "InternViT-6B-448px": _VIT_6B | {"num_hidden_layers": 48, "image_size": 448},
    "InternViT-6B-448px-V1-2": _VIT_6B | {"num_hidden_layers": 45, "image_size": 448},
    "InternViT-6B-448px-V1-5": _VIT_6B | {"num_hidden_layers": 45, "image_size": 448},
    "InternViT-6B-448px-V2_5": _VIT_6B | {"num_hidden_layers": 45, "image_size": 448},
    "InternViT-300M-448px": _VIT_300M,
    "InternViT-300M-448px-V2_5": _VIT_300M,
}


_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size"),
)


def _language(architecture: str, *sizes: int, **more: Any) -> dict[str, Any]:
    """`llm_config` of a language model as the chat model stores it; `sizes` as in _SIZES."""
    return {"architectures": [architecture], **dict(zip(_SIZES, sizes, strict=True)), **more}


def _internlm2(*sizes: int, **more: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"bias": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    return _language("InternLM2ForCausalLM", *sizes, 92553, pad_token_id=2, **known | more)


def _llama(*sizes: int, **more: Any) -> dict[str, Any]:
    return _language("LlamaForCausalLM", *sizes, rms_norm_eps=1e-5, **more)


def _qwen2(*sizes: int) -> dict[str, Any]:
    return _language("Qwen2ForCausalLM", *sizes, 151674, rms_norm_eps=1e-6, rope_theta=1e6)


_QWEN3: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "head_dim": 128}


def _qwen3(*sizes: int) -> dict[str, Any]:
    return _language("Qwen3ForCausalLM", *sizes, 151936, **_QWEN3)


def _qwen3_moe(*sizes: int, experts: int) -> dict[str, Any]:
    mixture = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": experts,
        "norm_topk_prob": True,
    }
    return _language("Qwen3MoeForCausalLM", *sizes, 151936, **_QWEN3 | mixture)


_SU = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
"""Shape only: the factors are the checkpoint's."""

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    # layers, width, heads, key heads, feed-forward width (, vocabulary)
    "LLaMA2-13B": _llama(40, 5120, 40, 40, 13824, 32000, rope_theta=1e4),
    "Nous-Hermes-2-Yi-34B": _llama(60, 7168, 56, 8, 20480, 64000, rope_theta=5e6),
    "Hermes-2-Theta-Llama-3-70B": _llama(80, 8192, 64, 8, 28672, 128265, rope_theta=5e5),
    "internlm2-chat-1_8b": _internlm2(24, 2048, 16, 8, 8192),
    "internlm2_5-1_8b-chat": _internlm2(24, 2048, 16, 8, 8192),
    "internlm2_5-7b-chat": _internlm2(32, 4096, 32, 8, 14336),
    "internlm2-chat-20b": _internlm2(48, 6144, 48, 8, 16384),
    "internlm2_5-20b-chat": _internlm2(48, 6144, 48, 8, 16384),
    "internlm3-8b-instruct": _language(
        "InternLM3ForCausalLM", 48, 4096, 32, 2, 10240, 128521, head_dim=128, rope_theta=5e7
    ),
    "Phi-3-mini-128k-instruct": _language(
        "Phi3ForCausalLM",
        *(32, 3072, 32, 32, 8192, 32020),
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        pad_token_id=32000,
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
        rope_scaling=_SU,
    ),
    "Qwen2-0.5B-Instruct": _qwen2(24, 896, 14, 2, 4864) | {"vocab_size": 151655},
    "Qwen2.5-0.5B-Instruct": _qwen2(24, 896, 14, 2, 4864),
    "Qwen2.5-1.5B-Instruct": _qwen2(28, 1536, 12, 2, 8960),
    "Qwen2.5-3B-Instruct": _qwen2(36, 2048, 16, 2, 11008),
    "Qwen2.5-7B-Instruct": _qwen2(28, 3584, 28, 4, 18944),
    "Qwen2.5-14B-Instruct": _qwen2(48, 5120, 40, 8, 13824),
    "Qwen2.5-32B-Instruct": _qwen2(64, 5120, 40, 8, 27648),
    "Qwen2.5-72B-Instruct": _qwen2(80, 8192, 64, 8, 29568),
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 8, 3072),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 8, 6144),
    "Qwen3-4B": _qwen3(36, 2560, 32, 8, 9728),
    "Qwen3-8B": _qwen3(36, 4096, 32, 8, 12288),
    "Qwen3-14B": _qwen3(40, 5120, 40, 8, 17408),
    "Qwen3-32B": _qwen3(64, 5120, 64, 8, 25600),
    "Qwen3-30B-A3B": _qwen3_moe(48, 2048, 32, 4, 6144, experts=768),
    "Qwen3-235B-A22B": _qwen3_moe(94, 4096, 64, 4, 12288, experts=1536),
    "gpt-oss-20b": _language(
        "GptOssForCausalLM",
        *(24, 2880, 64, 8, 2880, 201088),
        head_dim=64,
        attention_bias=True,
        num_local_experts=32,
        num_experts_per_tok=4,
    ),
    "QLLaMA": _llama(32, 4096, 32, 32, 11008, 49954)
    | {"rms_norm_eps": 1e-6, "num_query_token": 96, "cross_attention_frequency": 2},
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """One released model."""

    name: str
    vision: str
    """Key of VISION_TOWERS."""
    language: str
    """Key of LANGUAGE_MODELS."""
    template: str = "internvl2_5"
    """Conversation template; empty for InternVL-14B."""
    select_layer: int = -1
    """Which block's output of the tower is read."""
    ps_version: str = "v2"
    """Pixel shuffle."""
    max_tiles: int = 12
    """Most tiles of an image, thumbnail not counted; 1: the image is one square tile."""
    published: str = ""
    """Parameters as the release prints them, "2.2B"; empty where the specs give none."""
    download_gb: float | None = None
    """Size of the download, 10^9 bytes."""
    note: str = ""
    """What a reader of this row should know, such as why two numbers of it differ."""

    @property
    def repository(self) -> str:
        """Hub id."""
        return f"OpenGVLab/{self.name}"

    @property
    def family(self) -> str:
        """ "chat" or "dual"."""
        return "dual" if self.language == "QLLaMA" else "chat"


_CHAT_1_2: dict[str, Any] = {
    "template": "Hermes-2",
    "ps_version": "v1",
    "max_tiles": 1,
    "published": "40.1B",
}
_INTERNLM2: dict[str, Any] = {"template": "internlm2-chat"}
_ROUNDED_TWICE = "its weights are 4.147 B, which is 4.1B; the release prints 4.2B"
_COPIED = (
    "4.2B is InternVL2-4B's number, which the guides repeat for this model; the language models "
    "differ, and this one's weights are 3.7 B"
)
_6B_15, _6B_25 = "InternViT-6B-448px-V1-5", "InternViT-6B-448px-V2_5"
_300M, _300M_25 = "InternViT-300M-448px", "InternViT-300M-448px-V2_5"

_ROWS: tuple[Model, ...] = (
    Model(
        name="InternVL-14B-224px",
        vision="InternViT-6B-224px",
        language="QLLaMA",
        template="",
        max_tiles=1,
        published="13.8B",
        download_gb=27.7,
    ),
    *(
        Model(
            name=f"InternVL-14B-{data}-FT-364px",
            vision="InternViT-6B-364px",
            language="QLLaMA",
            template="",
            max_tiles=1,
            published="13.8B",
        )
        for data in ("Flickr30K", "FlickrCN")
    ),
    Model(
        name="InternVL-Chat-V1-1",
        vision="InternViT-6B-448px",
        language="LLaMA2-13B",
        template="internvl_zh",
        select_layer=-4,
        ps_version="v1",
        max_tiles=1,
        published="19.1B",
        note="counted with LLaMA2-13B's 32,000 tokens; the release's tokenizer may be larger: its "
        "config.json decides",
    ),
    *(
        Model(
            name=name,
            vision="InternViT-6B-448px-V1-2",
            language="Nous-Hermes-2-Yi-34B",
            **_CHAT_1_2,
        )
        for name in ("InternVL-Chat-V1-2", "InternVL-Chat-V1-2-Plus")
    ),
    Model(
        name="InternVL-Chat-V1-5",
        vision=_6B_15,
        language="internlm2-chat-20b",
        published="25.5B",
        **_INTERNLM2,
    ),
    Model(
        name="Mini-InternVL-Chat-2B-V1-5",
        vision=_300M,
        language="internlm2-chat-1_8b",
        published="2.2B",
        **_INTERNLM2,
    ),
    Model(
        name="Mini-InternVL-Chat-4B-V1-5",
        vision=_300M,
        language="Phi-3-mini-128k-instruct",
        template="phi3-chat",
        published="4.2B",
        note=_ROUNDED_TWICE,
    ),
    Model(
        name="InternVL2-1B",
        vision=_300M,
        language="Qwen2-0.5B-Instruct",
        template="Hermes-2",
        published="0.9B",
        download_gb=1.8,
    ),
    Model(
        name="InternVL2-2B",
        vision=_300M,
        language="internlm2-chat-1_8b",
        published="2.2B",
        download_gb=4.2,
        **_INTERNLM2,
    ),
    Model(
        name="InternVL2-4B",
        vision=_300M,
        language="Phi-3-mini-128k-instruct",
        template="phi3-chat",
        published="4.2B",
        note=_ROUNDED_TWICE,
        download_gb=7.8,
    ),
    Model(
        name="InternVL2-8B",
        vision=_300M,
        language="internlm2_5-7b-chat",
        published="8.1B",
        download_gb=16,
        **_INTERNLM2,
    ),
    Model(
        name="InternVL2-26B",
        vision=_6B_15,
        language="internlm2-chat-20b",
        published="25.5B",
        download_gb=48,
        **_INTERNLM2,
    ),
    Model(
        name="InternVL2-40B",
        vision=_6B_15,
        language="Nous-Hermes-2-Yi-34B",
        template="Hermes-2",
        published="40.1B",
        download_gb=75,
    ),
    Model(
        name="InternVL2-Llama3-76B",
        vision=_6B_15,
        language="Hermes-2-Theta-Llama-3-70B",
        published="76.3B",
        download_gb=143,
        **_INTERNLM2,
    ),
    *(
        Model(
            name=f"InternVL2_5-{size}",
            vision=vision,
            language=language,
            published=published,
            note=_COPIED if size == "4B" else "",
        )
        for size, vision, language, published in (
            ("1B", _300M_25, "Qwen2.5-0.5B-Instruct", "0.9B"),
            ("2B", _300M_25, "internlm2_5-1_8b-chat", "2.2B"),
            ("4B", _300M_25, "Qwen2.5-3B-Instruct", "4.2B"),
            ("8B", _300M_25, "internlm2_5-7b-chat", "8.1B"),
            ("26B", _6B_25, "internlm2_5-20b-chat", "25.5B"),
            ("38B", _6B_25, "Qwen2.5-32B-Instruct", "38.4B"),
            ("78B", _6B_25, "Qwen2.5-72B-Instruct", "78.4B"),
        )
    ),
    *(
        Model(name=f"InternVL3-{size}", vision=vision, language=language)
        for size, vision, language in (
            ("1B", _300M_25, "Qwen2.5-0.5B-Instruct"),
            ("2B", _300M_25, "Qwen2.5-1.5B-Instruct"),
            ("8B", _300M_25, "Qwen2.5-7B-Instruct"),
            ("9B", _300M_25, "internlm3-8b-instruct"),
            ("14B", _300M_25, "Qwen2.5-14B-Instruct"),
            ("38B", _6B_25, "Qwen2.5-32B-Instruct"),
            ("78B", _6B_25, "Qwen2.5-72B-Instruct"),
        )
    ),
    *(
        Model(name=f"InternVL3_5-{size}", vision=vision, language=f"Qwen3-{language}")
        for size, vision, language in (
            ("1B", _300M_25, "0.6B"),
            ("2B", _300M_25, "1.7B"),
            ("4B", _300M_25, "4B"),
            ("8B", _300M_25, "8B"),
            ("14B", _300M_25, "14B"),
            ("38B", _6B_25, "32B"),
            ("30B-A3B", _300M_25, "30B-A3B"),
            ("241B-A28B", _6B_25, "235B-A22B"),
        )
    ),
    Model(
        name="InternVL3_5-GPT-OSS-20B-A4B-Preview",
        vision=_300M_25,
        language="gpt-oss-20b",
        template="internvl3_5_gpt_oss",
        note="answers and exports; does not train here: its sliding-window layers need a packed "
        "attention of their own",
    ),
)
MODELS: dict[str, Model] = {model.name: model for model in _ROWS}
"""Released models by name."""


def find(name: str) -> Model:
    """The model called `name`: a name, a hub id, or either in other capitals.

    Raises:
        UnknownModel: no such model; names the nearest ones.
    """
    short = name.rstrip("/").split("/")[-1].removesuffix("-hf").removesuffix("-HF")
    lowered = {known.lower(): model for known, model in MODELS.items()}
    if short.lower() in lowered:
        return lowered[short.lower()]
    near = difflib.get_close_matches(short.lower(), lowered, n=3, cutoff=0.4)
    names = ", ".join(lowered[known].name for known in near) or "`internvl models` lists them"
    raise UnknownModel(f"no released model is called {name!r}; nearest: {names}")


def official_config(model: Model) -> dict[str, Any]:
    """The official `config.json` of a model, as far as its shape goes."""
    if model.family == "dual":
        return {
            "model_type": "internvl",
            "vision_config": VISION_TOWERS[model.vision],
            "qllama_config": LANGUAGE_MODELS[model.language],
            "clip_embed_dim": _EMBED_DIM,
        }
    return {
        "model_type": "internvl_chat",
        "vision_config": VISION_TOWERS[model.vision],
        "llm_config": LANGUAGE_MODELS[model.language],
        "template": model.template,
        "select_layer": model.select_layer,
        "ps_version": model.ps_version,
        "dynamic_image_size": model.max_tiles > 1,
        "use_thumbnail": model.max_tiles > 1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": model.max_tiles,
        "force_image_size": VISION_TOWERS[model.vision]["image_size"],
        "downsample_ratio": 0.5,
    }


def num_parameters(model: Model) -> int:
    """Parameters of a model, worked out from its sizes."""
    vision, language = VISION_TOWERS[model.vision], LANGUAGE_MODELS[model.language]
    if model.family == "dual":
        return _tower(vision) + _language_model(language) + _queries_and_heads(vision, language)
    return _tower(vision) + _projector(vision, language) + _language_model(language)


def _tower(sizes: dict[str, Any]) -> int:
    d, f = sizes["hidden_size"], sizes["intermediate_size"]
    layer_norm, bias = sizes["norm_type"] == "layer_norm", sizes["qkv_bias"]
    norms = 2 * d * (2 if layer_norm else 1) + (2 * d if sizes["qk_normalization"] else 0)
    block = 3 * d * d + (3 * d if bias else 0) + d * d + d + 2 * d * f + f + d + norms + 2 * d
    patches = (sizes["image_size"] // 14) ** 2
    return sizes["num_hidden_layers"] * block + d * (1 + 1 + patches) + 3 * 14 * 14 * d + d


def _projector(vision: dict[str, Any], language: dict[str, Any]) -> int:
    wide, d = 4 * vision["hidden_size"], language["hidden_size"]
    return 2 * wide + wide * d + d + d * d + d


def _language_model(sizes: dict[str, Any]) -> int:
    d, heads, kv_heads = (
        sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    kind, each = sizes["architectures"][0], sizes.get("head_dim") or d // heads
    attention = d * each * (2 * heads + 2 * kv_heads)
    if kind in ("Qwen2ForCausalLM", "GptOssForCausalLM"):
        attention += each * (heads + 2 * kv_heads)
    if kind.startswith("Qwen3"):
        attention += 2 * each
    if kind == "GptOssForCausalLM":
        experts, f = sizes["num_local_experts"], sizes["intermediate_size"]
        attention += d + heads
        mlp = experts * (3 * d * f + 2 * f + d) + experts * d + experts
    elif kind == "Qwen3MoeForCausalLM":
        mlp = sizes["num_experts"] * (3 * d * sizes["moe_intermediate_size"] + d)
    else:
        mlp = 3 * d * sizes["intermediate_size"]
    blocks = sizes["num_hidden_layers"] * (attention + mlp + 2 * d)
    return blocks + d + 2 * sizes["vocab_size"] * d


_EMBED_DIM = 768


def _queries_and_heads(vision: dict[str, Any], language: dict[str, Any]) -> int:
    """What InternVL-14B has beside its tower and its Llama."""
    wide, d = vision["hidden_size"], language["hidden_size"]
    cross = -(-language["num_hidden_layers"] // language["cross_attention_frequency"])
    cross *= 2 * d * d + 2 * wide * d + d + wide
    pools = sum(3 * (w * w + 3 * w) + w * _EMBED_DIM + _EMBED_DIM for w in (wide, d))
    heads = d * _EMBED_DIM + 2 * d + 2 + 1
    return language["num_query_token"] * d + cross + pools + heads


def memory_gib(model: Model, dtype: str) -> float:
    """GiB of the weights alone in `dtype`, a key of BYTES."""
    packed = _packable(model) if dtype in ("8bit", "4bit") else num_parameters(model)
    rest = num_parameters(model) - packed
    return (packed * BYTES[dtype] + rest * BYTES["bfloat16"]) / 2**30


def _packable(model: Model) -> int:
    """Weights of the blocks' linear layers; a mixture's experts are none. InternVL-14B: unknown,
    so all of them."""
    if model.family == "dual":
        return num_parameters(model)
    vision, language = VISION_TOWERS[model.vision], LANGUAGE_MODELS[model.language]
    d, f = vision["hidden_size"], vision["intermediate_size"]
    tower = vision["num_hidden_layers"] * (4 * d * d + 2 * d * f)
    d, heads = language["hidden_size"], language["num_attention_heads"]
    each = language.get("head_dim") or d // heads
    block = 2 * d * each * (heads + language["num_key_value_heads"])
    if "num_experts_per_tok" not in language:
        block += 3 * d * language["intermediate_size"]
    return tower + language["num_hidden_layers"] * block


@dataclass(frozen=True)
class Score:
    """A published result."""

    task: str
    """As `internvl evaluate` calls it."""
    metric: str
    value: float
    language: str = "en"
    mode: str = "chat"
    """ "c" or "g" for InternVL-14B; "chat" otherwise."""
    recipe: str = ""
    """What the released model was trained with afterwards; empty: as released."""


_INTERNVL2 = ("1B", "2B", "4B", "8B", "26B", "40B", "Llama3-76B")
_CHAT_1 = ("InternVL-Chat-V1-1", "InternVL-Chat-V1-2-Plus", "InternVL-Chat-V1-5")
_REFCOCO = ("", "-val", "-testA", "-testB", "+-val", "+-testA", "+-testB", "g-val", "g-test")
_CAPTION = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
_RECALL = tuple(f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10))

# Accuracies, ANLS and F1 in percent as their task prints them; MME, OCRBench … in points.
_INTERNVL2_SCORES: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("mme", "perception", (1346.2, 1439.67, 1532.32, 1648.13, 1720.03, 1715.39, 1731.1)),
    ("mme", "cognition", (448.21, 437.14, 531.79, 562.14, 540.71, 599.64, 683.57)),
    ("vqa-okvqa-val", "accuracy", (48.51, 53.16, 60.08, 62.9, 65.95, 66.43, 68.34)),
    ("vqa-textvqa-val", "accuracy", (70.52, 73.36, 74.37, 77.37, 82.28, 83.02, 84.41)),
    ("vqa-vizwiz-val", "accuracy", (53.07, 47.38, 62.21, 62.91, 68.39, 65.22, 67.67)),
    ("vqa-chartqa-test-human", "accuracy", (53.92, 59.52, 69.92, 72.88, 75.28, 77.2, 81.6)),
    ("vqa-chartqa-test-augmented", "accuracy", (91.84, 92.96, 93.04, 93.68, 94.48, 95.2, 95.2)),
    ("vqa-chartqa-test", "accuracy", (72.88, 76.24, 81.48, 83.28, 84.88, 86.2, 88.4)),
    ("vqa-docvqa-val", "anls", (79.99, 85.9, 88.09, 90.81, 92.12, 93.73, 94.17)),
    ("vqa-docvqa-test", "anls", (81.7, 86.9, 89.2, 91.6, 92.9, 93.9, 94.1)),
    ("vqa-ai2d-test", "accuracy", (64.09, 74.09, 78.89, 83.78, 84.46, 87.11, 87.63)),
    ("vqa-infovqa-val", "anls", (50.18, 57.66, 66.25, 72.6, 76.01, 78.51, 80.21)),
    ("vqa-infovqa-test", "anls", (50.9, 58.9, 67.0, 74.8, 75.9, 78.7, 82.0)),
    ("vqa-gqa-testdev", "accuracy", (59.77, 61.03, 62.07, 63.23, 64.89, 64.89, 65.22)),
    ("pope", "f1", (87.3, 88.3, 87.2, 86.9, 88.0, 88.4, 89.0)),
    ("tiny_lvlm", "overall", (3.2538, 3.2946, 3.3673, 3.4177, 3.5793, 3.5841, 3.6292)),
    ("mmmu-val", "accuracy", (35.4, 34.3, 47.0, 49.3, 48.3, 53.9, 55.2)),
    ("mmvet", "score", (37.8, 44.6, 55.7, 60.0, 64.2, 68.5, 69.8)),
    ("mmbench-test-en", "accuracy", (65.4, 73.2, 78.6, 81.7, 83.4, 86.8, 86.5)),
    ("mmbench-test-cn", "accuracy", (60.7, 70.9, 73.9, 81.2, 82.0, 86.5, 86.3)),
    ("ccbench-dev", "accuracy", (75.7, 74.7, 66.5, 75.9, 73.5, 80.6, 81.0)),
    ("seed", "accuracy", (60.76, 66.56, 69.34, 70.72, 72.45, 74.65, 74.46)),
    ("mmvp", "accuracy", (20.0, 35.33, 40.67, 51.33, 54.67, 58.67, 52.67)),
    ("mvbench", "accuracy", (57.9, 60.2, 63.7, 66.4, 67.5, 72.5, 69.6)),
)
_CHAT_1_SCORES: tuple[tuple[str, str, tuple[float | None, ...]], ...] = (
    ("mme", "perception", (1664.51, 1614.04, 1658.37)),
    ("mme", "cognition", (360.71, 558.21, 533.57)),
    ("vqa-okvqa-val", "accuracy", (64.06, 67.64, 62.03)),
    ("vqa-textvqa-val", "accuracy", (64.2, 71.19, 80.61)),
    ("vqa-textvqa-val-ocr", "accuracy", (68.62, 74.1, None)),
    ("vqa-vizwiz-val", "accuracy", (59.0, 61.35, 63.54)),
    ("vqa-chartqa-test", "accuracy", (59.9, 72.8, 83.8)),
    ("vqa-docvqa-val", "anls", (47.6, 56.89, 90.49)),
    ("vqa-docvqa-test", "anls", (48.1, 56.8, 90.9)),
    ("vqa-ai2d-test", "accuracy", (72.4, 78.88, 80.73)),
    ("vqa-infovqa-val", "anls", (33.34, 40.93, 72.35)),
    ("vqa-infovqa-test", "anls", (32.0, 40.6, 72.5)),
    ("vqa-gqa-testdev", "accuracy", (62.46, 66.91, 65.76)),
    ("scienceqa", "accuracy", (90.13, 98.07, 94.05)),
    ("pope", "f1", (87.1, 88.6, 88.3)),
    ("mmmu-val", "accuracy", (38.8, 50.0, 45.2)),
    ("mmvet", "score", (46.7, 47.9, 62.7)),
    ("mmbench-dev-en", "accuracy", (76.7, 83.4, 80.8)),
    ("mmbench-test-en", "accuracy", (75.4, 83.8, 82.2)),
    ("mmbench-dev-cn", "accuracy", (71.9, 81.6, 80.3)),
    ("mmbench-test-cn", "accuracy", (70.3, 82.0, 82.0)),
    ("ccbench-dev", "accuracy", (43.3, 55.9, 70.0)),
    ("seed", "accuracy", (67.4, 70.43, 69.99)),
    ("mmvp", "accuracy", (44.67, 58.67, 59.33)),
    ("llava-bench", "score", (72.8, 85.0, 93.8)),
    ("mathvista-testmini", "accuracy", (None, 59.7, 53.5)),
    ("mvbench", "accuracy", (48.95, 50.975, 52.125)),
)
_CHAT_1_2_SCORES: tuple[tuple[str, str, float], ...] = (
    ("mmmu-val", "accuracy", 51.6),
    ("mmmu-test", "accuracy", 46.2),
    ("mathvista-testmini", "accuracy", 47.7),
    ("mmbench-test-en", "accuracy", 82.2),
    ("mmbench-test-cn", "accuracy", 81.2),
    ("mmvp", "accuracy", 56.7),
    ("mme", "perception", 1687),
    ("mme", "cognition", 489),
    ("scienceqa", "accuracy", 83.3),
    ("pope", "f1", 88.0),
    ("vqa-textvqa-val", "accuracy", 72.5),
    ("seed", "image", 75.6),
)
_REFCOCO_SCORES: dict[str, tuple[float | None, ...]] = {
    "Mini-InternVL-Chat-2B-V1-5": (75.8, 80.7, 86.7, 72.9, 72.5, 82.3, 60.8, 75.6, 74.9),
    "Mini-InternVL-Chat-4B-V1-5": (84.4, 88.0, 91.4, 83.5, 81.5, 87.4, 73.8, 84.7, 84.6),
    "InternVL-Chat-V1-1": (None, 84.7, 89.9, 78.6, 78.5, 85.6, 70.1, 81.0, 81.4),
    "InternVL-Chat-V1-2-Plus": (None, 90.2, 93.4, 85.5, 85.3, 90.4, 79.7, 88.5, 88.8),
    "InternVL-Chat-V1-5": (88.8, 91.4, 93.7, 87.1, 87.0, 92.3, 80.9, 88.5, 89.3),
    "InternVL2-1B": (79.9, 83.6, 88.7, 79.8, 76.0, 83.6, 67.7, 80.2, 79.9),
    "InternVL2-2B": (77.7, 82.3, 88.2, 75.9, 73.5, 82.8, 63.3, 77.6, 78.3),
    "InternVL2-4B": (84.4, 88.5, 91.2, 83.9, 81.2, 87.2, 73.8, 84.6, 84.6),
    "InternVL2-8B": (82.9, 87.1, 91.1, 80.7, 79.8, 87.9, 71.4, 82.7, 82.7),
    "InternVL2-26B": (88.5, 91.2, 93.3, 87.4, 86.8, 91.0, 81.2, 88.5, 88.6),
    "InternVL2-40B": (90.3, 93.0, 94.7, 89.2, 88.5, 92.8, 83.6, 90.3, 90.6),
    "InternVL2-Llama3-76B": (90.0, 92.2, 94.8, 88.4, 88.8, 93.1, 82.8, 89.5, 90.3),
}
_RETRIEVAL_SCORES: tuple[tuple[str, str, str, str, tuple[float, ...]], ...] = (
    # model suffix, task, language, mode, i2t and t2i recall@1, 5, 10
    ("224px", "flickr30k", "en", "c", (94.7, 99.6, 99.9, 81.7, 96.0, 98.2)),
    ("224px", "flickr30k", "en", "g", (95.7, 99.7, 99.9, 85.0, 97.0, 98.6)),
    ("224px", "coco", "en", "c", (70.6, 89.0, 93.5, 54.1, 77.3, 84.6)),
    ("224px", "coco", "en", "g", (74.9, 91.3, 95.2, 58.6, 81.3, 88.0)),
    ("224px", "flickr30k", "zh", "c", (90.3, 98.8, 99.7, 75.1, 92.9, 96.4)),
    ("224px", "flickr30k", "zh", "g", (92.9, 99.4, 99.8, 77.7, 94.8, 97.3)),
    ("224px", "coco", "zh", "c", (68.8, 92.0, 96.7, 68.9, 91.9, 96.5)),
    ("224px", "coco", "zh", "g", (71.4, 93.9, 97.7, 73.8, 94.4, 98.1)),
    ("Flickr30K-FT-364px", "flickr30k", "en", "c", (97.2, 100.0, 100.0, 88.5, 98.4, 99.2)),
    ("Flickr30K-FT-364px", "flickr30k", "en", "g", (97.9, 100.0, 100.0, 89.6, 98.6, 99.2)),
    ("FlickrCN-FT-364px", "flickr30k", "zh", "c", (96.5, 99.9, 100.0, 85.2, 97.0, 98.5)),
    ("FlickrCN-FT-364px", "flickr30k", "zh", "g", (96.9, 99.9, 100.0, 85.9, 97.1, 98.7)),
)
_XTD_SCORES: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    # language, mode, i2t and t2i recall@1, 5, 10
    ("en", "c", (74.8, 92.2, 97.3, 76.7, 92.0, 96.7)),
    ("es", "c", (70.1, 89.6, 95.7, 70.6, 90.2, 94.3)),
    ("fr", "c", (69.0, 88.9, 95.1, 69.7, 88.3, 93.5)),
    ("zh", "c", (67.1, 87.7, 95.6, 64.8, 87.6, 94.2)),
    ("it", "c", (70.4, 90.0, 96.0, 67.9, 89.9, 94.4)),
    ("ko", "c", (59.2, 83.6, 92.2, 58.3, 84.0, 90.8)),
    ("ru", "c", (64.4, 86.4, 93.3, 64.3, 85.1, 91.7)),
    ("jp", "c", (67.6, 89.9, 95.5, 63.3, 87.5, 93.6)),
    ("en", "g", (79.8, 94.8, 98.6, 81.2, 94.7, 98.3)),
    ("es", "g", (74.5, 92.5, 97.7, 75.5, 93.5, 96.6)),
    ("fr", "g", (72.8, 91.9, 96.5, 74.5, 91.8, 96.2)),
    ("zh", "g", (69.5, 91.1, 96.7, 69.8, 91.2, 96.2)),
    ("it", "g", (74.5, 93.1, 96.9, 73.3, 93.1, 96.4)),
    ("ko", "g", (64.7, 87.7, 95.1, 64.3, 87.9, 94.2)),
    ("ru", "g", (69.0, 89.2, 94.8, 68.5, 87.4, 93.9)),
    ("jp", "g", (70.3, 91.0, 96.1, 68.5, 90.2, 95.4)),
)
_14B_CAPTIONS = {
    # average length in words, then as _CAPTION in percent
    "caption-coco": (10.597, 78.8, 63.5, 49.1, 37.1, 30.1, 59.0, 128.2),
    "caption-flickr30k": (10.666, 71.8, 53.5, 38.3, 27.0, 25.3, 53.1, 79.2),
    "caption-nocaps": (10.463, 85.2, 71.7, 57.3, 44.3, 30.1, 60.7, 113.7),
}
_COCO_TUTORIAL = {
    "": (0.640, 0.463, 0.320, 0.214, 0.267, 0.504, 0.793),
    "coco-lora-r128": (0.805, 0.649, 0.504, 0.385, 0.300, 0.595, 1.312),
}


def scores(name: str) -> tuple[Score, ...]:
    """Everything published for a model (captions of chat models as fractions, the rest in percent
    or points, as their sources print them)."""
    return tuple(_scores(find(name).name))


def _scores(name: str) -> Iterator[Score]:
    size = name.removeprefix("InternVL2-")
    if size in _INTERNVL2:
        column = _INTERNVL2.index(size)
        yield from (Score(task, metric, row[column]) for task, metric, row in _INTERNVL2_SCORES)
    if name in _CHAT_1:
        column = _CHAT_1.index(name)
        for task, metric, row in _CHAT_1_SCORES:
            value = row[column]
            if value is not None:
                yield Score(task, metric, value)
    if name == "InternVL-Chat-V1-2":
        yield from (Score(*row) for row in _CHAT_1_2_SCORES)
    for part, value in zip(_REFCOCO, _REFCOCO_SCORES.get(name, ()), strict=False):
        if value is not None:
            yield Score(f"refcoco{part}", "precision", value)
    if name == "InternVL2-2B":
        for recipe, values in _COCO_TUTORIAL.items():
            for metric, value in zip(_CAPTION, values, strict=True):
                yield Score("caption-coco", metric, value, recipe=recipe)
    if name.startswith("InternVL-14B-"):
        yield from _dual_scores(name.removeprefix("InternVL-14B-"))


def _dual_scores(suffix: str) -> Iterator[Score]:
    for model, data, language, mode, values in _RETRIEVAL_SCORES:
        if model == suffix:
            for metric, value in zip(_RECALL, values, strict=True):
                yield Score(f"retrieval-{data}", metric, value, language, mode)
    if suffix == "224px":
        for language, mode, values in _XTD_SCORES:
            for metric, value in zip(_RECALL, values, strict=True):
                yield Score("retrieval-xtd", metric, value, language, mode)
        for task, values in _14B_CAPTIONS.items():
            for metric, value in zip(("average_length", *_CAPTION), values, strict=True):
                yield Score(task, metric, value, mode="g")


def render_table() -> str:
    """All models, one line each: size, memory, parts, template, tiling."""
    head = ("model", "params", "GiB bf16", "vision tower", "language model", "template", "tiles")
    rows = [head]
    for model in MODELS.values():
        count = num_parameters(model) / 10**9
        tiles = f"1-{model.max_tiles}" if model.max_tiles > 1 else "1"
        memory = f"{memory_gib(model, 'bfloat16'):.1f}"
        parts = (model.vision, model.language, model.template or "-", tiles)
        rows.append((model.name, f"{count:.1f}B", memory, *parts))
    return _aligned(rows)


def describe(name: str) -> str:
    """One model in full: parts, sizes, memory per dtype, download, published scores.

    Raises:
        UnknownModel: no such model.
    """
    model = find(name)
    vision = VISION_TOWERS[model.vision]
    lines = [
        f"{model.name}  (hub id {model.repository})",
        f"  vision tower    {model.vision}, {vision['num_hidden_layers']} blocks, "
        f"{vision['image_size']} px, output of block {model.select_layer}",
        f"  language model  {model.language}",
    ]
    if model.family == "chat":
        tiling = (
            f"1 to {model.max_tiles} tiles and a thumbnail" if model.max_tiles > 1 else "1 tile"
        )
        lines.append(f"  template        {model.template}")
        lines.append(f"  images          {tiling}, pixel shuffle {model.ps_version}")
    counted = f"{num_parameters(model):,}"
    published = f" (published {model.published})" if model.published else ""
    lines.append(f"  parameters      {counted}{published}")
    memory = ", ".join(f"{dtype} {memory_gib(model, dtype):.1f}" for dtype in BYTES)
    lines.append(f"  weights, GiB    {memory}")
    if model.download_gb is not None:
        lines.append(f"  download        {model.download_gb:g} GB")
    if model.note:
        lines.append(f"  note            {model.note}")
    found = scores(model.name)
    if found:
        rows = [("task", "language", "mode", "metric", "published", "after")]
        rows += [
            (s.task, s.language, s.mode, s.metric, f"{s.value:g}", s.recipe or "-") for s in found
        ]
        lines += ["", _aligned(rows)]
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = (zip(row, widths, strict=True) for row in rows)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in row).rstrip() for row in padded)
