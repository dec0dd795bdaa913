"""Peak memory of a training step by component, worked out from a model on the meta device.

Weights, gradients and optimizer states are counted parameter by parameter. What autograd keeps of a
block is a sum over its widths, in numbers per token (D width, F inner width of the MLP, Q and K
widths of all queries and keys, R ranks of the adapters together, each A once); of the language
model's blocks, in the compute type unless said otherwise:

    compiled, adapters   2 F + 2 D + 2 Q + 2 K + J       with dropout R instead of J
    compiled, apart      3 F + 5 D + 2 Q + 2 K + R
    compiled, trained    3 F + 3 D + 2 Q + 2 K           and D in float32
    as written, adapters 3 F + 2 Q + 2 K + J             and 2 D in float32
    as written, apart    4 F + 6 D + 2 Q + 2 K + R       and 2 D in float32
    as written, trained  4 F + 5 D + 2 Q + 2 K           and 4 D in float32
    compiled, frozen     2 F + 3 D + 2 Q + 2 K
    as written, frozen   3 F + 2 Q + 2 K                 and 2 D in float32

J is R and the inputs of all adapters that are joined with their weights (fused_lora.py); apart are
those on 4 bits or float8. They keep masks of dropout, the others seeds (seeded_dropout.py). Frozen
blocks pass a gradient on to what trains below them. Of the last block, where last_mlp.py cuts it,
the MLP's part is kept for supervised positions alone. The sums are what `saved_tensors_hooks`
counts, which the tests do again on small models; the compiled ones are the choice of AOTAutograd's
partitioner.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from internvl.config import ComputeConfig, Recipe
from internvl.models import kernels
from internvl.plan import flops
from internvl.training import optim

GIB = 2**30
ABSMAX_BLOCK = 64
"""Weights that share a float32 scale in 4 bits (NF4 without double quantization)."""
MOMENT_BLOCK = 256
"""Numbers of an 8-bit moment that share a float32 scale (torchao)."""
CONTEXT_GIB = 0.6
"""What CUDA, cuBLAS and torch's kernels take before the first tensor. Assumed."""
SLACK = 0.04
"""Of what comes and goes, held by torch's allocator and not used. Assumed."""


@dataclass(frozen=True)
class Shape:
    """The largest row of a run."""

    tokens: int
    """With padding."""
    tiles: int
    supervised: int


@dataclass(frozen=True)
class Footprint:
    """Bytes by component at the step's peak."""

    parts: dict[str, float]
    overhead: dict[str, float]
    """What the GPU needs beyond what torch counts as allocated."""

    @property
    def allocated_gib(self) -> float:
        """What `torch.cuda.max_memory_allocated` would say."""
        return sum(self.parts.values()) / GIB

    @property
    def total_gib(self) -> float:
        """What the GPU must have."""
        return self.allocated_gib + sum(self.overhead.values()) / GIB


def of(model: Any, recipe: Recipe, row: Shape, *, compiled: bool, attention: str) -> Footprint:
    """The memory of a step.

    Args:
        model: on the meta device, as `parallel.place` leaves it.
        attention: "flex", "dense" or "eager", as the run will have it.
    """
    fixed = states(model, recipe)
    number = 2 if recipe.dtype == "bfloat16" else 4
    joined = not recipe.model.quantize
    blocks = Blocks(
        model, recipe.compute, number, compiled=compiled, attention=attention, joined=joined
    )
    moving = {
        "tiles": 6.0 * row.tiles * 3 * model.config.vision_config.image_size[0] ** 2,
        "cast copies of trained weights": blocks.casts(),
        "vision tower activations": blocks.tower(row),
        "language model activations": blocks.decoder(row),
    }
    # The logits are gone when the first block is run back: the larger of the two counts.
    passing = {
        "gradients of a block's activations": blocks.backward(row),
        "logits of a chunk": blocks.logits(row),
    }
    largest = max(passing, key=lambda name: passing[name])
    moving[largest] = passing[largest]
    # A frozen tower is done before the language model keeps anything.
    frozen = blocks.frozen_tower(row) + moving["tiles"]
    if frozen > sum(moving.values()):
        moving = {"tiles": moving["tiles"], "vision tower, forward": blocks.frozen_tower(row)}
    return with_overhead(fixed, moving)


def with_overhead(fixed: dict[str, float], moving: dict[str, float]) -> Footprint:
    """The footprint of what stays and of what comes and goes."""
    parts = {name: size for name, size in {**fixed, **moving}.items() if size}
    overhead = {
        "allocator": SLACK * sum(moving.values()),
        "CUDA and kernels": CONTEXT_GIB * GIB,
    }
    return Footprint(parts, overhead)


