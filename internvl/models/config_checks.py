"""Checks type and range of every key of `config.json` that matters, before a model is built.

A problem is one sentence with file and key.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from internvl.errors import ModelFolderError


class ValueRule(NamedTuple):
    """The allowed values of a key."""

    expected: str
    """For messages, such as "a whole number from 1 to 1000"."""
    allows: Callable[[Any], bool]


def _whole(low: int, high: int) -> ValueRule:
    return ValueRule(
        f"a whole number from {low} to {high}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
    )


def _number(low: float, high: float, *, above: bool = False) -> ValueRule:
    """Allows a finite number; `above` excludes the lower bound."""

    def allows(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        # NaN compares false, infinity is above every bound.
        return (low < value if above else low <= value) and value <= high

    return ValueRule(f"a number {'above' if above else 'from'} {low:g} to {high:g}", allows)


def _one_of(*values: str) -> ValueRule:
    return ValueRule(" or ".join(map(repr, values)), lambda v: isinstance(v, str) and v in values)


def _or_null(rule: ValueRule) -> ValueRule:
    return ValueRule(f"{rule.expected} or null", lambda v: v is None or rule.allows(v))


def _or_pair(rule: ValueRule) -> ValueRule:
    """Allows one side of a square, or a pair of equal sides, as in the hf layout."""

    def allows(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return len(value) == 2 and value[0] == value[1] and rule.allows(value[0])
        return rule.allows(value)

    return ValueRule(rule.expected, allows)


_FLAG = ValueRule("true or false", lambda v: isinstance(v, bool))
# Releases also write 0 and 1.
_SWITCH = ValueRule("true or false", lambda v: isinstance(v, int) and v in (0, 1))
_TEXT = ValueRule("a text", lambda v: isinstance(v, str))
_OBJECT = ValueRule("an object", lambda v: isinstance(v, dict))
# Far above any release: they keep a zero too many from filling the memory.
_SIZE, _LAYERS, _SIDE = _whole(1, 10**6), _whole(1, 1000), _whole(1, 8192)
_VOCABULARY = _whole(1, 10**8)
_SHARE = _number(0, 1)
_EPS = _number(0, 1, above=True)  # 0 would divide by zero for a constant input
_SCALE = _number(-1e6, 1e6)
_ACTIVATION = ValueRule(
    "an activation that transformers knows", lambda v: isinstance(v, str) and v in ACT2FN
)

_VISION: dict[str, ValueRule] = {
    "hidden_size": _SIZE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _SIZE,
    "intermediate_size": _SIZE,
    "num_channels": _whole(1, 16),
    "patch_size": _or_pair(_SIDE),
    "image_size": _or_pair(_SIDE),
    **dict.fromkeys(("qkv_bias", "attention_bias", "qk_normalization", "use_qk_norm"), _SWITCH),
    "norm_type": _one_of("rms_norm", "layer_norm"),
    "layer_norm_eps": _EPS,
    "hidden_act": _ACTIVATION,
    **dict.fromkeys(("dropout", "projection_dropout", "attention_dropout"), _SHARE),
    "hidden_dropout_prob": _SHARE,
    "initializer_range": _number(0, 1e6),
    **dict.fromkeys(("initializer_factor", "layer_scale_init_value"), _SCALE),
}
"""Keys of both layouts, official and hf."""

_LANGUAGE: dict[str, ValueRule] = {
    "vocab_size": _VOCABULARY,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), _SIZE),
    "num_hidden_layers": _LAYERS,
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_window_layers"), _or_null(_SIZE)),
    "max_position_embeddings": _whole(1, 10**8),
    "original_max_position_embeddings": _whole(1, 10**8),
    **dict.fromkeys(("num_experts", "num_local_experts", "moe_intermediate_size"), _SIZE),
    **dict.fromkeys(("num_experts_per_tok", "decoder_sparse_step"), _SIZE),
    "sliding_window": _or_null(_whole(1, 10**8)),
    "rms_norm_eps": _EPS,
    "rope_theta": _or_null(_number(0, 1e12, above=True)),
    "hidden_act": _ACTIVATION,
    "initializer_range": _number(0, 1e6),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), _SHARE),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _or_null(_OBJECT)),
    **dict.fromkeys(("bias", "qkv_bias", "attention_bias", "mlp_bias"), _or_null(_SWITCH)),
    "tie_word_embeddings": _or_null(_SWITCH),
    "partial_rotary_factor": _number(0, 1, above=True),
    "model_type": _TEXT,
}

_FACTOR = _number(0, 1e9, above=True)  # frequencies are divided by it
# "su" is the original's name of "longrope".
_ROPE_TYPE = _or_null(_one_of("default", "su", *sorted(ROPE_INIT_FUNCTIONS)))
_ROPE: dict[str, ValueRule] = {
    **dict.fromkeys(("type", "rope_type"), _ROPE_TYPE),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast"), _FACTOR),
    **dict.fromkeys(("beta_slow", "rope_theta"), _FACTOR),
    "attention_factor": _or_null(_FACTOR),
    "original_max_position_embeddings": _or_null(_whole(1, 10**8)),
    "partial_rotary_factor": _number(0, 1, above=True),
}

_QLLAMA: dict[str, ValueRule] = {
    **_LANGUAGE,
    "num_query_token": _or_null(_whole(1, 10_000)),
    "cross_attention_frequency": _or_null(_LAYERS),
}

_CHAT: dict[str, ValueRule] = {
    **dict.fromkeys(("template", "system_message"), _or_null(_TEXT)),
    "ps_version": _one_of("v1", "v2"),
    **dict.fromkeys(("pad2square", "dynamic_image_size", "use_thumbnail"), _SWITCH),
    "force_image_size": _or_null(_SIDE),
    **dict.fromkeys(("min_dynamic_patch", "max_dynamic_patch"), _whole(1, 10_000)),
    "downsample_ratio": _number(0, 1, above=True),
    **dict.fromkeys(("select_layer", "vision_feature_layer"), _whole(-1000, 1000)),
    **dict.fromkeys(("use_backbone_lora", "use_llm_lora"), _or_null(_whole(0, 10**6))),
    "image_token_id": _or_null(_whole(0, 10**8)),
    "tie_word_embeddings": _or_null(_SWITCH),
    "normalize": _one_of("imagenet", "clip", "siglip"),
}
_TRIPLE = ValueRule(
    "a number or a list of 3",
    lambda v: (
        len(v) == 3 and all(map(_SCALE.allows, v)) if isinstance(v, list) else _SCALE.allows(v)
    ),
)
# The pixels here are always rescaled and normalized: false would be ignored in silence.
_ON = ValueRule("true", lambda v: v is True)
_PROCESSOR: dict[str, ValueRule] = {
    **dict.fromkeys(("min_patches", "max_patches"), _whole(1, 10_000)),
    "size": ValueRule(
        "a height and an equal width",
        lambda v: (
            _SIDE.allows(v)
            if not isinstance(v, dict)
            else _SIDE.allows(v.get("height")) and v["height"] == v.get("width")
        ),
    ),
    **dict.fromkeys(("image_mean", "image_std"), _TRIPLE),
    **dict.fromkeys(("do_rescale", "do_normalize"), _ON),
    "rescale_factor": ValueRule("1/255", lambda v: _SHARE.allows(v) and abs(v * 255 - 1) < 1e-3),
    # Tiles are resized by bicubic only; another filter would give other pixels than the release.
    "resample": ValueRule("3 (bicubic)", lambda v: v == 3),
}
"""transformers' names; other keys have no effect on an image."""
_DUAL: dict[str, ValueRule] = {
    **dict.fromkeys(("clip_embed_dim", "attn_pool_num_heads"), _SIZE),
    "label_smoothing": _SHARE,
    "initializer_range": _number(0, 1e6),
    "force_image_size": _or_null(_SIDE),
    "num_query_token": _or_null(_whole(1, 10_000)),
    "cross_attention_frequency": _or_null(_LAYERS),
    **dict.fromkeys(("use_backbone_lora", "use_qllama_lora"), _or_null(_whole(0, 10**6))),
}


