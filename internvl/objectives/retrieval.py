"""Images and captions of a step as each other's right and wrong answers: InternVL-14B's losses.

The contrastive term compares every image with every caption of the global batch. Where that does
not fit on a device at once, only features travel between micro-batches: a first pass without
gradient encodes them all, one loss over all features gives the gradient of each, and the second
pass carries it back, a micro-batch at a time (gradient caching, Gao et al. 2021, arXiv:2101.06983).
Both passes draw the same random numbers, so value and gradient are those of one large batch. What
a frozen tower saw in the first pass is kept for the second, and the micro-batches that come first
in the second come last in the first, for which they keep their graph. The features' gradient is
carried back as far as the images before the other terms are computed, so that never both graphs
of QLLaMA are there; the images' gradients of all terms go on together.

Shapes: B pairs of a micro-batch, n pairs of this rank, N of all ranks, F features of a pair (its
caption's first, then one for each branch of its image), E width of an embedding.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from internvl import dist
from internvl.compute import rng
from internvl.config import DataConfig, PairsConfig, Stage2Config
from internvl.data.images import STATISTICS
from internvl.data.pair_reader import PairReader, make_batch, padded_length
from internvl.data.pairs import CaptionEncoder
from internvl.data.records import IGNORE, Match, Pair, PairBatch
from internvl.data.sources import Source
from internvl.models.dual.qllama import CrossKV
from internvl.models.vision import normalize_tiles

_SHOWN_SAMPLES = 3


@dataclass(frozen=True)
class Cached:
    """What the first pass left of a micro-batch."""

    seed: int | None
    """Of the random numbers that both passes draw; None where there is nothing to draw again."""
    loss: Tensor
    """The contrastive sum over its pairs."""
    gradient: Tensor
    """Of the step's loss with respect to its features, (B, F, E)."""
    scale_gradient: Tensor
    """Of the same with respect to the logit scale; all of it is at the first micro-batch."""
    vision: Tensor | None
    """Visual tokens, (B, N, W), where the tower would see the same again."""
    kept: "Encoded | None"
    """With its graph, of micro-batches of which nothing is computed again."""


@dataclass(frozen=True)
class Encoded:
    """A micro-batch with its graph."""

    seen: CrossKV
    features: Tensor
    gradients: list[Tensor | None] | None
    """Of what is seen, once the features' graph has been run back by itself; None where it goes on
    below."""