def states(model: nn.Module, recipe: Recipe, unreached: tuple[str, ...] = ()) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer states: what is there whatever the rows hold.

    Args:
        unreached: beginnings of the names that no loss gives a gradient.
    """
    found = dict.fromkeys(
        ("frozen weights", "quantized weights", "trained weights", "gradients", "optimizer states"),
        0.0,
    )
    quantized = _quantized(model) if recipe.model.quantize else set()
    # Muon has a momentum alone where AdamW has two moments.
    matrices = optim.hidden_matrices(model) if recipe.optim.name == "muon" else frozenset()
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            found["trained weights"] += size
            if name.startswith(unreached):
                continue
            found["gradients"] += size
            if not recipe.optim.offload:
                moments = 1 if name in matrices else 2
                found["optimizer states"] += moments * _moment_size(parameter, recipe.optim.name)
        elif id(parameter) in quantized:
            rows = parameter.shape[0]
            found["quantized weights"] += _quantized_size(
                parameter.numel(), rows, str(recipe.model.quantize)
            )
        else:
            found["frozen weights"] += size
    buffers = (buffer.numel() * buffer.element_size() for buffer in model.buffers())
    found["frozen weights"] += sum(buffers)
    if not recipe.model.quantize:  # B once more, beside the weight it is joined with
        for layer in _adapted(model):
            weight = layer.base_layer.weight
            copies = layer.lora_B["default"].weight.numel() * weight.element_size()
            found["frozen weights"] += copies if _joins(layer) else 0
    return found


def _moment_size(parameter: nn.Parameter, optimizer: str) -> float:
    """Bytes of one moment; torchao's 8-bit AdamW leaves small and odd tensors in float32."""
    numbers = parameter.numel()
    if optimizer == "adamw-8bit" and numbers >= 4096 and numbers % MOMENT_BLOCK == 0:
        return numbers * (1 + 4 / MOMENT_BLOCK)
    return numbers * parameter.element_size()


def _quantized(model: nn.Module) -> set[int]:
    """Ids of the weights that bitsandbytes packs: linear layers outside projector and output."""
    kept = ("lm_head", "model.multi_modal_projector")
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(kept) and "lora_" not in name
    }


def _quantized_size(numbers: int, rows: int, kind: str) -> float:
    """4 bits and a float32 for every ABSMAX_BLOCK of them; or 8 bits and a float32 a row."""
    return numbers * (0.5 + 4 / ABSMAX_BLOCK) if kind == "4bit" else numbers + 4 * rows


def _own(block: nn.Module) -> bool:
    """Whether a block's own matrices train, rather than adapters or QLLaMA's cross-attention."""
    others = ("lora_", "cross_attn.")
    names = (name for name, p in block.named_parameters() if p.requires_grad)
    return any(not any(other in name for other in others) for name in names)


def _adapted(part: nn.Module) -> Iterator[Any]:
    return (module for module in part.modules() if isinstance(module, LoraLayer))


def _joins(layer: Any) -> bool:
    """Whether `joined.join` takes this layer, if its base is not quantized."""
    base = layer.base_layer
    return type(base) is nn.Linear and not base.weight.requires_grad


