"""Peak memory of a training step of InternVL-14B by component, from a model on the meta device.

Blocks of the tower and of QLLaMA keep what footprint.py says of them. QLLaMA runs once for each
kind of sequence, queries with a caption: for the features, for every match and for what is written.
A cross-attention adds, in numbers of the compute type, for R query positions of width D and T
positions of their sequences, in each kind,

    compiled, trained     4 R D                          and T D in float32
    compiled, frozen      2 R D + T D
    as written, trained   4 R D                          and R D + T D in float32
    as written, frozen    2 R D                          and R D in float32

and for N visual tokens of width W once, whatever is computed again:

    compiled, trained     (W + 2 D) N
    compiled, frozen      2 D N
    as written, trained   (2 W + 2 D) N                  and W N in float32
    as written, frozen    2 D N                          and W N in float32

Of a step in micro-batches, the features' graph of one is gone before its other terms are computed;
the further ones that keep theirs from the first pass hold tower and features until they are next.
Only what a gradient passes through is kept: with frozen towers, the inputs of the heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from internvl.config import Recipe
from internvl.plan import footprint
from internvl.plan.dual_flops import Captions
from internvl.plan.flops import trains
from internvl.plan.footprint import Blocks, Footprint, Shape


@dataclass(frozen=True)
class Sequences:
    """Equally long inputs of QLLaMA: queries, then a caption."""

    rows: int
    tokens: int
    compared: bool
    """Whether features come from them."""


def of(
    model: Any,
    recipe: Recipe,
    pairs: int,
    captions: Captions,
    *,
    compiled: bool,
    micro_batches: int = 1,
) -> Footprint:
    """The memory of a step.

    Args:
        model: on the meta device, as `parallel.place` leaves it.
        pairs: of a micro-batch (B).
        micro_batches: of a step on one GPU.
    """
    batch = PairMemory(model, recipe, pairs, captions, compiled=compiled)
    cut = micro_batches > 1 and captions.text > 0
    kept = min(micro_batches, recipe.pairs.kept_micro_batches)
    moving = {
        "images and visual tokens": batch.images(),
        "cast copies of trained weights": batch.casts(),
        "vision tower activations": batch.blocks.tower(batch.shape),
        "QLLaMA activations": batch.language_in_turn() if cut else batch.language(),
        "what the heads keep": batch.heads(),
        "graphs kept for the second pass": (kept - 1) * batch.encoded() if cut else 0.0,
        "visual tokens kept for the second pass": batch.kept(micro_batches - kept),
        "features of a step, compared": 48.0 * recipe.batch_samples**2,
    }
    if recipe.compute.offload:
        moving["vision tower activations"] = batch.offloaded_tower()
    # One after the other: the largest counts.
    passing = {
        "gradients of a block's activations": batch.backward(),
        "a frozen block, forward": batch.forward(),
        "logits of a chunk": batch.logits(),
    }
    largest = max(passing, key=lambda name: passing[name])
    moving[largest] = passing[largest]
    fixed = footprint.states(model, recipe, unreached(recipe))
    return footprint.with_overhead(fixed, moving)


def unreached(recipe: Recipe) -> tuple[str, ...]:
    """Beginnings of the names of weights that no term of the loss reaches: they take no gradient
    and no optimizer states, whether they train or not."""
    terms = recipe.objective.term_weights
    reached = {
        "itc": ("text_projection.", "query_pool.", "logit_scale"),
        "itm": ("itm_head.",),
        "itg": ("lm_head.",),
    }
    found = [name for term, names in reached.items() if term not in terms for name in names]
    if recipe.objective.name != "retrieval" or "itc" not in terms:
        found.append("image_pool.")
    return tuple(found)


class PairMemory:
    """Activation bytes of a micro-batch."""

    def __init__(
        self, model: Any, recipe: Recipe, pairs: int, captions: Captions, *, compiled: bool
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.pairs = pairs
        self.captions = captions
        self.number = 2 if recipe.dtype == "bfloat16" else 4
        attention = "eager" if recipe.compute.attention == "eager" else "dense"
        self.blocks = Blocks(
            model, recipe.compute, self.number, compiled=compiled, attention=attention
        )
        self.shape = Shape(tokens=0, tiles=pairs, supervised=0)
        self.width = model.config.text_config.hidden_size
        self.seen = pairs * self.blocks.patch_tokens
        self.language_model = model.model.language_model

    def kept(self, micro_batches: int) -> float:
        """Bytes of what a frozen tower saw in so many micro-batches, as far as a step keeps it for
        its second pass; one that drops blocks at random does not see the same again."""
        terms = self.recipe.objective.term_weights
        tower = self.model.model.vision_tower
        if "itc" not in terms or trains(tower) or self.recipe.model.drop_path:
            return 0.0
        each = self.visual_tokens(1)
        return each * min(micro_batches, self.model.kept_bytes // each)

    def visual_tokens(self, micro_batches: int) -> float:
        """Bytes of what the tower makes of the images of so many."""
        return float(micro_batches * self.number * self.seen * self._seen_width)

    def frozen_tower_states(self) -> float:
        """Hidden states between the tower's blocks, where it is frozen, as bytes."""
        tower = self.model.model.vision_tower
        blocks = 0 if trains(tower) else len(tower.encoder.layer)
        return float(self.number * self.seen * self._seen_width * blocks)

    def frozen_states(self) -> float:
        """Those between QLLaMA's layers that nothing is kept of."""
        kept = self.kept_of()
        tokens = sum(one.rows * one.tokens for one in self.sequences() if one not in kept)
        return float(self.number * tokens * self.width * len(self.language_model.layers))

    def sequences(self) -> Iterator[Sequences]:
        """What QLLaMA runs."""
        pairs, captions, queries = self.pairs, self.captions, self.model.num_queries
        if captions.text:
            yield Sequences(pairs, queries + captions.text, compared=True)
        if captions.matches:
            rows, tokens = pairs * captions.matches, queries + captions.match
            yield Sequences(rows, tokens, compared=False)
        if captions.written:
            yield Sequences(pairs, queries + captions.written, compared=False)

    def kept_of(self) -> list[Sequences]:
        """Those that a gradient passes through."""
        return list(self.sequences()) if trains(self.model.model) else []

    def images(self) -> float:
        """Pixels, and what the tower makes of them, with a gradient where it trains."""
        pixels = 6.0 * self.pairs * 3 * self.model.config.image_size**2
        copies = 2 if trains(self.model.model.vision_tower) else 1
        return pixels + self.visual_tokens(copies)

    def casts(self) -> float:
        """Trained matrices in the compute type."""
        if self.number == 4:
            return 0.0
        idle = ("model.", *unreached(self.recipe))
        heads = sum(
            p.numel()
            for name, p in self.model.named_parameters()
            if p.requires_grad and p.ndim > 1 and not name.startswith(idle)
        )
        kept = self.kept_of()
        return self.blocks.casts(len(kept)) + float(self.number * (heads - self._fewer_casts(kept)))

    def _fewer_casts(self, kept: list[Sequences]) -> float:
        """Numbers of cross-attention's matrices that not every use of QLLaMA casts: keys and values
        are made once, outside of what is computed again."""
        layers = self.language_model.layers
        again = _computed_again(self.recipe.compute.checkpointing, self.language_model)
        share = 1 - len(again) / len(layers)
        uses = len(kept) if self.blocks.compiled else 1
        return sum(
            p.numel() * (uses * share - 1)
            for name, p in layers.named_parameters()
            if ".cross_attn." in name and (".k_" in name or ".v_" in name) and p.requires_grad
        )

    def language(self) -> float:
        """What QLLaMA's layers keep, and the hidden states around them."""
        return self.looks() + self._language(self.kept_of())

    def language_in_turn(self) -> float:
        """The same where the features' graph is gone before the other terms are computed, beside
        the gradients that it left of keys, values and visual tokens."""
        compared = self._language([one for one in self.kept_of() if one.compared])
        beside = self._language([one for one in self.kept_of() if not one.compared])
        return self.looks() + max(compared, beside + (self.looks_gradients() if beside else 0.0))

    def looks_gradients(self) -> float:
        """Bytes of gradients of keys, values and visual tokens, where there are any."""
        layers = sum(layer.cross_attn is not None for layer in self.language_model.layers)
        made = 2.0 * self.number * self.seen * self.width * layers
        return made + self.visual_tokens(1) if self.looks() else 0.0

    def encoded(self) -> float:
        """Bytes kept of a micro-batch whose features have their graph."""
        if self.recipe.compute.offload:
            return 0.0
        compared = [one for one in self.kept_of() if one.compared]
        blocks = self.blocks.tower(self.shape) + self.blocks.casts(len(compared))
        return self.images() + blocks + self.looks() + self._language(compared)

    def _language(self, sequences: Sequence[Sequences]) -> float:
        layers = list(self.language_model.layers)
        again = _computed_again(self.recipe.compute.checkpointing, self.language_model)
        total, largest = 0.0, 0.0
        for one in sequences:
            residual = one.rows * one.tokens * self.width * self._residual_size()
            states = one.rows * one.tokens * self.width * (4 + self.number)
            total += 2 * residual + states + one.rows * one.tokens**2
            for number, layer in enumerate(layers):
                each = self.layer(one, layer)
                largest = max(largest, each if number in again else 0.0)
                if not self.recipe.compute.offload:
                    total += residual if number in again else each
        if self.recipe.compute.offload:
            largest = max((self.layer(one, layers[0]) for one in sequences), default=0.0)
        return total + largest

    def looks(self) -> float:
        """Bytes kept of the images' keys and values, and of what they are made from."""
        if not self.kept_of():
            return 0.0
        return float(sum(self.look(layer) for layer in self.language_model.layers))

    def look(self, layer: Any) -> int:
        if layer.cross_attn is None:
            return 0
        source, made = self.seen * self._seen_width, 2 * self.seen * self.width
        if self.recipe.compute.offload:
            return self.number * made
        if trains(layer.cross_attn):
            made += (1 if self.blocks.compiled else 2) * source
        return self.number * made + (0 if self.blocks.compiled else 4 * source)

    def layer(self, one: Sequences, layer: Any) -> float:
        """Bytes kept of a layer of QLLaMA."""
        kept = one.rows * self.blocks.decoder_block(one.tokens)
        if layer.cross_attn is None:
            return kept
        queries = one.rows * self.model.num_queries * self.width
        row = one.rows * one.tokens * self.width
        narrow, wide = 2 * queries, 0
        if trains(layer.cross_attn):
            narrow += 2 * queries
            wide += row
        elif self.blocks.compiled:
            narrow += row
        if not self.blocks.compiled:
            wide += queries
        return kept + float(self.number * narrow + 4 * wide)

    def heads(self) -> float:
        """What the pools and the matching head keep: as read, as keys and values, and in float32,
        in which autocast normalizes on a GPU."""
        passed = trains(self.model.model)
        read = 0
        gone = unreached(self.recipe)
        image, queries = self.model.image_pool, self.model.query_pool
        if "image_pool." not in gone and (trains(image) or trains(self.model.model.vision_tower)):
            read += self.seen * self._seen_width
        states = self.pairs * self.model.num_queries * self.width
        if "query_pool." not in gone and (trains(queries) or passed):
            read += states
        wide = 8 if self.number == 2 else 0
        matched = self.captions.matches * states if passed or trains(self.model.itm_head) else 0
        return float(read * (4 * self.number + wide) + matched * self.number)

    def offloaded_tower(self) -> float:
        """One block of a tower that trains; the others wait in the CPU's memory."""
        if not trains(self.model.model.vision_tower):
            return 0.0
        return self.blocks.tower_block(self.seen)

    def backward(self) -> float:
        """Gradients that exist together while a block's MLP is run back."""
        sizes = [one.rows * one.tokens * self._inner for one in self.kept_of()]
        if trains(self.model.model.vision_tower):
            sizes.append(self.seen * self.model.config.vision_config.intermediate_size)
        return 3.0 * self.number * max(sizes, default=0)

    def forward(self) -> float:
        """What one block without gradient holds at once."""
        tokens = [one.rows * one.tokens for one in self.sequences() if one not in self.kept_of()]
        each = 3.0 * self.number * self._inner + 12.0 * self.width
        return max(self.blocks.frozen_tower(self.shape), each * max(tokens, default=0))

    def logits(self) -> float:
        """Of a chunk of the captions that are written."""
        supervised = round(self.pairs * self.captions.supervised)
        return self.blocks.logits(Shape(0, 0, supervised)) if supervised else 0.0

    @property
    def _inner(self) -> int:
        return self.model.config.text_config.intermediate_size

    @property
    def _seen_width(self) -> int:
        return self.model.config.vision_config.hidden_size

    def _residual_size(self) -> int:
        """Bytes of a number between layers: trained embeddings and queries are float32."""
        parts = (self.language_model.embed_tokens, self.model.model.query_tokens)
        return 4 if any(map(trains, parts)) else self.number


def _computed_again(checkpointing: str, part: Any) -> range:
    """Numbers of the layers that keep only their input; transformers counts from the first."""
    if checkpointing == "none" or not trains(part):
        return range(0)
    return range(0, len(part.layers), 1 if checkpointing == "full" else 2)