def check_chat(file: Path, config: dict[str, Any]) -> None:
    """Raises ModelFolderError if a chat model's `config.json`, of either layout, is wrong."""
    language = "text_config" if config.get("text_config") is not None else "llm_config"
    _check(file, "", config, _CHAT)
    if config.get("internvl") is not None:
        _check(file, "internvl", _section(file, config, "internvl"), _CHAT)
    _check_vision(file, _section(file, config, "vision_config"))
    check_language(file, _section(file, config, language), language)


def check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Raises ModelFolderError if official keys of images and conversations are wrong."""
    _check(file, "", settings, _CHAT)


def check_section(file: Path, name: str, value: Any) -> None:
    """Raises ModelFolderError if a section of a JSON file is not an object."""
    _check(file, "", {name: value}, {name: _OBJECT})


def check_processor(file: Path, section: str, values: dict[str, Any]) -> None:
    """Raises ModelFolderError if an -hf folder's image processor is not a valid InternVL one."""
    _check(file, section, values, _PROCESSOR)


def check_counts(file: Path, section: str, fewest: tuple[str, int], most: tuple[str, int]) -> None:
    """Raises ModelFolderError if the minimum of tiles per image is above the maximum.

    Args:
        fewest, most: (key, value), also for a key that has its default.
    """
    if fewest[1] > most[1]:
        reason = f"and {most[0]} is {most[1]}: a whole number from 1 to {most[1]} is expected"
        raise _wrong(file, section, *fewest, reason)


