"""InternVL-14B's losses: contrastive (ITC), matching (ITM) and caption generation (ITG).

ITC compares every image with every caption of the global batch. If that does not fit on a device
at once, gradient caching (Gao et al. 2021, arXiv:2101.06983) cuts the step: a first pass without
graph encodes the features of all micro-batches, one loss gives the gradient of each feature, and a
second pass backpropagates it, one micro-batch at a time. Both passes draw the same random numbers,
so loss and gradient equal those of one large batch. Recomputation and memory are limited:

- Visual tokens of a frozen tower are cached between the passes.
- The first pass encodes the second's first micro-batches last, and keeps their graph.
- The second pass backpropagates the features as far as the cross-attention keys and values before
  the other terms run: two graphs of QLLaMA never exist together. The rest runs once, for all terms.

Shapes: B pairs of a micro-batch, n pairs of this rank, N of all ranks, F features of a pair (its
caption's first, then one for each branch of its image), E embedding width, Q queries, L caption
length, D hidden size, T visual tokens of width W.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl import dist
from internvl.config import DataConfig, PairsConfig, Stage2Config
from internvl.data.images import STATISTICS
from internvl.data.pair_reader import PairReader, make_batch, padded_length
from internvl.data.pairs import CaptionEncoder
from internvl.data.records import IGNORE, Match, Pair, PairBatch
from internvl.data.sources import Source
from internvl.models.dual.qllama import CrossKV
from internvl.models.vision import normalize_tiles
from internvl.objectives.passes import discard_saved_tensors, rng_state, seeded
from internvl.objectives.stateless import Stateless

_SHOWN_SAMPLES = 3


@dataclass(frozen=True)
class EncodedBatch:
    """Features of a micro-batch, with their graph."""

    cross_kv: CrossKV
    features: Tensor
    """float32 (B, F, E)"""
    kv_gradients: list[Tensor | None] | None
    """Gradient of each tensor of `cross_kv`, filled by the backward pass of the features, whose
    graph ends there; None if that graph includes the vision tower."""


@dataclass(frozen=True)
class CachedBatch:
    """State of a micro-batch between the two passes."""

    seed: int | None
    """Random seed of both passes; None if the graph of the first pass is kept."""
    loss: Tensor
    """Contrastive loss, float32 (), summed over its pairs."""
    gradient: Tensor
    """Gradient of the step's loss with respect to its features, (B, F, E)."""
    scale_gradient: Tensor
    """Gradient with respect to the logit scale: the first micro-batch has all of it."""
    vision: Tensor | None
    """Visual tokens, (B, T, W), if the second pass would compute the same ones."""
    encoded: EncodedBatch | None
    """Features with their graph, of micro-batches that are not encoded twice."""