class RetrievalObjective:
    """Fine-tuning: `itc`, contrastive, in both branches, with every caption of an image as a right
    answer, over pairs; `itm`, matching, over each pair with its caption and with another.

    Original: `forward` of `internvl_stage2_retrieval/modeling_internvl.py`.
    """

    def __init__(self, config: PairsConfig, data: DataConfig, encoder: CaptionEncoder) -> None:
        self.config = config
        self.data = data
        self.encoder = encoder
        self.weights = config.term_weights
        self._cached: deque[Cached] = deque()

    def reader(self, files: Sequence[Source], seed: int) -> PairReader:
        written = "itg" in self.weights
        return PairReader(files, self.encoder, self.data.tiling.size, seed=seed, written=written)

    def describe(self, batches: Sequence[PairBatch]) -> str:
        pairs = sum(batch.num_samples for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        lines = [f"{pairs} pairs in {len(batches)} micro-batch(es), {tokens:,} tokens"]
        read = partial(self.encoder.tokenizer.decode, skip_special_tokens=True)
        for batch in batches[:1]:
            shown = zip(
                batch.names, batch.text_ids, batch.match_ids, batch.match_labels, strict=False
            )
            for name, text, match, label in islice(shown, _SHOWN_SAMPLES):
                beside = {0: "not ", 1: ""}.get(int(label), "uncounted: ")
                lines.append(f"{name}\n{read(text[text > 0])}\n{beside}{read(match[match > 0])}")
        return "\n".join(lines)

    def warmup_batches(self, lengths: Sequence[int]) -> list[PairBatch]:
        """None: what is compiled takes any length."""
        return []

    def batches(self, units: Sequence[Pair]) -> list[PairBatch]:
        """Micro-batches of pairs whose captions are of about the same length, the longest first: a
        step has the same gradient in any order, and padding is computed as well."""
        size = self.config.micro_batch or max(1, len(units))
        shown = [(pair, self.matches(pair, i, len(units))) for i, pair in enumerate(units)]
        if size < len(units):
            shown.sort(key=lambda one: _lengths(*one), reverse=True)
        parts = [shown[i : i + size] for i in range(0, len(shown), size)]
        return [
            make_batch(pairs, matches, [self.is_compared(pair) for pair in pairs])
            for pairs, matches in (zip(*part, strict=True) for part in parts)
        ]

    def matches(self, pair: Pair, number: int, total: int) -> tuple[Match, ...]:
        """Captions that the image of pair `number` of `total` is shown with."""
        return (pair.negative, 0), (pair.positive, 1)

    def is_compared(self, pair: Pair) -> bool:
        """Whether its caption is embedded and compared."""
        return True

    def counts(self, batch: PairBatch) -> dict[str, float]:
        found = {
            "itc": float(batch.text_counts.sum()),
            "itm": float((batch.match_labels != IGNORE).sum()),
            "itg": float(len(batch.targets)),
        }
        return {name: found[name] for name in self.weights}

    def begin_step(
        self, model: Any, batches: Iterator[PairBatch], counts: Mapping[str, float]
    ) -> None:
        """The first pass; none where every rank has a single micro-batch."""
        self._cached.clear()
        number = self.config.kept_micro_batches
        first = list(islice(batches, max(2, number)))
        if "itc" not in self.weights or set(dist.gather_objects(len(first))) == {1}:
            return
        visions, encoded, image_ids, counted = [], [], [], []
        seeds: list[int | None] = []
        room = model.kept_bytes
        # The first come last: they are the next to be trained on, and their graphs are kept for it.
        for pairs in chain(first[number:], batches):
            device = pairs.pixel_values.device
            seeds.append(int(torch.randint(2**62, ())))
            with _nothing_kept(), _random_numbers(seeds[-1], device):
                before = _random_state(device)
                vision = model.vision_tokens(self._normalized(pairs))
                same = not vision.requires_grad and torch.equal(before, _random_state(device))
                keep = same and vision.nbytes <= room
                room -= vision.nbytes if keep else 0
                visions.append(vision if keep else None)
                encoded.append(self.features(model, model.encode_kv(vision), pairs).detach())
            image_ids.append(pairs.image_ids)
            counted.append(pairs.text_counts)
        kept = [self._encoded(model, pairs, None) for pairs in first[:number]]
        encoded[:0] = [one.features.detach() for one in kept]
        image_ids[:0] = [pairs.image_ids for pairs in first[:number]]
        counted[:0] = [pairs.text_counts for pairs in first[:number]]
        if not encoded:  # only bad samples on this rank; the others wait for its (no) features
            encoded = [self._no_features(model)]
            image_ids = [encoded[0].new_zeros(0, dtype=torch.long)]
            counted = [encoded[0].new_zeros(0)]
        own = torch.cat(encoded).requires_grad_()
        scale = model.logit_scale.detach().float().requires_grad_()
        losses = self._losses(own, torch.cat(image_ids), scale) * torch.cat(counted)
        weight = self.weights["itc"] / counts["itc"]
        gradient, scale_gradient = torch.autograd.grad(weight * losses.sum(), [own, scale])
        sizes = [len(part) for part in encoded]
        left = chain(((None, None, one) for one in kept), zip(seeds, visions, repeat(None)))
        for (seed, vision, one), loss, part in zip(
            left, losses.detach().split(sizes), gradient.split(sizes), strict=False
        ):
            self._cached.append(Cached(seed, loss.sum(), part, scale_gradient, vision, one))
            scale_gradient = torch.zeros_like(scale_gradient)

    def __call__(self, model: Any, batch: PairBatch) -> dict[str, Tensor]:
        """The terms' sums. After a first pass that of `itc` has no gradient: it is carried back
        here, as far as the images if other terms go on from them."""
        cached = self._cached.popleft() if self._cached else None
        seed = None if cached is None else cached.seed
        with _random_numbers(seed, batch.pixel_values.device):
            if cached is None:
                seen = model.encode_kv(model.vision_tokens(self._normalized(batch)))
                sums = {"itc": self._contrast(model, seen, batch)} if "itc" in self.weights else {}
            else:
                seen, sums = self._carry(model, batch, cached), {"itc": cached.loss}
            terms = {"itm": self._match, "itg": self._write}
            sums |= {n: terms[n](model, seen, batch) for n in self.weights if n in terms}
        return sums

    def _encoded(self, model: Any, pairs: PairBatch, vision: Tensor | None) -> Encoded:
        """With a graph; `vision` where it is known."""
        if vision is None:
            vision = model.vision_tokens(self._normalized(pairs))
        seen = model.encode_kv(vision)
        if len(self.weights) == 1:
            return Encoded(seen, self.features(model, seen, pairs), None)
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in seen.tensors()]
        gradients: list[Tensor | None] = [None] * len(leaves)
        begin = (_Begin.apply(leaf, gradients, place) for place, leaf in enumerate(leaves))
        return Encoded(seen, self.features(model, seen.with_tensors(begin), pairs), gradients)

    def _carry(self, model: Any, batch: PairBatch, cached: Cached) -> CrossKV:
        """Carries the gradient of the features back; returns what other terms look at."""
        one = cached.kept or self._encoded(model, batch, cached.vision)
        with torch.autocast(one.features.device.type, enabled=False):
            if one.features.requires_grad:
                one.features.backward(cached.gradient)
            if model.logit_scale.requires_grad:
                model.logit_scale.float().backward(cached.scale_gradient)
        if one.gradients is None:
            return one.seen
        return one.seen.with_tensors(_Joined.apply(one.gradients, *one.seen.tensors()))

    def features(self, model: Any, seen: CrossKV, batch: PairBatch) -> Tensor:
        """float32 (B, F, E) of unit length: captions, what the queries see, images."""
        queries, captions = self._apart(model, seen, batch)
        found = (
            model.text_embeds(captions, batch.text_mask),
            model.query_embeds(queries),
            model.image_embeds(seen.tokens),
        )
        return F.normalize(torch.stack([embeds.float() for embeds in found], dim=1), dim=-1)

    def _apart(self, model: Any, seen: CrossKV, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """What queries and captions are without each other, in one pass: (B, Q, D), (B, L, D)."""
        mask = model.joint_mask("itc", batch.text_mask)
        return model.joint_states(seen, batch.text_ids, mask)

    def _no_features(self, model: Any) -> Tensor:
        return torch.zeros(0, 3, model.config.embed_dim, device=model.device)

    def targets(self, image_ids: Tensor) -> Tensor:
        """Share of each of N pairs in being the right answer: (n, N), rows sum to one."""
        same = image_ids[:, None] == dist.gather_rows(image_ids)
        return same / same.sum(1, keepdim=True)

    def _contrast(self, model: Any, seen: CrossKV, batch: PairBatch) -> Tensor:
        features, scale = self.features(model, seen, batch), model.logit_scale.float()
        return (self._losses(features, batch.image_ids, scale) * batch.text_counts).sum()

    def _losses(self, own: Tensor, image_ids: Tensor, scale: Tensor) -> Tensor:
        """Contrastive loss of each pair of this rank (n,) among all pairs; collective."""
        with torch.autocast(own.device.type, enabled=False):
            targets = self.targets(image_ids)
            return contrastive_losses(own, dist.gather_rows(own), targets, scale)

    def _match(self, model: Any, seen: CrossKV, batch: PairBatch) -> Tensor:
        mask = model.joint_mask("itm", batch.match_mask)
        queries, _ = model.joint_states(seen, batch.match_ids, mask)
        logits = model.itm_logits(queries).float()
        labels = batch.match_labels
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")

    def _write(self, model: Any, seen: CrossKV, batch: PairBatch) -> Tensor:
        mask = model.joint_mask("itg", batch.written_mask)
        _, states = model.joint_states(seen, batch.written_ids, mask)
        states = states.flatten(0, 1).index_select(0, batch.loss_positions)
        loss = states.new_zeros((), dtype=torch.float32)
        chunk = model.loss_chunk
        for part, targets in zip(states.split(chunk), batch.targets.split(chunk), strict=True):
            loss = loss + checkpoint(_token_loss, model, part, targets, use_reentrant=False)
        return loss

    def _normalized(self, batch: PairBatch) -> Tensor:
        statistics = STATISTICS[self.data.statistics]
        return normalize_tiles(batch.pixel_values, torch.float32, *statistics)


class _Begin(torch.autograd.Function):
    """A leaf as it is, whose gradient goes to a place in a list: the leaf itself would copy it into
    its own order of dimensions."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, gradients: list[Tensor | None], place: int) -> Tensor:
        ctx.gradients, ctx.place = gradients, place
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, *own: Tensor) -> tuple[None, ...]:
        ctx.gradients[ctx.place] = own[0]
        return None, None, None


class _Joined(torch.autograd.Function):
    """Tensors as they are, of which other uses have had their gradients already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        outputs = tuple(tensor.view_as(tensor) for tensor in tensors)
        ctx.mark_non_differentiable(
            *(new for new, old in zip(outputs, tensors, strict=True) if not old.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *own: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(own, ctx.gradients, strict=True)
        return None, *(b if a is None else a if b is None else b.add_(a) for a, b in pairs)


def _lengths(pair: Pair, matches: Sequence[Match]) -> tuple[int, int]:
    """What a pair's captions are padded to at least: those with the image, and those alone."""
    beside = max(len(pair.written), *(len(text) for text, _ in matches))
    return padded_length(beside), padded_length(len(pair.summary))


def _token_loss(model: Any, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.lm_head(states).float(), targets, reduction="sum")


class Stage2(RetrievalObjective):
    """Pre-training: `itc` between the queries and the captions, each caption right for its own
    image alone; `itm`, the first half of a step's images with a caption of another image, the
    second half with their own; `itg`, captions written after a prompt, over their tokens.

    A pair whose caption is empty is not compared and not matched. Original: `forward` of
    `internvl_stage2/modeling_internvl.py`.
    """

    config: Stage2Config

    def matches(self, pair: Pair, number: int, total: int) -> tuple[Match, ...]:
        """One caption, so that all ranks together show half of a step with another image's."""
        own = number >= total - total // 2
        caption = pair.positive if own else pair.negative
        empty = len(caption) <= len(self.encoder.matching(""))
        return ((caption, IGNORE if empty else int(own)),)

    def is_compared(self, pair: Pair) -> bool:
        return len(pair.summary) > len(self.encoder.embedding(""))

    def features(self, model: Any, seen: CrossKV, batch: PairBatch) -> Tensor:
        """float32 (B, F, E) of unit length: captions, what the queries see."""
        queries, captions = self._apart(model, seen, batch)
        found = (
            model.text_embeds(captions, batch.text_mask),
            model.query_embeds(queries),
        )
        return F.normalize(torch.stack([embeds.float() for embeds in found], dim=1), dim=-1)

    def _no_features(self, model: Any) -> Tensor:
        return torch.zeros(0, 2, model.config.embed_dim, device=model.device)

    def targets(self, image_ids: Tensor) -> Tensor:
        """A pair's own number, smoothed: (n, N), rows sum to one."""
        number = torch.arange(len(image_ids), device=image_ids.device)
        number = number + (dist.rank() << 32)
        right = (number[:, None] == dist.gather_rows(number)).float()
        smoothing = self.config.label_smoothing
        return (1 - smoothing) * right + smoothing / right.shape[1]


def contrastive_losses(own: Tensor, all_: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """(n,): over every branch of the image, half of the cross-entropy from the caption to the
    images and half of that from the image to the captions.

    Args:
        own: features of unit length (n, F, E), the captions' first.
        all_: those of all pairs (N, F, E).
        targets: share of each answer (n, N).
        scale: logarithm of what cosines are multiplied with.
    """
    (caption, *images), (captions, *others) = own.unbind(1), all_.unbind(1)
    return sum(
        (
            0.5 * (_entropy(scale, image, captions, targets))
            + 0.5 * (_entropy(scale, caption, other, targets))
            for image, other in zip(images, others, strict=True)
        ),
        start=own.new_zeros(len(own)),
    )


def _entropy(scale: Tensor, queries: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
    return -(targets * (scale.exp() * queries @ answers.T).log_softmax(-1)).sum(-1)


def _nothing_kept() -> AbstractContextManager[None]:
    """What the backward pass would need is let go at once, so that only memory tells this from
    a pass with gradient. Under `no_grad` compiled blocks are other code, which draws other random
    numbers."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


def _random_state(device: torch.device) -> Tensor:
    """Of the generator that the device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _random_numbers(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws from a seed inside, and goes on as before afterwards; None changes nothing."""
    if seed is None:
        yield
        return
    with rng.preserve_rng(device):
        torch.manual_seed(seed)
        yield
