"""FLOPs that the result of a step needs, counted from the model itself; 2 a multiply-add.

Real tokens and pairs only, nothing twice (neither what checkpointing recomputes nor the second pass
of gradient caching), the output matrix only at supervised tokens. A matrix W of a part that reads T
tokens costs

    2 |W| T  forward  +  2 |W| T  if W trains  +  2 |W| T  if anything below W trains

(of a mixture's experts, the share that is used), and attention 4 · width · pairs, three times that
if a gradient passes through it. So LoRA on a frozen language model needs its linear layers twice,
the adapters three times, and of the first block's q, k and v no gradient of the input; a frozen
tower is run forward only. Norms, rotations, activations and the products of all features with each
other are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from internvl.inference import families
from internvl.models import configs, kernels
from internvl.plan.work import Summable, Work

FIRST = ("q_proj", "k_proj", "v_proj", "qkv_proj")
"""Layers that read the input of their block, through its first norm."""
_FIRST_NORMS = ("input_layernorm", "layernorm_before")
# InternViT's blocks call it attention, language models self_attn.
_MIXERS = ("attention", "self_attn")


@dataclass(frozen=True)
class Part(Summable):
    """FLOPs of a component."""

    forward: float = 0.0
    needed: float = 0.0
    """Forward and backward."""
    float8: float = 0.0
    """Those of `needed` that are float8 products."""
    short: float = 0.0
    """Sum of each product's FLOPs over the length of the sums in it: large if those are short."""
    adapted: float = 0.0
    """Values that enter adapters, forward."""
    launches: float = 0.0
    """Products of a pass, whatever their size."""
    frozen_launches: float = 0.0
    """Those of `launches` whose weight does not train."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step by component."""

    tower: Part = field(default_factory=Part)
    """Matrix products of the vision tower and of a chat model's projector."""
    tower_attention: Part = field(default_factory=Part)
    decoder: Part = field(default_factory=Part)
    """Matrix products of the language model's blocks."""
    decoder_attention: Part = field(default_factory=Part)
    logits: Part = field(default_factory=Part)
    """The output matrix; of InternVL-14B the pools and projections as well."""

    @property
    def needed(self) -> float:
        return sum(getattr(self, component.name).needed for component in fields(self))


@dataclass(frozen=True)
class _Cross:
    """Work of QLLaMA's cross-attentions, each layer's the same."""

    queries: float
    visual: float
    """Visual tokens, whose keys and values are made once for all that read them."""
    attention: float
    """FLOPs forward."""
    below: bool
    """Whether the visual tokens take a gradient."""


def count(model: Any, work: Work) -> Flops:
    """FLOPs of one pass over `work`, forward and backward.

    Every block is counted with all tokens, so that figures compare with those of others, though
    training runs the last MLP on supervised positions alone (`last_mlp_flops`).

    Args:
        model: a ChatModel or DualModel with what trains chosen and adapters attached; the meta
            device does.
    """
    vision, tower = model.config.vision_config, model.model.vision_tower
    patches = patches_of(model)
    # Pixels take no gradient.
    products = _matrices(tower.embeddings.patch_embeddings, patches * work.tiles, below=False)
    pairs = (patches + 1) ** 2 * work.tiles
    blocks, attention, below = _blocks(
        tower.encoder.layer,
        (patches + 1) * work.tiles,
        4 * vision.hidden_size * pairs,
        trains(tower.embeddings),
    )
    # A chat model reads the tower through a projector, InternVL-14B by cross-attention and pools.
    above = {"chat": _chat, "dual": _dual}[families.name_of(model.config)]
    return above(model, work, Flops(products + blocks, attention), below)


def _chat(model: Any, work: Work, tower: Flops, below: bool) -> Flops:
    """Adds projector, language model and output matrix."""
    projector, decoder = model.model.multi_modal_projector, model.model.language_model
    visual = work.tiles * patches_of(model) * model.config.downsample_ratio**2
    products = tower.tower  # the projector counts as the tower's
    for name in ("linear_1", "linear_2"):
        products += _matrices(
            projector.get_submodule(name), visual, below or trains(projector.layer_norm)
        )
    below = below or trains(projector) or trains(decoder.embed_tokens)
    # 2 for queries with keys, 2 for weights with values.
    mixing = 4 * query_width(model.config.text_config) * work.rows.attended_pairs
    blocks, attention, below = _blocks(decoder.layers, work.rows.tokens, mixing, below)
    logits = _matrices(model.lm_head, work.supervised, below or trains(decoder.norm))
    return Flops(products, tower.tower_attention, blocks, attention, logits)