class RetrievalObjective(Stateless):
    """Fine-tuning with `itc`, averaged over pairs, and `itm`, over twice as many matches.

    ITC has both branches (InternVL-C and -G); all captions of an image are right answers. ITM
    classifies every image with its caption and with another image's.

    Original: `forward` of `internvl_stage2_retrieval/modeling_internvl.py`.
    """

    def __init__(self, config: PairsConfig, data: DataConfig, encoder: CaptionEncoder) -> None:
        self.config = config
        self.data = data
        self.encoder = encoder
        self.weights = config.term_weights
        self._cached: deque[CachedBatch] = deque()

    def reader(self, files: Sequence[Source], seed: int) -> PairReader:
        """See `Objective.reader`."""
        written = "itg" in self.weights
        return PairReader(files, self.encoder, self.data.tiling.size, seed=seed, written=written)

    def describe(self, batches: Sequence[PairBatch]) -> str:
        """See `Objective.describe`."""
        pairs = sum(batch.num_samples for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        lines = [f"{pairs} pairs in {len(batches)} micro-batch(es), {tokens:,} tokens"]
        decode = partial(self.encoder.tokenizer.decode, skip_special_tokens=True)
        for batch in batches[:1]:
            # Not strict: retrieval has two matches per pair, and the first B are one per image.
            shown = zip(
                batch.names, batch.text_ids, batch.match_ids, batch.match_labels, strict=False
            )
            for name, text, match, label in islice(shown, _SHOWN_SAMPLES):
                prefix = {0: "not ", 1: ""}.get(int(label), "uncounted: ")
                texts = decode(text[text > 0]), decode(match[match > 0])
                lines.append(f"{name}\n{texts[0]}\n{prefix}{texts[1]}")
        return "\n".join(lines)

    def warmup_batches(self, lengths: Sequence[int]) -> list[PairBatch]:
        """Returns none: compiled blocks take any length."""
        return []

    def empty_batch(self, lengths: Sequence[int]) -> PairBatch:
        """See `Objective.empty_batch`; its image is black and its caption empty."""
        side = self.data.tiling.size
        ids = tuple(self.encoder.matching(""))
        pixels = torch.zeros(3, side, side, dtype=torch.uint8)
        pair = Pair("", pixels, 0, ids, ids, ids, ids, num_given=len(ids))
        batch = make_batch([pair], [self.matches(pair, 0, 1)], [False])
        # Without an id it has no features among which other ranks would compare theirs.
        return replace(
            batch,
            image_ids=batch.image_ids[:0],
            text_counts=batch.text_counts[:0],
            match_labels=torch.full_like(batch.match_labels, IGNORE),
            names=(),
        )

    def batches(self, units: Sequence[Pair]) -> list[PairBatch]:
        """Makes micro-batches of pairs with captions of similar length, the longest first."""
        size = self.config.micro_batch or max(1, len(units))
        # Before sorting: which match a pair gets may depend on its position in the step.
        shown = [(pair, self.matches(pair, i, len(units))) for i, pair in enumerate(units)]
        # Sorted because padding is computed as well; the gradient is the same in any order.
        if size < len(units):
            shown.sort(key=lambda pair_matches: _padded_lengths(*pair_matches), reverse=True)
        groups = [shown[i : i + size] for i in range(0, len(shown), size)]
        return [
            make_batch(pairs, matches, [self.is_compared(pair) for pair in pairs])
            for pairs, matches in (zip(*group, strict=True) for group in groups)
        ]

    def matches(self, pair: Pair, index: int, total: int) -> tuple[Match, ...]:
        """Returns the captions that an image is matched with.

        Args:
            index: of the pair among the `total` pairs of this rank's step.
        """
        return (pair.negative, 0), (pair.positive, 1)  # the original's order of blocks

    def is_compared(self, pair: Pair) -> bool:
        """True if the pair's caption takes part in ITC."""
        return True

    def counts(self, batch: PairBatch) -> dict[str, float]:
        """See `Objective.counts`."""
        counts = {
            "itc": float(batch.text_counts.sum()),
            "itm": float((batch.match_labels != IGNORE).sum()),
            "itg": float(len(batch.targets)),
        }
        return {name: counts[name] for name in self.weights}

    def begin_step(
        self, model: Any, batches: Iterator[PairBatch], counts: Mapping[str, float]
    ) -> None:
        """Runs the first pass of gradient caching, if any rank has several micro-batches."""
        # A step that broke off has left some.
        self._cached.clear()
        num_graphs = self.config.kept_micro_batches
        first = list(islice(batches, max(2, num_graphs)))
        # All ranks decide alike, also one with fewer micro-batches: the loss below is collective.
        if "itc" not in self.weights or set(dist.gather_objects(len(first))) == {1}:
            return
        visions, features, image_ids, text_counts = [], [], [], []
        seeds: list[int | None] = []
        free_bytes = model.kept_bytes
        # The first micro-batches come last: the second pass begins with them, on kept graphs.
        for batch in chain(first[num_graphs:], batches):
            device = batch.pixel_values.device
            seeds.append(int(torch.randint(2**62, ())))
            with discard_saved_tensors(), seeded(seeds[-1], device):
                before = rng_state(device)
                vision = model.vision_tokens(self._normalized(batch))
                # A tower that drew (stochastic depth) runs again: what follows it must draw alike.
                same = not vision.requires_grad and torch.equal(before, rng_state(device))
                keep = same and vision.nbytes <= free_bytes
                if model.tower_is_cut:
                    keep = all(dist.gather_objects(keep))
                free_bytes -= vision.nbytes if keep else 0
                visions.append(vision if keep else None)
                features.append(self._compared(model, model.encode_kv(vision), batch).detach())
            image_ids.append(batch.image_ids)
            text_counts.append(batch.text_counts)
        graphs = [self._encode(model, batch, None) for batch in first[:num_graphs]]
        # In front again: from here on, in the order in which the second pass asks for them.
        features[:0] = [encoded.features.detach() for encoded in graphs]
        image_ids[:0] = [batch.image_ids for batch in first[:num_graphs]]
        text_counts[:0] = [batch.text_counts for batch in first[:num_graphs]]
        if not features:  # only bad samples on this rank; the others wait for its (no) features
            features = [self._empty_features(model)]
            image_ids = [features[0].new_zeros(0, dtype=torch.long)]
            text_counts = [features[0].new_zeros(0)]
        leaves = torch.cat(features).requires_grad_()
        scale = model.logit_scale.detach().float().requires_grad_()
        losses = self._losses(leaves, torch.cat(image_ids), scale) * torch.cat(text_counts)
        # Weighted and averaged here: the sum that `__call__` returns has no gradient.
        weight = self.weights["itc"] / counts["itc"]
        gradient, scale_gradient = torch.autograd.grad(weight * losses.sum(), [leaves, scale])
        sizes = [len(batch_features) for batch_features in features]
        states = chain(
            ((None, None, encoded) for encoded in graphs), zip(seeds, visions, repeat(None))
        )
        # Not strict: a rank without samples has a size, 0, but no micro-batch.
        for (seed, vision, encoded), loss, batch_gradient in zip(
            states, losses.detach().split(sizes), gradient.split(sizes), strict=False
        ):
            cached = CachedBatch(seed, loss.sum(), batch_gradient, scale_gradient, vision, encoded)
            self._cached.append(cached)
            scale_gradient = torch.zeros_like(scale_gradient)

    def __call__(self, model: Any, batch: PairBatch) -> dict[str, Tensor]:
        """Returns the sum of each term, float32 ().

        After a first pass, `itc` has no gradient: this call backpropagates the features.
        """
        cached = self._cached.popleft() if self._cached else None
        seed = None if cached is None else cached.seed
        with seeded(seed, batch.pixel_values.device):
            if cached is None:
                kv = model.encode_kv(model.vision_tokens(self._normalized(batch)))
                sums = {"itc": self._itc_loss(model, kv, batch)} if "itc" in self.weights else {}
            else:
                kv, sums = self._backward_features(model, batch, cached), {"itc": cached.loss}
            terms = {"itm": self._itm_loss, "itg": self._itg_loss}
            sums |= {n: terms[n](model, kv, batch) for n in self.weights if n in terms}
        return sums

    def _encode(self, model: Any, batch: PairBatch, vision: Tensor | None) -> EncodedBatch:
        """Encodes a micro-batch with a graph, from cached visual tokens (B, T, W) if not None."""
        if vision is None:
            vision = model.vision_tokens(self._normalized(batch))
        cross_kv = model.encode_kv(vision)
        # ITC alone: nothing else uses keys and values, so one graph reaches to the tower.
        if len(self.weights) == 1:
            return EncodedBatch(cross_kv, self._compared(model, cross_kv, batch), None)
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in cross_kv.tensors()]
        gradients: list[Tensor | None] = [None] * len(leaves)
        stored = (_StoreGradient.apply(leaf, gradients, i) for i, leaf in enumerate(leaves))
        features = self._compared(model, cross_kv.with_tensors(stored), batch)
        return EncodedBatch(cross_kv, features, gradients)

    def _backward_features(self, model: Any, batch: PairBatch, cached: CachedBatch) -> CrossKV:
        """Backpropagates the cached gradient of the features and of the logit scale.

        Returns:
            Keys and values for the other terms; their backward adds the features' gradient.
        """
        encoded = cached.encoded or self._encode(model, batch, cached.vision)
        # torch advises against autocast around a backward pass, and the caller's is still on.
        with torch.autocast(encoded.features.device.type, enabled=False):
            if encoded.features.requires_grad:
                encoded.features.backward(cached.gradient)
            if model.logit_scale.requires_grad:
                model.logit_scale.float().backward(cached.scale_gradient)
        if encoded.kv_gradients is None:
            return encoded.cross_kv
        tensors = _AddGradients.apply(encoded.kv_gradients, *encoded.cross_kv.tensors())
        return encoded.cross_kv.with_tensors(tensors)

    def _compared(self, model: Any, cross_kv: CrossKV, batch: PairBatch) -> Tensor:
        """Returns the features (n, F, E) that are compared: none of an empty batch."""
        return self.features(model, cross_kv, batch)[: len(batch.image_ids)]

    def features(self, model: Any, cross_kv: CrossKV, batch: PairBatch) -> Tensor:
        """Returns features of captions, queries and images, float32 (B, F, E) of unit length."""
        queries, captions = self._unimodal_states(model, cross_kv, batch)
        embeddings = (
            model.text_embeds(captions, batch.text_mask),
            model.query_embeds(queries),
            model.image_embeds(cross_kv.tokens),
        )
        # float32: similarities differ in digits that bfloat16 does not have.
        return F.normalize(torch.stack([e.float() for e in embeddings], dim=1), dim=-1)

    def _unimodal_states(
        self, model: Any, cross_kv: CrossKV, batch: PairBatch
    ) -> tuple[Tensor, Tensor]:
        """Returns query states (B, Q, D) and caption states (B, L, D), each without the other."""
        # One joint pass instead of two: short captions alone are bound by kernel launches.
        mask = model.joint_mask("itc", batch.text_mask)
        return model.joint_states(cross_kv, batch.text_ids, mask)

    def _empty_features(self, model: Any) -> Tensor:
        return torch.zeros(0, 3, model.config.embed_dim, device=model.device)

    def targets(self, image_ids: Tensor) -> Tensor:
        """Returns target probabilities (n, N): equal shares for all pairs of the same image."""
        same = image_ids[:, None] == dist.gather_rows(image_ids)
        return same / same.sum(1, keepdim=True)

    def _itc_loss(self, model: Any, cross_kv: CrossKV, batch: PairBatch) -> Tensor:
        features, scale = self._compared(model, cross_kv, batch), model.logit_scale.float()
        return (self._losses(features, batch.image_ids, scale) * batch.text_counts).sum()

    def _losses(self, features: Tensor, image_ids: Tensor, scale: Tensor) -> Tensor:
        """Contrastive loss of each pair of this rank (n,) among all pairs; collective."""
        # Logits in float32: bfloat16 would round cosines that are scaled by up to 100.
        with torch.autocast(features.device.type, enabled=False):
            targets = self.targets(image_ids)
            return contrastive_losses(features, dist.gather_rows(features), targets, scale)

    def _itm_loss(self, model: Any, cross_kv: CrossKV, batch: PairBatch) -> Tensor:
        mask = model.joint_mask("itm", batch.match_mask)
        queries, _ = model.joint_states(cross_kv, batch.match_ids, mask)
        logits = model.itm_logits(queries).float()
        labels = batch.match_labels
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")

    def _itg_loss(self, model: Any, cross_kv: CrossKV, batch: PairBatch) -> Tensor:
        mask = model.joint_mask("itg", batch.written_mask)
        _, states = model.joint_states(cross_kv, batch.written_ids, mask)
        states = states.flatten(0, 1).index_select(0, batch.loss_positions)
        return model.caption_loss(states, batch.targets)

    def _normalized(self, batch: PairBatch) -> Tensor:
        statistics = STATISTICS[self.data.statistics]
        return normalize_tiles(batch.pixel_values, torch.float32, *statistics)


