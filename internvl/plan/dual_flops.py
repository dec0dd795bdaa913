"""FLOPs that a result of InternVL-14B needs, counted from the model itself; 2 a multiply-add.

A matrix costs what flops.py says. Of the tower's adapters q, k and v share one A. Nothing counts
twice: not the second forward pass of gradient caching or of checkpointing, nor padding, nor the
keys and values of an image that its uses in QLLaMA share. Norms, rotations, activations and the
products of all features with each other are left out.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from internvl.data.records import PairBatch
from internvl.plan.flops import Flops, Part

_FIRST = (".q_proj", ".k_proj", ".v_proj")


@dataclass(frozen=True)
class PairWork:
    """What a step, or a batch that is encoded, holds. Zero where a part is not used."""

    images: float
    texts: float = 0
    """Captions that are embedded."""
    text_tokens: float = 0
    text_pairs: float = 0
    """Tokens of one caption that see each other."""
    queried: float = 0
    """Images that the queries look at without a caption."""
    matches: float = 0
    """Captions beside an image, under the mask in which everything sees everything."""
    match_tokens: float = 0
    match_pairs: float = 0
    """Tokens of one such caption that see each other; the queries come on top."""
    written: float = 0
    """Captions that are written, under the mask in which queries see no text."""
    written_tokens: float = 0
    written_pairs: float = 0
    supervised: float = 0

    def __add__(self, other: "PairWork") -> "PairWork":
        names = [field.name for field in fields(self)]
        return PairWork(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def samples(self) -> float:
        """Pairs, as `flops.Work` calls them."""
        return self.images


@dataclass(frozen=True)
class Captions:
    """Tokens of each caption of a pair with padding, and how many an image is shown with. Zero
    where no term of the loss uses them."""

    text: int
    """Embedded."""
    match: int
    """Beside the image."""
    matches: int
    written: int
    supervised: float
    """Of a pair, on average."""

    def work(self, pairs: float, queries: int) -> PairWork:
        """What kernels compute for so many pairs: padding, and every token with every other.

        Args:
            queries: of an image (Q).
        """
        compared, matches = pairs * bool(self.text), pairs * self.matches
        return PairWork(
            images=pairs,
            texts=compared,
            text_tokens=compared * self.text,
            text_pairs=compared * self.text**2,
            queried=compared,
            matches=matches,
            match_tokens=matches * self.match,
            match_pairs=matches * self.match**2,
            written=pairs * bool(self.written),
            written_tokens=pairs * self.written,
            written_pairs=pairs * self.written * (self.written + queries),
            supervised=pairs * self.supervised,
        )


@dataclass(frozen=True)
class PairStep:
    """The first step of a run on pairs, as a plan reckons with it."""

    work: PairWork
    captions: Captions
    """The longest of its micro-batches."""
    samples_an_epoch: int


def step_of(
    batches: Sequence[PairBatch], terms: Collection[str], samples_an_epoch: int
) -> PairStep:
    """What the micro-batches of a step hold."""
    work = sum((work_of(batch, terms) for batch in batches), start=PairWork(0))
    longest = [
        max(ids.shape[1] for ids in column)
        for column in zip(*((b.text_ids, b.match_ids, b.written_ids) for b in batches), strict=True)
    ]
    text, match, written = longest
    captions = Captions(
        text if work.texts else 0,
        match if work.matches else 0,
        round(work.matches / work.images),
        written if work.written else 0,
        work.supervised / work.images,
    )
    return PairStep(work, captions, samples_an_epoch)


def work_of(batch: PairBatch, terms: Collection[str]) -> PairWork:
    """What a training batch asks for; padding asks for nothing.

    Args:
        terms: of the loss: itc, itm, itg.
    """
    work = PairWork(batch.num_samples)
    if "itc" in terms:
        text = batch.text_mask.sum(1)
        pairs = int((text * (text + 1) // 2).sum())
        work += PairWork(0, len(text), int(text.sum()), pairs, queried=batch.num_samples)
    if "itm" in terms:
        match = batch.match_mask.sum(1)
        total, pairs = int(match.sum()), int((match**2).sum())
        work += PairWork(0, matches=len(match), match_tokens=total, match_pairs=pairs)
    if "itg" in terms:
        written = batch.written_mask.sum(1)
        work += PairWork(
            0,
            written=len(written),
            written_tokens=int(written.sum()),
            written_pairs=int((written * (written + 1) // 2).sum()),
            supervised=len(batch.targets),
        )
    return work


def count(model: Any, work: PairWork) -> Flops:
    """FLOPs of one pass: forward, and backward as far as the model's parameters ask for it (none
    where all are frozen). Pools, projections and output matrices are `logits`."""
    trained = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    found: dict[str, Part] = defaultdict(Part)
    for kind, part in (*_linear(model, work, trained), *_attention(model, work, trained)):
        found[kind] += part
    return Flops(**{field.name: found[field.name] for field in fields(Flops)})


def _linear(model: Any, work: PairWork, trained: Collection[str]) -> Iterator[tuple[str, Part]]:
    """Of every matrix. What several layers share, as q, k and v share an A, counts once."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        own = any(parameter.requires_grad for parameter in module.parameters())
        forward = 2.0 * module.weight.numel() * _tokens(model, work, name)
        kind = {"vision_tower": "tower", "language_model": "decoder"}
        inside = name.removeprefix("model.").partition(".")[0]
        yield (
            kind.get(inside, "logits"),
            Part(forward, forward * (1 + own + _is_above(trained, name))),
        )