def _dual(model: Any, work: Work, tower: Flops, below: bool) -> Flops:
    """Adds QLLaMA, the pools and the heads."""
    language, num_queries = model.model.language_model, model.num_queries
    queries = model.model.query_tokens
    forms = (work.texts, work.matches, work.written)
    tokens, pairs = (sum(getattr(s, name) for s in forms) for name in ("tokens", "attended_pairs"))
    readers = work.queried + work.matches.count + work.written.count  # each with its queries
    seen = work.tiles * (patches_of(model) + 1)
    width, vision_width = (
        model.config.text_config.hidden_size,
        model.config.vision_config.hidden_size,
    )
    # Matched captions and queries attend to each other, written ones to the queries alone.
    pairs += readers * num_queries**2
    pairs += (2 * work.matches.tokens + work.written.tokens) * num_queries
    cross = _Cross(
        queries=readers * num_queries,
        visual=seen if readers else 0,
        attention=4.0 * width * readers * num_queries * (patches_of(model) + 1),
        below=below,
    )
    blocks, attention, _ = _blocks(
        language.layers,
        tokens + readers * num_queries,
        4.0 * width * pairs,
        trains(language.embed_tokens) or trains(queries),
        cross,
    )
    passed = trains(model.model)
    image, image_attention = _pool(model.image_pool, work.tiles, seen, vision_width, below)
    query, query_attention = _pool(
        model.query_pool, work.queried, work.queried * num_queries, width, passed
    )
    logits = image + query
    logits += _matrices(model.text_projection, work.texts.count, trains(language))
    logits += _matrices(model.itm_head, work.matches.count * num_queries, passed)
    logits += _matrices(model.lm_head, work.supervised, passed)
    return Flops(
        tower.tower,
        tower.tower_attention + image_attention,
        blocks,
        attention + query_attention,
        logits,
    )


def _pool(
    pool: nn.Module, pooled: float, tokens: float, width: int, below: bool
) -> tuple[Part, Part]:
    """(matrix products, attention) of an attention pool: one query for each of `pooled`."""
    below = below or any(
        parameter.requires_grad and name.startswith("norm_")
        for name, parameter in pool.named_parameters()
    )
    products = Part()
    for name, matrix, _ in _weights(pool):
        reads_pooled = "q_proj" in name or "o_proj" in name
        passed = below or ("o_proj" in name and trains(pool))
        products += _product(matrix, pooled if reads_pooled else tokens, passed)
    mixing = 4.0 * width * tokens
    return products, Part(mixing, mixing * (3 if below or trains(pool) else 1))


def last_mlp_flops(model: Any, positions: float) -> Part:
    """FLOPs of the last MLP at `positions` supervised tokens; zero if it runs on every token
    (models/kernels/last_mlp.py)."""
    decoder = model.model.language_model
    block = decoder.layers[-1]
    if not kernels.supports_last_mlp(block):
        return Part()
    below = (model.model.vision_tower, model.model.multi_modal_projector, decoder.embed_tokens)
    return _matrices(block.mlp, positions, any(trains(m) for m in (*below, decoder.layers)))


