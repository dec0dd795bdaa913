"""Bytes that autograd saves for a micro-batch: what both families of models have.

What a block saves is a sum over its widths, in values per token: an entry of `SAVED_BY_BLOCKS`, and
2 Q + 2 K for attention (the widths of all queries and keys) and R (the ranks of the adapters
together, each A once). Adapters that are fused with their weights (fused_lora.py) save their inputs
as well; those on 4 bits or float8 save masks of dropout, the fused ones a seed (seeded_dropout.py).
Frozen blocks pass a gradient on to what trains below them. The sums are what `saved_tensors_hooks`
counts, which the tests repeat on small models; the compiled ones are the choice of AOTAutograd's
partitioner.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from internvl.config import Recipe
from internvl.models.trainable import is_adapted
from internvl.plan import flops
from internvl.plan.load import Load, attention_of, is_compiled
from internvl.plan.work import Work

BLOCK_BACK, BLOCK_FORWARD = "gradients of a block's activations", "a frozen block, forward"
LOGITS = "logits of a chunk"
OF_BLOCKS = "language model activations", "QLLaMA activations"
"""Components that are there for a while."""


class Saved(NamedTuple):
    """Values that a block saves per token, as multiples of a width.

    f is the inner width of the MLP, d that of the block, n that of normed queries and keys; those
    in `wide` are float32, the others have the compute dtype.
    """

    f: int
    d: int
    n: int = 0
    wide_d: int = 0
    wide_n: int = 0


class SavedByBlock(NamedTuple):
    """What blocks of a mode save."""

    decoder: Saved
    last_mlp: Saved
    """The share of `decoder` that the last block saves from its second norm on."""
    tower: Saved
    """n and wide_n: RMS norms of queries and keys in InternViT-6B, as multiples of d."""


# Keys are (mode, compiled). Modes: fused = adapters in one buffer with their frozen weight,
# seeded = the same with dropout, whose inputs are drawn again, apart = adapters on 4 bits or
# float8, trained = the block's own matrices train, frozen = it only passes a gradient on.
SAVED_BY_BLOCKS = {
    ("frozen", True): SavedByBlock(Saved(2, 3, 1), Saved(2, 1), Saved(2, 9, 2)),
    ("frozen", False): SavedByBlock(
        Saved(3, 0, 0, 2, 1), Saved(4, 1, 0, 1), Saved(2, 11, -2, 0, 4)
    ),
    # Fused, q and k are views of the buffer that v's backward keeps.
    ("fused", True): SavedByBlock(Saved(2, 2, 1), Saved(2, 1), Saved(1, 6, 2)),
    ("fused", False): SavedByBlock(Saved(3, 0, 0, 2, 1), Saved(3, 0, 0, 1), Saved(1, 6, 0, 0, 4)),
    ("seeded", True): SavedByBlock(Saved(2, 2, 1), Saved(2, 1), Saved(1, 6, 2)),
    ("seeded", False): SavedByBlock(Saved(4, 2, 0, 2, 1), Saved(4, 1, 0, 1), Saved(2, 8, 0, 0, 4)),
    ("apart", True): SavedByBlock(Saved(3, 5, 1), Saved(3, 2), Saved(2, 9, 2)),
    ("apart", False): SavedByBlock(Saved(4, 6, 0, 2, 1), Saved(4, 2, 0, 1), Saved(2, 11, -2, 0, 4)),
    ("trained", True): SavedByBlock(Saved(3, 3, 1, 1), Saved(3, 2), Saved(2, 8, 2, 1)),
    ("trained", False): SavedByBlock(
        Saved(4, 5, 1, 4, 1), Saved(4, 2, 0, 2), Saved(2, 10, 2, 2, 4)
    ),
}


def trains_itself(block: nn.Module) -> bool:
    """Whether a block's own matrices train, rather than adapters or QLLaMA's cross-attention."""
    others = ("lora_", "cross_attn.")
    names = (name for name, p in block.named_parameters() if p.requires_grad)
    return any(not any(other in name for other in others) for name in names)


def adapted_layers(module: nn.Module) -> Iterator[Any]:
    """Yields the layers that carry adapters."""
    return (layer for layer in module.modules() if is_adapted(layer))


def is_fused(layer: Any) -> bool:
    """Whether `fused_lora.fuse` takes this layer, if its base is not quantized."""
    base = layer.base_layer
    return type(base) is nn.Linear and not base.weight.requires_grad


class Adapters(NamedTuple):
    """What the adapters of a block save per token; those that share one A count once."""

    rank: float
    """Values of their inner outputs."""
    inputs: float
    """Values of inputs that are saved for them alone."""
    mask_bytes: float
    """Bytes of dropout's masks and copies."""