def _tokens(model: Any, work: PairWork, name: str) -> float:
    """How many vectors a matrix is multiplied with."""
    queries = model.num_queries
    patches = (model.config.vision_config.image_size[0] // _patch(model)) ** 2
    seen = work.images * (patches + 1)
    side = name.rpartition("proj")[0].rpartition(".")[2]  # k_ in …k_proj, also below an adapter
    if "patch_embeddings" in name:
        return work.images * patches
    if name.startswith("model.vision_tower"):
        return seen
    used = work.queried + work.matches + work.written
    if "cross_attn" in name:
        return queries * used if side in ("q_", "o_") else seen if used else 0
    if name.startswith("model.language_model"):
        return work.text_tokens + work.match_tokens + work.written_tokens + used * queries
    if name.startswith("image_pool"):
        return work.images if side in ("q_", "o_") else seen
    if name.startswith("query_pool"):
        return work.queried if side in ("q_", "o_") else work.queried * queries
    others = {"text_projection": work.texts, "itm_head": work.matches * queries}
    return {"lm_head": work.supervised, **others}.get(name, 0)


def _attention(model: Any, work: PairWork, trained: Collection[str]) -> Iterator[tuple[str, Part]]:
    """Of every place where something attends."""
    vision, text = model.config.vision_config, model.config.text_config
    queries = model.num_queries
    seen = (vision.image_size[0] // _patch(model)) ** 2 + 1
    used = work.queried + work.matches + work.written
    own = work.text_pairs + work.match_pairs + work.written_pairs + used * queries**2
    own += (2 * work.match_tokens + work.written_tokens) * queries
    places = {
        "attention": ("tower_attention", vision.hidden_size * work.images * seen**2),
        "self_attn": ("decoder_attention", text.hidden_size * own),
        "cross_attn": ("decoder_attention", text.hidden_size * used * queries * seen),
        "image_pool": ("tower_attention", vision.hidden_size * work.images * seen),
        "query_pool": ("decoder_attention", text.hidden_size * work.queried * queries),
    }
    for name, _ in model.named_modules():
        place = name.rpartition(".")[2]
        if place in places:
            kind, pairs = places[place]
            passed = _is_above(trained, name) or _trains(trained, name)
            yield kind, Part(4.0 * pairs, 4.0 * pairs * (3 if passed else 1))


def _patch(model: Any) -> int:
    return model.config.vision_config.patch_size[0]


def _trains(trained: Collection[str], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in trained)


def _is_above(trained: Collection[str], name: str) -> bool:
    """Whether a gradient of this module's input is needed."""
    tower, language = "model.vision_tower.", "model.language_model."
    if name.startswith(("image_pool", "query_pool")):
        below = ("model.",) if name.startswith("query") else (tower,)
        part = name.partition(".")[0]
        inner = f"{part}.norm_"
        pooled = name.endswith("o_proj") and _trains(trained, part)
        return _trains(trained, *below, inner) or pooled
    if name == "text_projection":
        return _trains(trained, language)
    if name in ("itm_head", "lm_head"):
        return _trains(trained, "model.")
    if not name.startswith(("model.vision_tower.encoder.layer.", "model.language_model.layers.")):
        return False
    stem, number, rest = _block(name)
    root = tower if name.startswith(tower) else language
    before = [root + "embed", *(f"{stem}{i}." for i in range(number))]
    if root == language:
        before.append("model.query_tokens.")
    own = f"{stem}{number}."
    if "cross_attn" in rest:
        before += [own + "self_attn", own + "input_layernorm", own + "cross_attn.norm", tower]
        return _trains(trained, *before)
    first = any(part in f".{rest}" for part in _FIRST) or rest in ("attention", "self_attn")
    norms = [own + "layernorm_before", own + "input_layernorm"]
    below_tower = [tower] if root == language and number > 0 else []
    if first and "lora_B" not in rest:
        return _trains(trained, *before, *norms, *below_tower)
    return _trains(trained, *before, own, *below_tower, *([tower] if "mlp" in rest else []))


def _block(name: str) -> tuple[str, int, str]:
    """model.vision_tower.encoder.layer.7.mlp.fc1 -> (model….layer., 7, mlp.fc1)."""
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:place]) + ".", int(parts[place]), ".".join(parts[place + 1 :])