class _StoreGradient(torch.autograd.Function):
    """Identity of a leaf whose backward stores the gradient in `gradients[index]`."""

    # `leaf.grad` would not do: autograd copies it into the leaf's own order of dimensions.
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, gradients: list[Tensor | None], index: int) -> Tensor:
        ctx.gradients, ctx.index = gradients, index
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.gradients[ctx.index] = gradients[0]
        return None, None, None


class _AddGradients(torch.autograd.Function):
    """Identity of tensors whose backward adds `gradients`, which an earlier backward stored."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        # None for tensors that no term uses, instead of zeros of their size.
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        outputs = tuple(tensor.view_as(tensor) for tensor in tensors)
        ctx.mark_non_differentiable(
            *(new for new, old in zip(outputs, tensors, strict=True) if not old.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(gradients, ctx.gradients, strict=True)
        # In place: nothing else uses the stored gradients.
        return None, *(b if a is None else a if b is None else b.add_(a) for a, b in pairs)


def _padded_lengths(pair: Pair, matches: Sequence[Match]) -> tuple[int, int]:
    """Padded length, in tokens, of a pair's captions: joint with the image, and for ITC."""
    joint = max(len(pair.written), *(len(text) for text, _ in matches))
    return padded_length(joint), padded_length(len(pair.summary))


