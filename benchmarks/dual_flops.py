"""FLOPs that a result of InternVL-14B needs, counted from the model itself; 2 a multiply-add.

A matrix W that sees T tokens costs

    2 |W| T  forward  +  2 |W| T  if W trains  +  2 |W| T  if anything below W trains

and attention 4 · width · pairs, three times that where a gradient passes through it. So LoRA needs
frozen linear layers twice (of the first block's q, k and v no gradient of the input), its factors
three times (q, k and v of the tower share one A); heads on frozen towers need the towers forward
only. Nothing counts twice: not the second forward pass of gradient caching or of checkpointing,
nor padding, nor the keys and values of a picture that both of its uses in QLLaMA share. Norms,
rotations, activations and the products of all features with each other are left out, as is
`lm_head`, which retrieval does not use.
"""

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from internvl.data.records import PairBatch

_FIRST = (".q_proj", ".k_proj", ".v_proj")


@dataclass(frozen=True)
class Work:
    """What a step, or a batch that is encoded, holds. Zero where a part is not used."""

    pictures: int
    texts: int = 0
    """Captions that are embedded."""
    text_tokens: int = 0
    text_pairs: int = 0
    """Tokens of one caption that see each other."""
    queried: int = 0
    """Pictures that the queries look at without a caption."""
    matches: int = 0
    """Captions beside a picture, under the mask in which everything sees everything."""
    match_tokens: int = 0
    match_pairs: int = 0
    """Queries and tokens of one such row that see each other."""

    def __add__(self, other: "Work") -> "Work":
        names = [field.name for field in fields(self)]
        return Work(*(getattr(self, name) + getattr(other, name) for name in names))


def work_of(batch: PairBatch, queries: int) -> Work:
    """What a training batch asks for; padding asks for nothing.

    Args:
        queries: query tokens of a picture (Q).
    """
    text, match = batch.text_mask.sum(1), batch.match_mask.sum(1)
    return Work(
        pictures=batch.num_samples,
        texts=len(text),
        text_tokens=int(text.sum()),
        text_pairs=int((text * (text + 1) // 2).sum()),
        queried=batch.num_samples,
        matches=len(match),
        match_tokens=int(match.sum()),
        match_pairs=int(((match + queries) ** 2).sum()),
    )


def flops(model: Any, work: Work) -> float:
    """Forward, and backward as far as the model's parameters ask for it (none where all are
    frozen)."""
    return sum(_linear(model, work)) + sum(_attention(model, work))


def _linear(model: Any, work: Work) -> list[float]:
    """Of every matrix. What several layers share, as q, k and v share an A, counts once."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        passes = 1 + any(p.requires_grad for p in module.parameters()) + _is_above(model, name)
        found.append(2 * passes * module.weight.numel() * _tokens(model, work, name))
    return found


def _tokens(model: Any, work: Work, name: str) -> int:
    """How many vectors a matrix is multiplied with."""
    queries = model.num_queries
    patches = (model.config.vision_config.image_size[0] // _patch(model)) ** 2
    seen = work.pictures * (patches + 1)
    side = name.rpartition("proj")[0].rpartition(".")[2]  # k_ in …k_proj, also below an adapter
    if "patch_embeddings" in name:
        return work.pictures * patches
    if name.startswith("model.vision_tower"):
        return seen
    if "cross_attn" in name:
        used = work.queried + work.matches
        return queries * used if side in ("q_", "o_") else seen if used else 0
    if name.startswith("model.language_model"):
        joint = work.matches * queries + work.match_tokens
        return work.text_tokens + work.queried * queries + joint
    if name.startswith("image_pool"):
        return work.pictures if side in ("q_", "o_") else seen
    if name.startswith("query_pool"):
        return work.queried if side in ("q_", "o_") else work.queried * queries
    return {"text_projection": work.texts, "itm_head": work.matches * queries}.get(name, 0)


def _attention(model: Any, work: Work) -> list[float]:
    """Of every place where something attends."""
    vision, text = model.config.vision_config, model.config.text_config
    queries = model.num_queries
    seen = (vision.image_size[0] // _patch(model)) ** 2 + 1
    in_tower = 4 * vision.hidden_size * work.pictures * seen**2
    own = work.text_pairs + work.queried * queries**2 + work.match_pairs
    across = (work.queried + work.matches) * queries * seen
    found = []
    for name, _ in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind == "attention":
            forward = in_tower
        elif kind == "self_attn":
            forward = 4 * text.hidden_size * own
        elif kind == "cross_attn":
            forward = 4 * text.hidden_size * across
        elif kind == "image_pool":
            forward = 4 * vision.hidden_size * work.pictures * seen
        elif kind == "query_pool":
            forward = 4 * text.hidden_size * work.queried * queries
        else:
            continue
        passed = _is_above(model, name) or _trains(model, name)
        found.append((3 if passed else 1) * forward)
    return found


def _patch(model: Any) -> int:
    return model.config.vision_config.patch_size[0]


def _trains(model: Any, *prefixes: str) -> bool:
    named = model.named_parameters()
    return any(p.requires_grad for name, p in named if name.startswith(prefixes))


def _is_above(model: Any, name: str) -> bool:
    """Whether a gradient of this module's input is needed."""
    tower, language = "model.vision_tower.", "model.language_model."
    if name.startswith(("image_pool", "query_pool")):
        below = ("model.",) if name.startswith("query") else (tower,)
        part = name.partition(".")[0]
        norms = f"{part}.norm_"
        return _trains(model, *below, norms) or (name.endswith("o_proj") and _trains(model, part))
    if name in ("text_projection", "itm_head"):
        return _trains(model, language) or (name == "itm_head" and _trains(model, "model."))
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
        return _trains(model, *before)
    first = any(part in f".{rest}" for part in _FIRST) or rest in ("attention", "self_attn")
    norms = [own + "layernorm_before", own + "input_layernorm"]
    below_tower = [tower] if root == language and number > 0 else []
    if first and "lora_B" not in rest:
        return _trains(model, *before, *norms, *below_tower)
    return _trains(model, *before, own, *below_tower, *([tower] if "mlp" in rest else []))


def _block(name: str) -> tuple[str, int, str]:
    """model.vision_tower.encoder.layer.7.mlp.fc1 -> (model….layer., 7, mlp.fc1)."""
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:place]) + ".", int(parts[place]), ".".join(parts[place + 1 :])