def check_block(file: Path, key: str, block: int, layers: int) -> None:
    """Raises ModelFolderError if the vision tower has no such output.

    Args:
        block: index of the hidden state that is read, from the end if negative; 0 is the input of
            the first block.
        layers: number of the tower's blocks.
    """
    # There are layers + 1 hidden states, the input included.
    if not -layers - 1 <= block <= layers:
        reason = f"and the vision tower has {layers} layers: a whole number from {-layers} to -1"
        raise _wrong(file, "", key, block, f"{reason} is expected")


def check_dual(file: Path, config: dict[str, Any]) -> None:
    """Raises ModelFolderError if InternVL-14B's `config.json` is wrong."""
    _check(file, "", config, _DUAL)
    _check_vision(file, _section(file, config, "vision_config"))
    language = _section(file, config, "qllama_config")
    _check(file, "qllama_config", language, _QLLAMA)
    _check_heads(file, "qllama_config", language)


def check_tower(file: Path, config: dict[str, Any]) -> None:
    """Raises ModelFolderError if a standalone InternViT's `config.json` is wrong."""
    if config.get("vision_config") is None:
        _check_vision(file, config, "")
    else:
        _check_vision(file, _section(file, config, "vision_config"))


def check_language(file: Path, config: dict[str, Any], section: str = "") -> None:
    """Raises ModelFolderError if a language model's `config.json` or section is wrong."""
    _check(file, section, config, _LANGUAGE)
    _check_architectures(file, section, config)
    _check_heads(file, section, config)
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(file, f"{section}.{key}".lstrip("."), config.get(key) or {}, config)


def _check_vision(file: Path, vision: dict[str, Any], section: str = "vision_config") -> None:
    _check(file, section, vision, _VISION)
    _check_heads(file, section, vision)


@contextmanager
def building(file: Path) -> Iterator[None]:
    """Turns exceptions of `transformers` about other values into one sentence.

    Raises:
        ModelFolderError: with the name of the file, for any exception.
    """
    try:
        yield
    except ModelFolderError as error:
        if str(file.parent) in str(error):
            raise
        raise ModelFolderError(f"{file.parent}/{error}") from error
    # The values reach any code of transformers that uses them, and each raises its own exception.
    except Exception as error:
        # huggingface_hub's validation wraps the error that names field and value.
        cause = error.__cause__ or error
        reason = " ".join(line.strip() for line in str(cause).splitlines()[:2]).split(". Errors:")[
            0
        ]
        reason = re.sub(r"<class '(\w+)'>", r"\1", reason)[:300]
        raise ModelFolderError(
            f"{file}: its values do not make a model ({type(cause).__name__}: {reason}); take the "
            "config.json of the release"
        ) from error