class Stage2(RetrievalObjective):
    """Pre-training with `itc`, `itm` (both averaged over pairs) and `itg` (over caption tokens).

    ITC compares queries and captions; only an image's own caption is right. ITM classifies the
    first half of a step's images with another image's caption, the second half with their own. A
    pair with an empty caption takes part in neither.

    Original: `forward` of `internvl_stage2/modeling_internvl.py`.
    """

    config: Stage2Config

    def matches(self, pair: Pair, index: int, total: int) -> tuple[Match, ...]:
        """Returns one caption: another image's in the first half of the step, else its own."""
        is_positive = index >= total - total // 2
        caption = pair.positive if is_positive else pair.negative
        # The length of an empty caption: begin and end of sequence are always there.
        empty = len(caption) <= len(self.encoder.matching(""))
        return ((caption, IGNORE if empty else int(is_positive)),)

    def is_compared(self, pair: Pair) -> bool:
        """False for an empty caption."""
        return len(pair.summary) > len(self.encoder.embedding(""))

    def features(self, model: Any, cross_kv: CrossKV, batch: PairBatch) -> Tensor:
        """Returns features of captions and queries, float32 (B, F, E) of unit length."""
        queries, captions = self._unimodal_states(model, cross_kv, batch)
        embeddings = (
            model.text_embeds(captions, batch.text_mask),
            model.query_embeds(queries),
        )
        return F.normalize(torch.stack([e.float() for e in embeddings], dim=1), dim=-1)

    def _empty_features(self, model: Any) -> Tensor:
        return torch.zeros(0, 2, model.config.embed_dim, device=model.device)

    def targets(self, image_ids: Tensor) -> Tensor:
        """Returns target probabilities (n, N): the pair itself, with label smoothing."""
        pair_ids = torch.arange(len(image_ids), device=image_ids.device)
        # Unique over ranks, which may have different numbers of pairs.
        pair_ids = pair_ids + (dist.rank() << 32)
        same = (pair_ids[:, None] == dist.gather_rows(pair_ids)).float()
        smoothing = self.config.label_smoothing
        return (1 - smoothing) * same + smoothing / same.shape[1]


def contrastive_losses(local: Tensor, gathered: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Returns the contrastive loss of each pair, float32 (n,), summed over the image branches.

    Of each branch: half of the cross-entropy from images to captions and half of the reverse.

    Args:
        local: this rank's features, unit length, (n, F, E), the captions' first.
        gathered: features of all ranks, (N, F, E).
        targets: target probabilities, (n, N); rows sum to one.
        scale: (), logarithm of the factor of cosines (of the inverse temperature).
    """
    (caption, *images), (captions, *all_images) = local.unbind(1), gathered.unbind(1)
    return sum(
        (
            0.5 * (_soft_cross_entropy(scale, image, captions, targets))
            + 0.5 * (_soft_cross_entropy(scale, caption, branch_images, targets))
            for image, branch_images in zip(images, all_images, strict=True)
        ),
        start=local.new_zeros(len(local)),
    )


def _soft_cross_entropy(
    scale: Tensor, queries: Tensor, candidates: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy (n,) of queries (n, E) among candidates (N, E) with targets (n, N)."""
    # Not F.cross_entropy: several captions of an image share the target.
    return -(targets * (scale.exp() * queries @ candidates.T).log_softmax(-1)).sum(-1)
