"""What a training step has to compute, counted from the model itself and from what rows hold.

FLOPs are those the result needs, 2 a multiply-add: real tokens and pairs only, nothing twice, the
output matrix only where supervised. A matrix W of a part that sees T tokens costs

    2 |W| T  forward  +  2 |W| T  if W trains  +  2 |W| T  if anything below W trains

(of a mixture's experts, the share that is used), and attention 4 · width · pairs, three times that
where a gradient passes through it. So LoRA on a frozen language model needs its linear layers
twice, the adapters three times, and of the first block's q, k and v no gradient of the input; a
frozen tower is run forward only. Norms, rotations and activations are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from internvl.data.records import PackedBatch
from internvl.models import configs, kernels
from internvl.models.attention.packed import last_queries

_FIRST = ("q_proj", "k_proj", "v_proj", "qkv_proj")
"""Layers that read the input of their block, through its first norm."""
_FIRST_NORMS = ("input_layernorm", "layernorm_before")


@dataclass(frozen=True)
class Work:
    """What rows hold, as FLOPs are counted from it."""

    samples: float
    tokens: float
    tiles: float
    supervised: float
    pairs: float
    """Queries and keys that see each other."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(_numbers(self), _numbers(other), strict=True)))

    def scaled(self, factor: float) -> "Work":
        """As much of everything, `factor` times."""
        return Work(*(factor * number for number in _numbers(self)))


def _numbers(work: Work) -> tuple[float, ...]:
    return tuple(getattr(work, field.name) for field in fields(work))


def work_of(row: PackedBatch) -> Work:
    """What a row asks for; padding asks for nothing."""
    real = row.document >= 0
    seen_by = last_queries(row.document, row.branch) - torch.arange(len(row.document)) + 1
    pairs = int(seen_by[real].sum())
    return Work(row.num_samples, row.num_tokens, row.num_tiles, len(row.targets), pairs)


@dataclass(frozen=True)
class Part:
    """FLOPs of a part: of its forward, of all that is needed of it, and of that in float8."""

    forward: float = 0.0
    needed: float = 0.0
    float8: float = 0.0

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.forward + other.forward, self.needed + other.needed, self.float8 + other.float8
        )


@dataclass(frozen=True)
class Flops:
    """FLOPs by what a GPU does them with."""

    tower: Part
    """Matrix products of the vision tower and of a chat model's projector."""
    tower_attention: Part
    decoder: Part
    """Matrix products of the language model's blocks."""
    decoder_attention: Part
    logits: Part
    """The output matrix; of InternVL-14B the pools and projections as well."""

    @property
    def needed(self) -> float:
        return sum(getattr(self, field.name).needed for field in fields(self))


def count(model: Any, work: Work) -> Flops:
    """FLOPs of one pass over `work`, forward and backward.

    Every block is counted with all tokens, so that figures compare with those of others, though
    training runs the last MLP on supervised positions alone (`last_mlp_flops`).

    Args:
        model: a `ChatModel` with what trains chosen and adapters attached; the meta device does.
    """
    vision, text = model.config.vision_config, model.config.text_config
    tower, decoder = model.model.vision_tower, model.model.language_model
    patches = (vision.image_size[0] // vision.patch_size[0]) ** 2
    tokens = (patches + 1) * work.tiles
    pairs = (patches + 1) ** 2 * work.tiles

    below = trains(tower.embeddings)
    images = _matrices(tower.embeddings.patch_embeddings, patches * work.tiles, below=False)
    images, mixing, below = _blocks(
        tower.encoder.layer, tokens, 4 * vision.hidden_size * pairs, below, images
    )
    projector = model.model.multi_modal_projector
    visual = work.tiles * patches * model.config.downsample_ratio**2
    for name in ("linear_1", "linear_2"):
        images += _matrices(
            projector.get_submodule(name), visual, below or trains(projector.layer_norm)
        )
    below = below or trains(projector) or trains(decoder.embed_tokens)
    products, attention, below = _blocks(
        decoder.layers, work.tokens, 4 * query_width(text) * work.pairs, below, Part()
    )
    logits = _matrices(model.lm_head, work.supervised, below or trains(decoder.norm))
    return Flops(images, mixing, products, attention, logits)


def last_mlp_flops(model: Any, positions: float) -> Part:
    """Of the decoder's products those of the last MLP, where it sees supervised positions alone
    (models/kernels/last_mlp.py): for so many of them. Nothing where it sees every token."""
    decoder = model.model.language_model
    block = decoder.layers[-1]
    if not kernels.supports_last_mlp(block):
        return Part()
    below = (model.model.vision_tower, model.model.multi_modal_projector, decoder.embed_tokens)
    return _matrices(block.mlp, positions, any(trains(part) for part in (*below, decoder.layers)))


def query_width(text: Any) -> int:
    """Width of all queries of a language model together."""
    return configs.head_width(text) * text.num_attention_heads


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module does."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _blocks(
    blocks: nn.ModuleList, tokens: float, mixing: float, below: bool, start: Part
) -> tuple[Part, Part, bool]:
    """(matrix products added to `start`, attention, whether anything trains up to the end)."""
    products, attention = start, Part()
    for block in blocks:
        products += _products(block, tokens, below)
        below = below or trains(block)
        attention += Part(mixing, mixing * (3 if below else 1))
    return products, attention, below


def _products(block: nn.Module, tokens: float, below: bool) -> Part:
    first = below or any(
        parameter.requires_grad
        for name, parameter in block.named_parameters()
        if name.startswith(_FIRST_NORMS)
    )
    later = below or trains(block)
    total = Part()
    for name, matrix, share in _weights(block):
        reads_input = any(layer in name for layer in _FIRST) and "lora_B" not in name
        total += _product(matrix, share * tokens, first if reads_input else later)
    return total


def _matrices(module: nn.Module, tokens: float, below: bool) -> Part:
    total = Part()
    for _, matrix, share in _weights(module):
        total += _product(matrix, share * tokens, below)
    return total


def _product(matrix: nn.Parameter, tokens: float, below: bool) -> Part:
    forward = 2 * matrix.numel() * tokens
    needed = forward * (1 + matrix.requires_grad + below)
    return Part(forward, needed, needed if matrix.dtype == torch.float8_e4m3fn else 0.0)


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, float]]:
    """(name, matrix, share of the tokens that it sees); a shared matrix comes once."""
    for name, parameter in module.named_parameters():
        if "experts" in name and parameter.ndim == 3:
            owner = module.get_submodule(name.rpartition(".experts")[0] or "")
            chosen = getattr(owner, "gate", None) or getattr(owner, "router", None)
            yield name, parameter, getattr(chosen, "top_k", 1) / parameter.shape[0]
        elif parameter.ndim > 1:
            yield name, parameter, 1.0