class Blocks:
    """Activation bytes of a model's parts for a row."""

    def __init__(
        self,
        model: Any,
        compute: ComputeConfig,
        number: int,
        *,
        compiled: bool,
        attention: str,
        joined: bool = True,
    ) -> None:
        self.model = model
        self.compute = compute
        self.number = number
        """Bytes of a number in the compute type."""
        self.compiled = compiled
        self.attention = attention
        self.joined = joined and any(_joins(layer) for layer in _adapted(model))
        """Whether adapters are."""
        self.text, self.vision = model.config.text_config, model.config.vision_config
        self.layers = model.model.language_model.layers
        self.tower_layers = model.model.vision_tower.encoder.layer
        sides = self.vision.image_size[0] // self.vision.patch_size[0]
        self.patch_tokens = sides**2 + 1

    def casts(self, uses: int = 1) -> float:
        """Trained matrices once more in the compute type: a cast is kept for the backward pass.

        Args:
            uses: how often the language model runs in a forward pass; compiled, each has its own.
        """
        if self.number == 4:
            return 0.0
        total = 0.0
        for layers in (self.layers, self.tower_layers):
            sizes = [
                p.numel()
                for name, p in layers.named_parameters()
                if p.requires_grad and p.ndim > 1 and not (self.joined and "lora_B" in name)
            ]
            times = uses if self.compiled and layers is self.layers else 1
            share = self._kept(len(layers), layers) / len(layers)
            total += times * self.number * sum(sizes) * share
        return total

    def decoder(self, row: Shape) -> float:
        """What the language model's blocks keep, and the hidden states around them."""
        residual = self._residual_size()
        left = row.supervised if kernels.supports_last_mlp(self.layers[-1]) else row.tokens
        around = row.tokens * residual + left * (residual + 4.0 + self.number)
        around *= self.text.hidden_size
        visual = row.tiles * (self.patch_tokens - 1) * self.model.config.downsample_ratio**2
        visual *= self.number
        around += visual * (self.text.hidden_size + 4 * self.vision.hidden_size)
        if not self._reached():
            return around
        each = self.decoder_block(row.tokens)
        count, kept = len(self.layers), self._kept(len(self.layers), self.layers)
        entered = row.tokens * self.text.hidden_size * residual
        again = each if kept == 0 else 0.0  # the block that is just computed again
        if self.compute.offload:
            return around + each + entered
        if kept == count or (kept and count % 2 == 0):  # the last block is one of them
            around += self.last_block(row) - each
        return around + kept * each + (count - kept) * entered + again

    def last_block(self, row: Shape) -> float:
        """Bytes kept of the last one, whose MLP may see supervised positions alone, uncompiled."""
        whole = self.decoder_block(row.tokens)
        if not kernels.supports_last_mlp(self.layers[-1]):
            return whole
        all_of_it, positions = self._mlp_token(self.compiled), self._mlp_token(False)
        return whole - row.tokens * all_of_it + row.supervised * positions

    def _mlp_token(self, compiled: bool) -> float:
        """Bytes kept of a token by the last block's second half."""
        block = self.layers[-1]
        d, inner, own = self.text.hidden_size, self._inner_width(), _own(block)
        rank, inputs, masked = self._adapters(block.mlp)
        apart = own or (rank and not self.joined)
        if compiled:
            narrow, wide = (3 * inner + 2 * d if apart else 2 * inner + d), 0
        else:
            written = 3 * inner if inputs else 4 * inner + d
            narrow, wide = (4 * inner + 2 * d if apart else written), (2 if own else 1) * d
        return self.number * (narrow + inputs + rank) + 4 * wide + masked + 4

    def decoder_block(self, tokens: int) -> float:
        """Bytes kept of one block of the language model for a row of `tokens`."""
        text, block = self.text, self.layers[-1]
        d, heads, pairs = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
        q = flops.query_width(text)
        k = q // heads * pairs
        inner = self._inner_width()
        expanded = k if self.attention == "flex" else q  # others repeat keys for every query head
        mixed = 2 * q + 2 * expanded
        own = _own(block)
        rank, inputs, masked = self._adapters(block)
        normed = q + k if hasattr(block.self_attn, "q_norm") else 0
        if not (own or rank):  # a gradient passes, nothing is learned
            narrow = (2 * inner + 3 * d + normed if self.compiled else 3 * inner) + mixed
            wide = 0 if self.compiled else 2 * d + normed
        elif rank and self.joined and self.compiled:
            narrow = 2 * inner + 2 * d + mixed + inputs + rank + normed
            wide = 0
        elif rank and self.joined:
            narrow = mixed + inputs + rank + (3 * inner if inputs else 4 * inner + 2 * d)
            wide = 2 * d + normed
        elif self.compiled:
            narrow = 3 * inner + (3 if own else 5) * d + mixed + rank + normed
            wide = d if own else 0
        else:
            narrow = 4 * inner + (5 if own else 6) * d + mixed + rank + (normed if own else 0)
            wide = (4 if own else 2) * d + normed
        statistics = 8 + 4 * heads
        if normed:
            statistics += 4 * (heads + pairs)
        each = self.number * narrow + 4 * wide + masked + statistics
        return tokens * each + self._square(tokens, heads)

    def backward(self, row: Shape) -> float:
        """Gradients that exist together while a block's MLP is run back."""
        if not self._reached():
            return 0.0
        return 3.0 * self.number * row.tokens * self._inner_width()

    def tower(self, row: Shape) -> float:
        """What a vision tower that trains keeps."""
        if not flops.trains(self.model.model.vision_tower):
            return 0.0
        reached = [i for i, block in enumerate(self.tower_layers) if flops.trains(block)]
        count = len(self.tower_layers) - (reached[0] if reached else 0)
        tokens = row.tiles * self.patch_tokens
        kept = self._kept(count, self.tower_layers)
        entered = float(tokens * self.vision.hidden_size)
        entered *= 4 if _own(self.tower_layers[-1]) else self.number
        each = self.tower_block(tokens)
        return kept * each + (count - kept) * entered + (0.0 if kept else each)

    def tower_block(self, tokens: int) -> float:
        """Bytes kept of one block of the tower for `tokens` patches."""
        d, inner, heads = (
            self.vision.hidden_size,
            self.vision.intermediate_size,
            self.vision.num_attention_heads,
        )
        block = self.tower_layers[-1]
        own = _own(block)
        rank, inputs, masked = self._adapters(block)
        narrow = 2 * inner + rank
        if rank and self.joined:
            kept_apart = not (inputs or self.compiled)
            narrow = inputs + rank + (2 * inner + 8 * d if kept_apart else inner + 6 * d)
            wide = 0
        elif self.compiled:
            narrow += (8 if own else 9) * d
            wide = d if own else 0
        else:
            narrow += (10 if own else 11) * d
            wide = 2 * d if own else 0
        if self.vision.use_qk_norm:  # and RMS norms, in InternViT-6B
            # Joined, q and k are parts of what v keeps.
            narrow += (2 if own or self.compiled else 0 if rank and self.joined else -2) * d
            wide += 0 if self.compiled else 4 * d
        return tokens * (self.number * narrow + 4 * wide + masked + 16 + 4 * heads)

    def frozen_tower(self, row: Shape) -> float:
        """What one block of a tower without gradient holds at once."""
        d, inner = self.vision.hidden_size, self.vision.intermediate_size
        tokens = row.tiles * self.patch_tokens
        return (
            0.0
            if flops.trains(self.model.model.vision_tower)
            else tokens * (2 * self.number * inner + 12.0 * d)
        )

    def logits(self, row: Shape) -> float:
        """Logits of a chunk with their gradients; the output matrix's own, where it trains."""
        head = self.model.lm_head.weight
        chunk = min(self.compute.loss_chunk, row.supervised)
        total = chunk * head.shape[0] * (12.0 + 2 * self.number)
        if head.requires_grad:
            total += head.numel() * (4.0 + (2 * self.number if self.number == 2 else 0))
        return total

    def _adapters(self, block: nn.Module) -> tuple[float, float, float]:
        """(numbers of the adapters' inner outputs, of inputs that are kept beside them, bytes of
        dropout's masks and copies) a token; of those that share one A once."""
        rank = inputs = masked = 0.0
        seen: set[int] = set()
        for name, layer in block.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            a = layer.lora_A["default"].weight
            shared = id(a) in seen
            seen.add(id(a))
            dropout = layer.lora_dropout["default"]
            rate = getattr(dropout, "rate", 0.0)
            if not (shared and (self.compiled or self.joined)):
                rank += a.shape[0]
                # Wider than the output, it is kept as it is: v's is k's, o's is attention's output.
                wide = a.shape[1] > layer.get_base_layer().out_features
                kept = wide and name.endswith(("v_proj", "o_proj"))
                inputs += 0 if rate or kept or not self.joined else a.shape[1]
            if rate and not shared and not self.joined:
                masked += a.shape[1]
                if self.compiled and name.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj")):
                    masked += self.number * a.shape[1]
        return rank, inputs, masked

    def _square(self, tokens: int, heads: int) -> float:
        """Of attention that writes out a mask or scores for all pairs of tokens."""
        if self.attention == "flex":
            return 0.0
        if self.attention == "dense":
            return float(self.number * tokens**2)
        return heads * tokens**2 * (2.0 * self.number if self.compiled else self.number + 4.0)

    def _inner_width(self) -> int:
        """Inner width of the MLP; of a mixture's experts, those a token uses."""
        experts = getattr(self.text, "num_experts_per_tok", 0) or 0
        if experts and hasattr(self.text, "moe_intermediate_size"):
            return experts * self.text.moe_intermediate_size
        return self.text.intermediate_size

    def _residual_size(self) -> int:
        """Bytes of a number between blocks: trained embeddings are float32."""
        return self.model.model.language_model.embed_tokens.weight.element_size()

    def _reached(self) -> bool:
        """Whether a gradient passes through the language model."""
        return flops.trains(self.model)

    def _kept(self, count: int, layers: nn.ModuleList) -> int:
        """Blocks that are not computed again."""
        if self.compute.checkpointing == "none" or not flops.trains(layers):
            return count
        return 0 if self.compute.checkpointing == "full" else count // 2
