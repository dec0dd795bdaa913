"""Bytes that a micro-batch of InternVL-14B's pairs saves for its backward pass.

QLLaMA runs once for each form of sequence: for the features, for every match, for what is written.
Of a step in micro-batches, the features' graph of one is gone before its other terms are computed;
those that keep theirs from the first pass of gradient caching hold tower and features until they
are next. Only what a gradient passes through is saved: with frozen towers, the inputs of the heads.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from internvl.config import ComputeConfig, Recipe
from internvl.plan import flops
from internvl.plan.activations import BLOCK_BACK, BLOCK_FORWARD, LOGITS, Activations
from internvl.plan.load import Load, forms
from internvl.plan.work import Sequences, Work

# Keys are (trains, compiled). What a cross-attention saves of a form, as multiples of (positions of
# queries, all positions) times the width: in the compute dtype, and in float32.
SAVED_BY_CROSS_ATTENTION = {
    (True, True): ((4, 0), (0, 1)),
    (False, True): ((2, 1), (0, 0)),
    (True, False): ((4, 0), (1, 1)),
    (False, False): ((2, 0), (1, 0)),
}
# What it saves of the images once, as multiples of visual tokens times the tower's width. Their
# keys and values come on top: every form reads them, so recomputing a form does not drop them.
SAVED_BY_IMAGES = {
    (True, True): (1, 0),
    (False, True): (0, 0),
    (True, False): (2, 1),
    (False, False): (0, 1),
}


def unreached(recipe: Recipe) -> tuple[str, ...]:
    """Prefixes of the names of InternVL-14B's weights that no term of the loss reaches: they take
    no gradient and no optimizer states, whether they train or not."""
    if recipe.objective.rows_are_packed:
        return ()
    terms = recipe.objective.term_weights
    reached = {
        "itc": ("text_projection.", "query_pool.", "logit_scale"),
        "itm": ("itm_head.",),
        "itg": ("lm_head.",),
    }
    prefixes = [name for term, names in reached.items() if term not in terms for name in names]
    # Stage 2 contrasts the query branch alone.
    if recipe.objective.name != "retrieval" or "itc" not in terms:
        prefixes.append("image_pool.")
    return tuple(prefixes)


class DualActivations(Activations):
    """Bytes that a micro-batch of InternVL-14B's pairs saves."""

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        batch: Work,
        micro_batches: int = 1,
        *,
        sharded: bool = False,
    ) -> None:
        super().__init__(model, recipe, batch, sharded=sharded)
        self.micro_batches = micro_batches
        self.width = self.text.hidden_size
        self.terms = recipe.objective.term_weights
        self.num_caching = min(micro_batches, recipe.pairs.kept_micro_batches)
        """Micro-batches that keep the graph of their features from the first pass."""
        self.cut = micro_batches > 1 and batch.texts.count > 0
        queries = model.num_queries
        self.sequences = {
            name: Sequences(form.count, form.count * (queries + form.length))
            for name, form in forms(batch)
        }
        """What QLLaMA reads in each form, its queries included."""
        # Autograd saves nothing of forms that no gradient passes through.
        self.tracked = self.sequences if flops.trains(model.model) else {}
        self.visual_bytes = float(self.dtype_bytes * self.tower_tokens * self.vision.hidden_size)
        """Bytes of the tower's output for the micro-batch's images."""

    def before(self) -> dict[str, float]:
        """See `Activations`."""
        return {}

    def until_language(self) -> dict[str, float]:
        """See `Activations`."""
        # Offloaded, all of the tower waits in the CPU's memory.
        tower = 0.0 if self.compute.offload else self.waiting_tower()
        return {
            **self._of_tower(tower),
            "QLLaMA activations": self.language(),
            "what the heads keep": self.heads(),
            # Similarities of both branches with their gradients, in float32.
            "features of a step, compared": 48.0 * self.recipe.batch_samples**2,
        }

    def passing(self) -> dict[str, float]:
        """See `Activations`."""
        return {
            BLOCK_BACK: self.backward(),
            BLOCK_FORWARD: self.forward(),
            LOGITS: self.written_logits(),
        }

    def in_tower(self) -> dict[str, float]:
        """See `Activations`."""
        if not self.tower_trains:
            return {}
        # Offloaded, one block is back.
        return self._of_tower(self.tower_block() if self.compute.offload else self.tower())

    def _of_tower(self, tower: float) -> dict[str, float]:
        """Returns what is there as long as the tower's activations are."""
        # The others run the tower once and keep its output.
        later = self.micro_batches - self.num_caching
        graphs = (self.num_caching - 1) * self.cached_graph() if self.cut else 0.0
        return {
            "images and visual tokens": self.images(),
            "cast copies of trained weights": self.all_casts(),
            "vision tower activations": tower,
            "graphs kept for the second pass": graphs,
            "visual tokens kept for the second pass": self.cached_visual(later),
        }

    def block(self) -> float:
        """See `Activations`; of the form that holds least."""
        forms = self.tracked.values()
        return min((self.layer(form, self.layers[0]) for form in forms), default=0.0)

    def stored(self, load: Load) -> float:
        """See `Activations`; of QLLaMA and the tower."""
        compute = replace(self.compute, checkpointing="none")
        return self._changed(compute).waiting(load)

    def waiting(self, load: Load) -> float:
        """See `Activations`; of QLLaMA and the tower."""
        here = self._changed(replace(self.compute, offload=False))
        language = here.cross_images() + here._language([*here.tracked.values()])
        return (language + here.tower()) * load.micro_batches

    def _changed(self, compute: ComputeConfig) -> "DualActivations":
        recipe = replace(self.recipe, compute=compute)
        return DualActivations(
            self.model, recipe, self.batch, self.micro_batches, sharded=self.sharded
        )

    def frozen_states(self, load: Load, tower_passes: float, language_passes: float) -> float:
        """See `Activations`."""
        tower = 0.0 if self.tower_trains else self.visual_bytes * len(self.tower_layers)
        tokens = 0 if self.tracked else sum(s.tokens for s in self.sequences.values())
        language = float(self.dtype_bytes * tokens * self.width * len(self.layers))
        return (tower_passes * tower + language_passes * language) * load.micro_batches

    def cached_visual_share(self, micro_batches: int) -> float:
        """See `Activations`."""
        return self.cached_visual(micro_batches) / (self.visual_bytes * max(1, micro_batches))

    def cached_visual(self, micro_batches: int) -> float:
        """Bytes of visual tokens that gradient caching keeps of `micro_batches`."""
        # A tower that trains, or drops blocks at random, does not compute the same again.
        if "itc" not in self.terms or self.tower_trains or self.recipe.model.drop_path:
            return 0.0
        return self.visual_bytes * min(micro_batches, self.model.kept_bytes // self.visual_bytes)

    def cached_graph(self) -> float:
        """Bytes that a micro-batch holds while its features keep their graph."""
        if self.compute.offload:
            return 0.0
        texts = self._compared()
        blocks = self.tower() + self.casts(len(texts))
        return self.images() + blocks + self.cross_images() + self._language(texts)

    def images(self) -> float:
        """Bytes of pixels and visual tokens, with the gradient of these if the tower trains."""
        pixels = 6.0 * self.batch.samples * 3 * self.model.config.image_size**2
        return pixels + (2 if self.tower_trains else 1) * self.visual_bytes

    def all_casts(self) -> float:
        """Bytes of trained matrices cast to the compute dtype, those of the heads included."""
        if self.dtype_bytes == 4 or self.sharded:
            return 0.0
        idle = ("model.", *unreached(self.recipe))
        heads = sum(
            p.numel()
            for name, p in self.model.named_parameters()
            if p.requires_grad and p.ndim > 1 and not name.startswith(idle)
        )
        return self.casts(len(self.tracked)) + float(
            self.dtype_bytes * (heads - self._fewer_casts())
        )

    def _fewer_casts(self) -> float:
        """Values that `casts` counts too often: keys and values of the images are projected once,
        outside of what is recomputed, not once for each form."""
        share = 1 - len(self._recomputed()) / len(self.layers)
        uses = len(self.tracked) if self.compiled else 1
        return sum(
            p.numel() * (uses * share - 1)
            for name, p in self.layers.named_parameters()
            if ".cross_attn." in name and (".k_" in name or ".v_" in name) and p.requires_grad
        )

    def freed(self) -> float:
        """See `Activations`."""
        if self.compute.offload or not self.tracked:
            return 0.0
        return max(0.0, self.language() - self.cross_images() - self.block())

    @property
    def waits(self) -> bool:
        """See `Activations`; those of the features, run back before the others, do not."""
        return len(self.tracked) > 1 and not self.cut

    def language(self) -> float:
        """Bytes that QLLaMA's layers save, and the hidden states around them."""
        if self.cut:
            return self.language_in_turn()
        forms = list(self.tracked.values())
        return self.cross_images() + max(self._language(forms), self._between(forms))

    def language_in_turn(self) -> float:
        """The same if the features' backward runs before the other terms are computed: its graph
        is gone, the gradients of the images' keys, values and visual tokens are there."""
        others = [s for name, s in self.tracked.items() if name != "texts"]
        gradients = self.cross_gradients() if others else 0.0
        later = max(self._language(others) + gradients, self._between(others))
        return self.cross_images() + max(self._language(self._compared()), later)

    def _between(self, forms: Sequence[Sequences]) -> float:
        """Bytes when the last of several forms, which runs back first, has: the gradients of all
        keys and values are there, which the other forms still read, and a layer's of the next form
        beside them."""
        if len(forms) < 2:
            return 0.0
        layers = sum(layer.cross_attn is not None for layer in self.layers)
        gradients = self.cross_gradients() + self.keys_and_values() / max(1, layers)
        return self._language(forms[:-1]) + gradients + self.waiting_gradients()

    def waiting_gradients(self) -> float:
        """Bytes of the layers' gradients between two forms: autograd sums what all forms add to a
        weight's before it hands the sum on, so that shards are sent after the last."""
        if not self.sharded and self.micro_batches == 1:
            return 0.0  # they become `.grad`, which is counted among the states
        size = self.dtype_bytes if self.sharded else 4
        # Keys and values are projected once for all forms.
        once = {
            parameter
            for layer in self.layers
            if layer.cross_attn is not None
            for module in layer.cross_attn.image_modules
            for parameter in module.parameters()
        }
        every = (p for p in self.layers.parameters() if p.requires_grad and p not in once)
        return float(size * sum(p.numel() for p in every))

    def cross_gradients(self) -> float:
        """Bytes of gradients of the images' keys, values and visual tokens."""
        if not self.cross_images():
            return 0.0
        return self.keys_and_values() + self.visual_bytes

    def _compared(self) -> list[Sequences]:
        """The form that features come from, if a gradient passes through it."""
        return [form for name, form in self.tracked.items() if name == "texts"]

    def _language(self, tracked: Sequence[Sequences]) -> float:
        total, recomputed = 0.0, 0.0
        # Trained embeddings and queries are float32, and so is what layers add to them.
        starts = (self.language_model.embed_tokens, self.model.model.query_tokens)
        residual_bytes = self.trained_bytes(any(map(flops.trains, starts)))
        for form in tracked:
            residual = form.tokens * self.width * residual_bytes
            states = form.tokens * self.width * (4 + self.dtype_bytes)
            total += 2 * residual + states + form.tokens * form.length
            for index, layer in enumerate(self.layers):
                again = index in self._recomputed()
                layer_bytes = self.layer(form, layer)
                recomputed = max(recomputed, layer_bytes if again else 0.0)
                if not self.compute.offload:
                    total += residual if again else layer_bytes
        if self.compute.offload:
            recomputed = max((self.layer(form, self.layers[0]) for form in tracked), default=0.0)
        return total + recomputed

    def cross_images(self) -> float:
        """Bytes of the images' keys and values, and of the inputs of their projections."""
        if not self.tracked:
            return 0.0
        return float(sum(self._layer_images(layer) for layer in self.layers))

    def _layer_images(self, layer: Any) -> float:
        if layer.cross_attn is None:
            return 0.0
        keys_and_values = 2 * self.dtype_bytes * self.tower_tokens * self.width
        if self.compute.offload:
            return keys_and_values
        narrow, wide = SAVED_BY_IMAGES[flops.trains(layer.cross_attn), self.compiled]
        source = self.tower_tokens * self.vision.hidden_size
        return keys_and_values + (self.dtype_bytes * narrow + 4 * wide) * source

    def layer(self, form: Sequences, layer: Any) -> float:
        """Bytes that a layer of QLLaMA saves of a form."""
        block = form.count * self.decoder_block(form.length)
        if layer.cross_attn is None:
            return block
        widths = (form.count * self.model.num_queries * self.width, form.tokens * self.width)
        narrow, wide = (
            sum(times * width for times, width in zip(multiples, widths, strict=True))
            for multiples in SAVED_BY_CROSS_ATTENTION[flops.trains(layer.cross_attn), self.compiled]
        )
        return block + float(self.dtype_bytes * narrow + 4 * wide)

    def heads(self) -> float:
        """Bytes that the pools and the matching head save: inputs, their norm, keys and values."""
        passed, read = flops.trains(self.model.model), 0.0
        idle = unreached(self.recipe)
        image, queries = self.model.image_pool, self.model.query_pool
        if "image_pool." not in idle and (flops.trains(image) or self.tower_trains):
            read += self.tower_tokens * self.vision.hidden_size
        states = self.batch.samples * self.model.num_queries * self.width
        if "query_pool." not in idle and (flops.trains(queries) or passed):
            read += states
        wide = 8 if self.dtype_bytes == 2 else 0  # autocast normalizes in float32
        matches = self.batch.matches.count / self.batch.samples
        matched = matches * states if passed or flops.trains(self.model.itm_head) else 0
        return float(read * (4 * self.dtype_bytes + wide) + matched * self.dtype_bytes)

    def backward(self) -> float:
        """Bytes of the gradients that exist together in the backward pass of a block's MLP."""
        sizes = [form.tokens * self.inner_width() for form in self.tracked.values()]
        if self.tower_trains:
            sizes.append(self.tower_tokens * self.vision.intermediate_size)
        return 3.0 * self.dtype_bytes * max(sizes, default=0)

    def forward(self) -> float:
        """Bytes that one block without gradient holds while it runs; of QLLaMA's also the images'
        keys and values for all of its blocks, which are computed before the first one runs."""
        if self.tracked:
            return self.frozen_tower()
        tokens = max((form.tokens for form in self.sequences.values()), default=0)
        each_token = 3.0 * self.dtype_bytes * self.inner_width() + 12.0 * self.width
        return max(self.frozen_tower(), each_token * tokens + self.keys_and_values())

    def keys_and_values(self) -> float:
        """Bytes of the images' keys and values for all blocks."""
        layers = sum(layer.cross_attn is not None for layer in self.layers)
        return 2.0 * self.dtype_bytes * self.tower_tokens * self.width * layers

    def written_logits(self) -> float:
        """Bytes of a chunk's logits of the captions that are written."""
        supervised = round(self.batch.supervised)
        return self.logits(supervised) if supervised else 0.0

    def _recomputed(self) -> range:
        """Indices of QLLaMA's layers that keep only their input."""
        if self.compute.checkpointing == "none" or not flops.trains(self.language_model):
            return range(0)
        # Counted from the first: of an odd number one more than half is recomputed.
        return range(0, len(self.layers), 1 if self.compute.checkpointing == "full" else 2)