def _section(file: Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in config:
        raise ModelFolderError(f"{file}: {name} is missing; take the config.json of the release")
    _check(file, "", config, {name: _OBJECT})
    return config[name]


def _check(
    file: Path, section: str, values: Mapping[str, Any], rules: dict[str, ValueRule]
) -> None:
    for key, rule in rules.items():
        if key in values and not rule.allows(values[key]):
            raise _wrong(file, section, key, values[key], f"{rule.expected} is expected")


def _wrong(file: Path, section: str, key: str, value: Any, reason: str) -> ModelFolderError:
    shown = repr(value)  # cut below: it may be a list of thousands of factors
    shown = shown if len(shown) <= 60 else shown[:60] + "…"
    name = f"{section}.{key}" if section else key
    return ModelFolderError(
        f"{file}: {name} is {shown}, {reason}; set it as the release's {file.name} does"
    )


def _check_architectures(file: Path, section: str, values: dict[str, Any]) -> None:
    # Read by index and looked up in tables later: anything but a list of text fails there.
    names = values.get("architectures")
    if names is not None and not (isinstance(names, list) and all(map(_TEXT.allows, names))):
        raise _wrong(file, section, "architectures", names, "a list of names is expected")


def _check_rope(
    file: Path, section: str, scaling: dict[str, Any], language: dict[str, Any]
) -> None:
    """Checks RoPE scaling: a valid type, and one factor for each rotated pair of channels."""
    _check(file, section, scaling, _ROPE)
    width, heads = language.get("hidden_size"), language.get("num_attention_heads")
    if not (width and heads):
        return
    # A wrong number of factors would only fail deep in a forward pass.
    share = language.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1))
    pairs = int((language.get("head_dim") or width // heads) * share) // 2
    for key in ("short_factor", "long_factor"):
        factors = scaling.get(key, [1.0] * pairs)
        if (
            not isinstance(factors, list)
            or len(factors) != pairs
            or not all(map(_FACTOR.allows, factors))
        ):
            raise _wrong(file, section, key, factors, f"a list of {pairs} factors is expected")


def _check_heads(file: Path, section: str, values: dict[str, Any]) -> None:
    """Checks that heads divide the width, and key heads the heads."""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if width and heads and values.get("head_dim") is None and width % heads:
        raise _wrong(file, section, "num_attention_heads", heads, f"a divisor of {width} is needed")
    key_heads = values.get("num_key_value_heads")
    if heads and key_heads and heads % key_heads:
        raise _wrong(
            file, section, "num_key_value_heads", key_heads, f"a divisor of {heads} is needed"
        )


_QUANTIZATION = "quantization_config"
_PACKED = (
    *(".qweight", ".qzeros", ".g_idx", ".scales", ".SCB", ".absmax", ".quant_map"),
    *(".weight_scale", ".weight_scale_inv", ".weight_packed", ".weight_format", ".quant_state"),
    *("_proj_blocks", "_proj_scales"),
)
"""Suffixes of the names of quantized weights; bitsandbytes' follow `.weight`."""


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Returns an hf `config.json` without the keys that make `transformers` quantize."""
    # `check_quantization` judges these keys, together with the weights.
    text = {k: v for k, v in config["text_config"].items() if k != _QUANTIZATION}
    return {k: v for k, v in config.items() if k != _QUANTIZATION} | {"text_config": text}


def check_quantization(file: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Checks that weights are not quantized and that config.json agrees.

    Args:
        names: names of the folder's tensors.

    Raises:
        ModelFolderError: quantized weights, or others with a `quantization_config`.
    """
    packed = next((n for n in names if n.endswith(_PACKED) or ".quant_state." in n), None)
    # Nothing reads this key in the original's `llm_config`: there the weights alone decide.
    text = config.get("text_config") or {}
    active = config.get(_QUANTIZATION) or text.get(_QUANTIZATION)
    if packed:
        settings = active or (config.get("llm_config") or {}).get(_QUANTIZATION)
        raise ModelFolderError(
            f"{file.parent}: its weights are quantized{_method(settings)} ({packed}), which are "
            "not read here; take the unquantized release, and load it with quantize='4bit' to save "
            f"memory{_served_elsewhere(settings, file.parent)}"
        )
    if active:  # transformers would quantize them, or refuse
        raise ModelFolderError(
            f"{file}: quantization_config{_method(active)} is left over, for the weights beside "
            "it are not quantized; remove this key to use them as they are, and load them with "
            "quantize='4bit' to save memory"
        )


def _served_elsewhere(settings: Any, folder: Path) -> str:
    """Returns the command that serves AWQ weights, which the releases have for LMDeploy."""
    if _method(settings) != " (awq)":
        return ""
    return f"; `lmdeploy serve api_server {folder} --model-format awq` serves these as they are"


def _method(settings: Any) -> str:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return f" ({method})" if isinstance(method, str) else ""