class Activations(ABC):
    """Bytes that a micro-batch saves for its backward pass."""

    def __init__(self, model: Any, recipe: Recipe, batch: Work, *, sharded: bool = False) -> None:
        self.model = model
        self.recipe = recipe
        self.compute = recipe.compute
        self.batch = batch
        self.dtype_bytes = 2 if recipe.dtype == "bfloat16" else 4
        self.compiled = is_compiled(recipe.compute)
        self.attention = attention_of(recipe)
        fusable = any(is_fused(layer) for layer in adapted_layers(model))
        self.fused = fusable and not recipe.model.quantize and not sharded
        self.sharded = sharded
        self.text, self.vision = model.config.text_config, model.config.vision_config
        self.language_model = model.model.language_model
        self.layers = self.language_model.layers
        self.tower_layers = model.model.vision_tower.encoder.layer
        self.tower_trains = flops.trains(model.model.vision_tower)
        self.patch_tokens = flops.patches_of(model) + 1
        self.tower_tokens = batch.tiles * self.patch_tokens

    def components(self) -> dict[str, float]:
        """Bytes by component at the step's peak, weights and states left out."""
        moments = [self.before(), self.until_language() | largest(self.passing()), self.in_tower()]
        return heaviest(moments)

    @abstractmethod
    def before(self) -> dict[str, float]:
        """What is there while a frozen tower runs, if the rest has not begun; none: it has."""

    @abstractmethod
    def until_language(self) -> dict[str, float]:
        """What is there when the language model's last block runs back, the block included."""

    @abstractmethod
    def passing(self) -> dict[str, float]:
        """What joins it, one after the other: while a block runs back, and at other times."""

    @abstractmethod
    def in_tower(self) -> dict[str, float]:
        """What is there when the vision tower's last block runs back; none if it is frozen."""

    @abstractmethod
    def block(self) -> float:
        """Bytes that a block of the language model alone holds when it begins to run back."""

    @abstractmethod
    def stored(self, load: Load) -> float:
        """Bytes that blocks save in a step if nothing is recomputed."""

    @abstractmethod
    def waiting(self, load: Load) -> float:
        """Bytes that blocks hold until the backward pass of a step, on the GPU or offloaded."""

    @abstractmethod
    def frozen_states(self, load: Load, tower_passes: float, language_passes: float) -> float:
        """Bytes of hidden states that pass between blocks in a step and are not saved.

        Args:
            tower_passes: forward passes through the tower, a fraction if some are cached.
            language_passes: the same of the language model.
        """

    def freed(self) -> float:
        """Bytes that the language model's backward pass has freed when its last block runs back."""
        return 0.0

    @property
    def waits(self) -> bool:
        """Whether a block's gradients wait for those of another pass through it in the step."""
        return False

    def cached_visual_share(self, micro_batches: int) -> float:
        """Share of the micro-batches whose visual tokens gradient caching keeps."""
        return 0.0

    def trained_bytes(self, trains: bool) -> int:
        """Bytes of a value in the computation: trained weights are float32, gathered ones not."""
        return 4 if trains and not self.sharded else self.dtype_bytes

    def casts(self, uses: int = 1) -> float:
        """Bytes of trained matrices cast to the compute dtype, which the backward pass reads.

        Args:
            uses: how often the language model runs in a forward pass.
        """
        if self.dtype_bytes == 4 or self.sharded:  # gathered in the dtype of the computation
            return 0.0
        total = 0.0
        for layers in (self.layers, self.tower_layers):
            numel = sum(
                p.numel()
                for name, p in layers.named_parameters()
                if p.requires_grad and p.ndim > 1 and not (self.fused and "lora_B" in name)
            )
            # Compiled code casts inside each use; autocast's cache serves all of them.
            times = uses if self.compiled and layers is self.layers else 1
            share = self.num_kept(len(layers), layers) / len(layers)
            total += times * self.dtype_bytes * numel * share
        return total

    def decoder_block(self, tokens: float) -> float:
        """Bytes that one block of the language model saves for a sequence of `tokens`."""
        text, block = self.text, self.layers[-1]
        heads, key_heads = text.num_attention_heads, text.num_key_value_heads
        q = flops.query_width(text)
        k = q // heads * key_heads
        # Flex attention reads grouped keys; the others repeat them for every query head.
        mixed = 2 * q + 2 * (k if self.attention == "flex" else q)
        normed = 0 if getattr(block.self_attn, "q_norm", None) is None else q + k
        adapters = self.adapters_of(block)
        saved = SAVED_BY_BLOCKS[self.mode(block, adapters), self.compiled].decoder
        narrow, wide = self.values_per_token(saved, self.inner_width(), text.hidden_size, normed)
        narrow += mixed + adapters.inputs + adapters.rank
        # float32 per token: two norms, and a log-sum-exp for each attention head.
        statistics = 8 + 4 * heads + (4 * (heads + key_heads) if normed else 0)
        token_bytes = self.dtype_bytes * narrow + 4 * wide + adapters.mask_bytes + statistics
        return tokens * token_bytes + self._square(tokens, heads)

    def waiting_tower(self) -> float:
        """Bytes that the vision tower holds until it runs back."""
        # Blocks that are recomputed are not there yet.
        recomputed = self.num_kept(len(self.tower_layers), self.tower_layers) == 0
        return self.tower() - (self.tower_block() if self.tower_trains and recomputed else 0.0)

    def tower(self) -> float:
        """Bytes that the vision tower saves; zero if it is frozen."""
        if not self.tower_trains:
            return 0.0
        # Autograd starts at the first block that trains: those below it save nothing.
        training = [i for i, block in enumerate(self.tower_layers) if flops.trains(block)]
        count = len(self.tower_layers) - (training[0] if training else 0)
        num_kept = self.num_kept(count, self.tower_layers)
        entered = float(self.tower_tokens * self.vision.hidden_size)
        # LayerScale of a trained block is float32, and so is the residual stream behind it.
        entered *= self.trained_bytes(trains_itself(self.tower_layers[-1]))
        block = self.tower_block()
        # If all are recomputed, one at a time is there.
        return num_kept * block + (count - num_kept) * entered + (0.0 if num_kept else block)

    def tower_block(self) -> float:
        """Bytes that one block of the tower saves."""
        d, block = self.vision.hidden_size, self.tower_layers[-1]
        adapters = self.adapters_of(block)
        saved = SAVED_BY_BLOCKS[self.mode(block, adapters), self.compiled].tower
        normed = d if self.vision.use_qk_norm else 0
        narrow, wide = self.values_per_token(saved, self.vision.intermediate_size, d, normed)
        narrow += adapters.inputs + adapters.rank
        # float32 per token: mean and deviation of two layer norms, a log-sum-exp for each head.
        statistics = 16 + 4 * self.vision.num_attention_heads
        token_bytes = self.dtype_bytes * narrow + 4 * wide + adapters.mask_bytes + statistics
        return self.tower_tokens * token_bytes

    def frozen_tower(self) -> float:
        """Bytes that one block of a frozen tower holds while it runs."""
        if self.tower_trains:
            return 0.0
        mlp = 2 * self.dtype_bytes * self.vision.intermediate_size
        return self.tower_tokens * (mlp + 12.0 * self.vision.hidden_size)

    def logits(self, supervised: float) -> float:
        """Bytes of a chunk's logits and their gradients; the output matrix's own, if it trains."""
        head = self.model.lm_head.weight
        chunk = min(self.compute.loss_chunk, supervised)
        # float32 logits, their softmax and gradient; logits and gradient in the compute dtype.
        total = chunk * head.shape[0] * (12.0 + 2 * self.dtype_bytes)
        if head.requires_grad:
            copies = 2 * self.dtype_bytes if self.dtype_bytes == 2 else 0
            # Of shards it is the root's: `Shards.unit_gradients`.
            total += head.numel() * (self.dtype_bytes if self.sharded else 4.0 + copies)
        return total

    def inner_width(self) -> int:
        """Inner width of the MLP; of a mixture's experts, the width that a token uses."""
        experts = getattr(self.text, "num_experts_per_tok", 0) or 0
        of_expert = getattr(self.text, "moe_intermediate_size", None)
        return experts * of_expert if experts and of_expert else self.text.intermediate_size

    def num_kept(self, count: int, layers: nn.Module) -> int:
        """How many of `count` blocks are not recomputed."""
        if self.compute.checkpointing == "none" or not flops.trains(layers):
            return count
        return 0 if self.compute.checkpointing == "full" else count // 2

    def mode(self, block: nn.Module, adapters: Adapters) -> str:
        """How a block trains: a mode of SAVED_BY_BLOCKS."""
        if adapters.rank and self.fused:
            return "fused" if adapters.inputs else "seeded"
        if trains_itself(block):
            return "trained"
        return "apart" if adapters.rank else "frozen"

    def values_per_token(
        self, saved: Saved, inner: int, d: int, normed: int
    ) -> tuple[float, float]:
        """Returns (values per token in the compute dtype, values in float32)."""
        narrow = saved.f * inner + saved.d * d + saved.n * normed
        return narrow, saved.wide_d * d + saved.wide_n * normed

    def adapters_of(self, module: nn.Module) -> Adapters:
        """Counts what the adapters inside `module` save."""
        rank = inputs = mask_bytes = 0.0
        seen: set[int] = set()
        for name, layer in module.named_modules():
            if not is_adapted(layer):
                continue
            a = layer.lora_A["default"].weight
            shared = id(a) in seen
            seen.add(id(a))
            rate = getattr(layer.lora_dropout["default"], "rate", 0.0)
            if not (shared and (self.compiled or self.fused)):
                rank += a.shape[0]
                # An input wider than its output is saved by the frozen layer as well: v's is k's,
                # o's is attention's output.
                wide = a.shape[1] > layer.get_base_layer().out_features
                saved_anyway = wide and name.endswith(("v_proj", "o_proj"))
                inputs += 0 if rate or saved_anyway or not self.fused else a.shape[1]
            if rate and not shared and not self.fused:
                mask_bytes += a.shape[1]
                # Compiled, the dropped copy of the input of q, k and v is saved as well.
                if self.compiled and name.endswith(flops.FIRST):
                    mask_bytes += self.dtype_bytes * a.shape[1]
        return Adapters(rank, inputs, mask_bytes)

    def _square(self, tokens: float, heads: int) -> float:
        """Bytes of masks or scores that attention writes out for all pairs of tokens."""
        if self.attention == "flex":
            return 0.0
        if self.attention == "dense":
            return float(self.dtype_bytes * tokens**2)
        scores = 2.0 * self.dtype_bytes if self.compiled else self.dtype_bytes + 4.0
        return heads * tokens**2 * scores


def heaviest(moments: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of what is there at several moments, the most."""
    return max(moments, key=lambda components: sum(components.values()))


def largest(passing: dict[str, float]) -> dict[str, float]:
    """Of components that exist one after the other, the largest."""
    name = max(passing, key=lambda key: passing[key])
    return {name: passing[name]}
