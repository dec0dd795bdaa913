"""Names of the official weights <-> ours: one table, both directions.

Ours are `transformers`' names of `InternVLForConditionalGeneration`, and for InternVL-14B the same
with `models/dual/model.py`'s heads. Fused tensors of the original
come apart (a rule then has several names on one side) and are put together again bit for bit. The
table is read against the names a model really has, so that a bias or a norm that is absent needs no
entry of its own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from internvl.errors import ModelFolderError
from internvl.models import configs
from internvl.models.dual.configs import DualConfig
from internvl.models.hub import LazyTensor


class Change(Protocol):
    """How the tensors on one side of a rule become those on the other."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]: ...

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]: ...


class Rename:
    """The same tensor under another name."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors


class Transpose:
    """A matrix the original applies from the right, as a linear layer's weight."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.T.contiguous() for tensor in tensors]

    to_official = to_ours


class Thirds:
    """`qkv` (3D, …) holds q, k and v one after another."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return [part.contiguous() for part in tensors[0].chunk(3)]

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors)]


@dataclass(frozen=True)
class Interleaved:
    """InternLM2's `wqkv` ((heads + 2 kv_heads) d, …): per key head its queries, key and value."""

    heads: int
    kv_heads: int

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        group = self.heads // self.kv_heads
        rows = tensors[0].unflatten(0, (self.kv_heads, group + 2, -1))
        return [
            part.flatten(0, 2).contiguous()
            for part in (rows[:, :group], rows[:, group : group + 1], rows[:, group + 1 :])
        ]

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        per_head = [
            tensor.unflatten(0, (self.kv_heads, n, -1)) for tensor, n in self._parts(tensors)
        ]
        return [torch.cat(per_head, dim=1).flatten(0, 2)]

    def _parts(self, tensors: list[Tensor]) -> Iterator[tuple[Tensor, int]]:
        return zip(tensors, (self.heads // self.kv_heads, 1, 1), strict=True)


class Experts:
    """gate and up of every expert (F, D) <-> one stacked tensor (experts, 2F, D)."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        pairs = zip(tensors[0::2], tensors[1::2], strict=True)
        return [torch.stack([torch.cat(pair) for pair in pairs])]

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        return [half.contiguous() for expert in tensors[0] for half in expert.chunk(2)]


class Stack:
    """One tensor per expert <-> one stacked tensor (experts, …)."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack(tensors)]

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        return [expert.contiguous() for expert in tensors[0]]


@dataclass(frozen=True)
class NameRule:
    """Names on both sides. `{i}` is a layer, `{p}` weight or bias, `{rest}` anything."""

    official: tuple[str, ...]
    ours: tuple[str, ...]
    change: Change


@dataclass(frozen=True)
class Group:
    """One rule with its names filled in."""

    official: tuple[str, ...]
    ours: tuple[str, ...]
    change: Change


_TOWER, _LAYER = "model.vision_tower", "model.vision_tower.encoder.layer.{i}"
_THEIR_LAYER = "vision_model.encoder.layers.{i}"
_SAME = Rename()

_TOWER_NAMES = (
    ("vision_model.embeddings.class_embedding", f"{_TOWER}.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", f"{_TOWER}.embeddings.position_embeddings"),
    (
        "vision_model.embeddings.patch_embedding.{p}",
        f"{_TOWER}.embeddings.patch_embeddings.projection.{{p}}",
    ),
    (f"{_THEIR_LAYER}.attn.q_norm.{{p}}", f"{_LAYER}.attention.q_norm.{{p}}"),
    (f"{_THEIR_LAYER}.attn.k_norm.{{p}}", f"{_LAYER}.attention.k_norm.{{p}}"),
    (f"{_THEIR_LAYER}.attn.proj.{{p}}", f"{_LAYER}.attention.projection_layer.{{p}}"),
    (f"{_THEIR_LAYER}.norm1.{{p}}", f"{_LAYER}.layernorm_before.{{p}}"),
    (f"{_THEIR_LAYER}.norm2.{{p}}", f"{_LAYER}.layernorm_after.{{p}}"),
    (f"{_THEIR_LAYER}.ls1", f"{_LAYER}.lambda_1"),
    (f"{_THEIR_LAYER}.ls2", f"{_LAYER}.lambda_2"),
    (f"{_THEIR_LAYER}.mlp.fc1.{{p}}", f"{_LAYER}.mlp.fc1.{{p}}"),
    (f"{_THEIR_LAYER}.mlp.fc2.{{p}}", f"{_LAYER}.mlp.fc2.{{p}}"),
    ("mlp1.0.{p}", "model.multi_modal_projector.layer_norm.{p}"),
    ("mlp1.1.{p}", "model.multi_modal_projector.linear_1.{p}"),
    ("mlp1.3.{p}", "model.multi_modal_projector.linear_2.{p}"),
)
_VISION_AND_PROJECTOR = (
    *(NameRule((official,), (ours,), _SAME) for official, ours in _TOWER_NAMES),
    NameRule(
        (f"{_THEIR_LAYER}.attn.qkv.{{p}}",),
        tuple(f"{_LAYER}.attention.{x}_proj.{{p}}" for x in "qkv"),
        Thirds(),
    ),
)
_STOCK = (
    NameRule(("language_model.lm_head.weight",), ("lm_head.weight",), _SAME),
    NameRule(("language_model.model.{rest}",), ("model.language_model.{rest}",), _SAME),
)


_POOLS = (("clip_projector", "image_pool"), ("clip_projector2", "query_pool"))
_POOL_NAMES = (
    *((f"norm1_{x}.{{p}}", f"norm_{x}.{{p}}") for x in "qkv"),
    *((f"cross_attn.{x}.weight", f"{x}_proj.weight") for x in "qkv"),
    *((f"cross_attn.{x}_bias", f"{x}_proj.bias") for x in "qkv"),
    ("cross_attn.proj.{p}", "o_proj.{p}"),
)
_HEADS = (
    *(
        NameRule((f"{theirs}.{official}",), (f"{ours}.{name}",), _SAME)
        for theirs, ours in _POOLS
        for official, name in _POOL_NAMES
    ),
    NameRule(("text_projection",), ("text_projection.weight",), Transpose()),
    NameRule(("logit_scale",), ("logit_scale",), _SAME),
    NameRule(("itm_head.{p}",), ("itm_head.{p}",), _SAME),
)
_QLLAMA = (
    NameRule(("query_tokens",), ("model.query_tokens.weight",), _SAME),
    NameRule(("qllama.lm_head.weight",), ("lm_head.weight",), _SAME),
    NameRule(("qllama.model.{rest}",), ("model.language_model.{rest}",), _SAME),
)
_PTH_NAMES = (
    ("transformer.", "qllama.model."),
    ("patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("pos_embed", "vision_model.embeddings.position_embedding"),
    ("cls_token", "vision_model.embeddings.class_embedding"),
    ("blocks.", "vision_model.encoder.layers."),
)
"""InternVL-C's own file (`internvl_c_13b_224px.pth`) -> the names of InternVL-14B."""


def pth_to_official(name: str) -> str:
    """A name in InternVL-C's own `.pth` as InternVL-14B's official one."""
    for theirs, official in _PTH_NAMES:
        if name.startswith(theirs):
            return official + name[len(theirs) :].removesuffix(".gamma")
    return name


def _internlm2(heads: int, kv_heads: int) -> tuple[NameRule, ...]:
    theirs, ours = "language_model.model.layers.{i}", "model.language_model.layers.{i}"
    renamed = (
        ("language_model.model.tok_embeddings.weight", "model.language_model.embed_tokens.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.output.weight", "lm_head.weight"),
        (f"{theirs}.attention.wo.{{p}}", f"{ours}.self_attn.o_proj.{{p}}"),
        (f"{theirs}.feed_forward.w1.{{p}}", f"{ours}.mlp.gate_proj.{{p}}"),
        (f"{theirs}.feed_forward.w3.{{p}}", f"{ours}.mlp.up_proj.{{p}}"),
        (f"{theirs}.feed_forward.w2.{{p}}", f"{ours}.mlp.down_proj.{{p}}"),
        (f"{theirs}.attention_norm.weight", f"{ours}.input_layernorm.weight"),
        (f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight"),
    )
    fused = NameRule(
        (f"{theirs}.attention.wqkv.{{p}}",),
        tuple(f"{ours}.self_attn.{x}_proj.{{p}}" for x in "qkv"),
        Interleaved(heads, kv_heads),
    )
    return (*(NameRule((a,), (b,), _SAME) for a, b in renamed), fused)


def _experts(num_experts: int) -> tuple[NameRule, ...]:
    """Qwen3-MoE: one module per expert in the files, stacked in today's `transformers`."""
    theirs = "language_model.model.layers.{i}.mlp.experts"
    ours = "model.language_model.layers.{i}.mlp.experts"
    numbers = range(num_experts)
    both = tuple(f"{theirs}.{e}.{x}_proj.weight" for e in numbers for x in ("gate", "up"))
    down = tuple(f"{theirs}.{e}.down_proj.weight" for e in numbers)
    return (
        NameRule(both, (f"{ours}.gate_up_proj",), Experts()),
        NameRule(down, (f"{ours}.down_proj",), Stack()),
    )


def rules(config: PreTrainedConfig) -> tuple[NameRule, ...]:
    """The table for one configuration; the first rule that knows a name has it."""
    if isinstance(config, DualConfig):
        return (*_VISION_AND_PROJECTOR, *_HEADS, *_QLLAMA)
    text = config.text_config
    architecture = configs.language_model(config)
    if architecture == "InternLM2ForCausalLM":
        special = _internlm2(text.num_attention_heads, text.num_key_value_heads)
    elif architecture == "Qwen3MoeForCausalLM":
        special = _experts(text.num_experts)
    else:
        special = ()
    return (*_VISION_AND_PROJECTOR, *special, *_STOCK)


_WILDCARDS = {"{i}": r"(?P<i>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for wildcard, pattern in _WILDCARDS.items():
        text = text.replace(re.escape(wildcard), pattern)
    return re.compile(text)


def groups(config: PreTrainedConfig, names: Iterable[str]) -> list[Group]:
    """The filled-in rules that cover `names`, the model's own, each exactly once.

    Raises:
        ModelFolderError: a name no rule knows.
    """
    table = [(_pattern(ours), rule) for rule in rules(config) for ours in rule.ours]
    done: set[str] = set()
    found: list[Group] = []
    for name in names:
        if name in done:
            continue
        match, rule = next(
            ((m, rule) for pattern, rule in table if (m := pattern.fullmatch(name))), (None, None)
        )
        if match is None or rule is None:
            raise ModelFolderError(f"no official name for the weight {name}")
        fill = match.groupdict()
        ours = tuple(part.format(**fill) for part in rule.ours)
        official = tuple(part.format(**fill) for part in rule.official)
        found.append(Group(official, ours, rule.change))
        done.update(ours)
    return found


_HF_PREFIXES = (
    # As the -hf releases and transformers' save_pretrained write them.
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    # As save_pretrained writes a subclass of transformers' model, ours included.
    ("model.language_model.model.", "model.language_model."),
)


HF_HEAD = "language_model.lm_head.weight"
"""The output matrix, not stored where it is tied to the input matrix."""


def hf_to_ours(name: str) -> str:
    """A name in a file of the hf layout, of any `transformers` version, as the model's own."""
    for theirs, ours in _HF_PREFIXES:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def ours_to_hf(name: str) -> str:
    """A name of the model as the -hf releases write it."""
    for theirs, ours in _HF_PREFIXES:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def has_adapters(names: Iterable[str]) -> bool:
    """Whether official weights carry LoRA (trained with use_llm_lora or use_backbone_lora)."""
    return any(".lora_A." in name for name in names)


@dataclass(frozen=True)
class Adapted:
    """An official LoRA checkpoint taken apart: the base by its plain names, and the adapters."""

    base: dict[str, LazyTensor]
    adapters: dict[str, tuple[LazyTensor, LazyTensor]]
    """Official module name -> (A, B)."""


def take_apart(stored: Mapping[str, LazyTensor]) -> Adapted:
    """Split PEFT-wrapped official names; those without adapters come back as they are."""
    base: dict[str, LazyTensor] = {}
    halves: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in stored.items():
        plain = name.replace(".base_model.model.", ".", 1).replace(".base_layer.", ".")
        module, found, _ = plain.partition(".lora_")
        if not found:
            base[plain] = tensor
        else:
            halves.setdefault(module, {})[plain[len(module) + len(found)]] = tensor
    adapters = {module: (half["A"], half["B"]) for module, half in halves.items()}
    return Adapted(base, adapters)


@dataclass(frozen=True)
class Renamed:
    """The tensors of a checkpoint under the model's names, and what did not fit."""

    tensors: dict[str, LazyTensor]
    missing: list[str]
    unexpected: list[str]
    """Both as the file would name them."""


def official_to_ours(
    config: PreTrainedConfig, names: Iterable[str], stored: Mapping[str, LazyTensor]
) -> Renamed:
    """Official tensors under the names of a model. Nothing is read before it is used."""
    left = dict(stored)
    tensors: dict[str, LazyTensor] = {}
    missing: list[str] = []
    for group in groups(config, names):
        sources = [left.pop(name, None) for name in group.official]
        present = [source for source in sources if source is not None]
        if len(present) < len(sources):
            missing += [
                n for n, source in zip(group.official, sources, strict=True) if source is None
            ]
            continue
        for index, name in enumerate(group.ours):
            tensors[name] = _lazy_part(group, present, index)
    return Renamed(tensors, missing, sorted(left))


def ours_to_official(
    config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(official name, tensor) of a model's weights, one group at a time."""
    for group in groups(config, state):
        official = group.change.to_official([state[name] for name in group.ours])
        yield from zip(group.official, official, strict=True)


def adapters_to_ours(
    config: PreTrainedConfig,
    names: Iterable[str],
    adapters: Mapping[str, tuple[LazyTensor, LazyTensor]],
) -> dict[str, Tensor]:
    """Official adapters by our module names, `….lora_A.weight` and `….lora_B.weight`.

    A fused layer's A goes to each of its parts; its B comes apart like the layer's own weight.
    """
    state: dict[str, Tensor] = {}
    left = dict(adapters)
    for group in groups(config, names):
        pair = left.pop(group.official[0].removesuffix(".weight"), None)
        if pair is None or not group.official[0].endswith(".weight"):
            continue
        down, up = pair[0].read(), pair[1].read()
        for name, part in zip(group.ours, group.change.to_ours([up]), strict=True):
            state[f"{name.removesuffix('.weight')}.lora_A.weight"] = down
            state[f"{name.removesuffix('.weight')}.lora_B.weight"] = part
    if left:
        raise ModelFolderError(f"adapters for unknown layers, {next(iter(left))}")
    return state


def hf_to_model(
    config: PreTrainedConfig, names: Iterable[str], stored: Mapping[str, LazyTensor]
) -> Renamed:
    """As `official_to_ours`, for the hf layout of any `transformers` version."""
    left = dict(stored)
    tensors: dict[str, LazyTensor] = {}
    expected = list(names)
    for group in groups(config, expected):
        if _per_expert(group) and group.official[0] in left:
            sources = [left.pop(name) for name in group.official if name in left]
            if len(sources) == len(group.official):
                tensors[group.ours[0]] = _lazy_part(group, sources, 0)
    for name, tensor in left.items():
        ours = hf_to_ours(name)
        if ours in tensors:
            raise ModelFolderError(
                f"the weights hold {ours_to_hf(ours)} twice, as {name} and under another name; "
                "remove one of the two files, or download the folder again"
            )
        tensors[ours] = tensor
    missing = [ours_to_hf(name) for name in expected if name not in tensors]
    unexpected = [ours_to_hf(name) for name in sorted(set(tensors) - set(expected))]
    return Renamed({n: t for n, t in tensors.items() if n in set(expected)}, missing, unexpected)


def model_to_hf(
    config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as the -hf releases store a model's weights: experts one by one."""
    for group in groups(config, state):
        if _per_expert(group):
            parts = group.change.to_official([state[name] for name in group.ours])
            yield from zip(group.official, parts, strict=True)
        else:
            yield from ((ours_to_hf(name), state[name]) for name in group.ours)


def _per_expert(group: Group) -> bool:
    return isinstance(group.change, Experts | Stack)


def _lazy_part(group: Group, sources: list[LazyTensor], index: int) -> LazyTensor:
    """Part `index` of what `sources` become; its shape is worked out on tensors without data.

    Raises:
        ModelFolderError: they do not come apart that way.
    """
    change = group.change.to_ours
    empty = [torch.empty(source.shape, dtype=source.dtype, device="meta") for source in sources]
    try:
        shape = tuple(change(empty)[index].shape)
    except (RuntimeError, IndexError) as error:
        raise ModelFolderError(
            f"config.json: does not fit the weight {group.official[0]}, which is "
            f"{sources[0].shape} in the file; the two are not of the same model, copy both again"
        ) from error
    return LazyTensor(
        shape, sources[0].dtype, lambda: change([source.read() for source in sources])[index]
    )