def patches_of(model: Any) -> int:
    """Patches of a tile, the class token left out."""
    vision = model.config.vision_config
    return (vision.image_size[0] // vision.patch_size[0]) ** 2


def query_width(text: Any) -> int:
    """Width of all queries of a language model together."""
    return configs.head_width(text) * text.num_attention_heads


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module takes a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _blocks(
    blocks: nn.ModuleList,
    tokens: float,
    attention: float,
    below: bool,
    cross: _Cross | None = None,
) -> tuple[Part, Part, bool]:
    """(matrix products, attention, whether anything trains up to the end) of a stack.

    Args:
        attention: forward FLOPs of a block's self-attention.
        below: whether anything trains before the first block.
    """
    products, mixing = Part(), Part()
    for block in blocks:
        # The MLP also follows the cross-attention, whose visual tokens may come from what trains.
        below_mlp = below or (cross is not None and cross.below)
        products += _products(block, tokens, below, below_mlp)
        first = below or _trains_in(block, _FIRST_NORMS)
        mixer = next(child for name, child in block.named_children() if name in _MIXERS)
        mixing += Part(attention, attention * (3 if first or trains(mixer) else 1))
        if cross is not None and block.cross_attn is not None:
            crossing = _crossing(block, cross, below)
            products, mixing = products + crossing[0], mixing + crossing[1]
        below = below_mlp or trains(block)
    return products, mixing, below


def _products(block: nn.Module, tokens: float, below: bool, below_mlp: bool) -> Part:
    """Matrix products of a block without its cross-attention."""
    first = below or _trains_in(block, _FIRST_NORMS)
    # Everything after the first projections lies above some of this block's own weights.
    later = below or trains(block)
    total = Part()
    for name, matrix, share in _weights(block):
        if name.startswith("cross_attn."):  # reads other tokens: `_crossing`
            continue
        # lora_A reads the block's input, lora_B what lora_A makes of it, which trains.
        reads_input = any(layer in name for layer in FIRST) and "lora_B" not in name
        passed = first if reads_input else later or (below_mlp and "mlp" in name)
        total += _product(matrix, share * tokens, passed) + _adapted(name, matrix, share * tokens)
    return total


def _crossing(block: Any, cross: _Cross, below: bool) -> tuple[Part, Part]:
    """(matrix products, attention) of a block's cross-attention."""
    # What lies between the block's input and its queries.
    before = ("self_attn", "input_layernorm", "cross_attn.norm")
    passed = below or cross.below or _trains_in(block, before)
    products = Part()
    for name, matrix, _ in _weights(block.cross_attn):
        reads_images = "k_proj" in name or "v_proj" in name
        tokens = cross.visual if reads_images else cross.queries
        products += _product(matrix, tokens, passed) + _adapted(name, matrix, tokens)
    factor = 3 if passed or trains(block.cross_attn) else 1
    return products, Part(cross.attention, cross.attention * factor)


def _trains_in(block: nn.Module, prefixes: tuple[str, ...]) -> bool:
    return any(
        parameter.requires_grad and name.startswith(prefixes)
        for name, parameter in block.named_parameters()
    )


def _matrices(module: nn.Module, tokens: float, below: bool) -> Part:
    total = Part()
    for _, matrix, share in _weights(module):
        total += _product(matrix, share * tokens, below)
    return total


def _product(matrix: nn.Parameter, tokens: float, below: bool) -> Part:
    forward = 2 * matrix.numel() * tokens
    launches = 1 + matrix.requires_grad + below
    needed = forward * launches
    float8 = needed if matrix.dtype == torch.float8_e4m3fn else 0.0
    # Forward sums go over the inputs, the input's gradient sums over the outputs, and the weight's
    # over tokens, which are many.
    inputs, outputs = matrix.numel() / matrix.shape[0], matrix.shape[0]
    short = forward * (1 / inputs + below / outputs)
    frozen = 0 if matrix.requires_grad else launches
    return Part(forward, needed, float8, short, 0.0, float(launches), float(frozen))


def _adapted(name: str, matrix: nn.Parameter, tokens: float) -> Part:
    return Part(adapted=tokens * matrix.shape[1] if "lora_A" in name else 0.0)


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, float]]:
    """(name, matrix, share of the tokens that it reads); a shared matrix comes once."""
    for name, parameter in module.named_parameters():
        if "experts" in name and parameter.ndim == 3:
            # A token runs through top_k of the experts, whose matrices stand in one tensor.
            owner = module.get_submodule(name.rpartition(".experts")[0] or "")
            router = getattr(owner, "gate", None) or getattr(owner, "router", None)
            yield name, parameter, getattr(router, "top_k", 1) / parameter.shape[0]
        elif parameter.ndim > 1:
            yield name, parameter, 1.0
