"""Maps names and layouts of the official weights to ours and back by one table.

Ours are `transformers`' names of `InternVLForConditionalGeneration`, and for InternVL-14B the same
with the heads of `models/dual/model.py`. Fused tensors of the original are split (such a rule has
several names on one side) and fused again bit for bit. Rules are matched against the names that a
model has, so a bias or norm that is absent needs no entry.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import InternVLConfig, PreTrainedConfig

from internvl.errors import ModelFolderError
from internvl.models import configs
from internvl.models.dual.configs import DualConfig
from internvl.models.tensors import LazyTensor


class Change(Protocol):
    """Converts the tensors on one side of a rule to those on the other."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]: ...

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]: ...

    def rows(self, sources: Sequence[LazyTensor], index: int, start: int, stop: int) -> Tensor:
        """Reads rows [start, stop) of tensor `index` of `to_ours`, and little else."""


class Rename:
    """Changes the name only."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def rows(self, sources: Sequence[LazyTensor], index: int, start: int, stop: int) -> Tensor:
        return sources[index].rows(start, stop)


class Transpose:
    """Transposes a matrix that the original applies from the right to a linear layer's weight."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        # Contiguous, here and below: safetensors does not write views.
        return [tensor.T.contiguous() for tensor in tensors]

    to_official = to_ours

    def rows(self, sources: Sequence[LazyTensor], index: int, start: int, stop: int) -> Tensor:
        return sources[index].read()[:, start:stop].T.contiguous()


class Thirds:
    """Splits `qkv` (3D, …), which stacks q, k and v."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return [third.contiguous() for third in tensors[0].chunk(3)]

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors)]

    def rows(self, sources: Sequence[LazyTensor], index: int, start: int, stop: int) -> Tensor:
        first = index * (sources[0].shape[0] // 3)
        return sources[0].rows(first + start, first + stop)


@dataclass(frozen=True)
class Interleaved:
    """Splits InternLM2's `wqkv` ((heads + 2 kv_heads) d, …), grouped by key head."""

    heads: int
    kv_heads: int

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        group = self.heads // self.kv_heads
        # (kv_heads, queries per key head + key + value, d, …)
        rows = tensors[0].unflatten(0, (self.kv_heads, group + 2, -1))
        return [
            heads.flatten(0, 2).contiguous()
            for heads in (rows[:, :group], rows[:, group : group + 1], rows[:, group + 1 :])
        ]

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        per_head = [
            tensor.unflatten(0, (self.kv_heads, n, -1)) for tensor, n in self._per_key_head(tensors)
        ]
        return [torch.cat(per_head, dim=1).flatten(0, 2)]

    def rows(self, sources: Sequence[LazyTensor], index: int, start: int, stop: int) -> Tensor:
        group = self.heads // self.kv_heads
        head_rows = sources[0].shape[0] // (self.heads + 2 * self.kv_heads)
        first, count = ((0, group), (group, 1), (group + 1, 1))[index]
        # The rows of one key head lie together, those of the next one a group further on.
        block, blocks = count * head_rows, []
        while start < stop:
            key_head, offset = divmod(start, block)
            length = min(stop - start, block - offset)
            row = (key_head * (group + 2) + first) * head_rows + offset
            blocks.append(sources[0].rows(row, row + length))
            start += length
        return torch.cat(blocks)

    def _per_key_head(self, tensors: list[Tensor]) -> Iterator[tuple[Tensor, int]]:
        return zip(tensors, (self.heads // self.kv_heads, 1, 1), strict=True)


class Experts:
    """Stacks gate and up of every expert (F, D) to (experts, 2F, D)."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        # The rule names gate and up of one expert after another.
        pairs = zip(tensors[0::2], tensors[1::2], strict=True)
        return [torch.stack([torch.cat(pair) for pair in pairs])]

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        return [half.contiguous() for expert in tensors[0] for half in expert.chunk(2)]

    def rows(self, sources: Sequence[LazyTensor], index: int, start: int, stop: int) -> Tensor:
        return self.to_ours([source.read() for source in sources[2 * start : 2 * stop]])[0]


class Stack:
    """Stacks one tensor per expert to (experts, …)."""

    def to_ours(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.stack(tensors)]

    def to_official(self, tensors: list[Tensor]) -> list[Tensor]:
        return [expert.contiguous() for expert in tensors[0]]

    def rows(self, sources: Sequence[LazyTensor], index: int, start: int, stop: int) -> Tensor:
        return self.to_ours([source.read() for source in sources[start:stop]])[0]


@dataclass(frozen=True)
class NameRule:
    """Name templates of both sides: `{i}` is a layer, `{p}` weight or bias, `{rest}` anything."""

    official: tuple[str, ...]
    ours: tuple[str, ...]
    change: Change


@dataclass(frozen=True)
class Group:
    """A rule with the templates filled in."""

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
# After the special rules: `{rest}` matches every name of a language model.
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
# Both pools have the same modules; only their prefixes differ.
_HEADS = (
    *(
        NameRule((f"{theirs}.{official}",), (f"{ours}.{name}",), _SAME)
        for theirs, ours in _POOLS
        for official, name in _POOL_NAMES
    ),
    # A bare parameter of the original, a linear layer here.
    NameRule(("text_projection",), ("text_projection.weight",), Transpose()),
    NameRule(("logit_scale",), ("logit_scale",), _SAME),
    NameRule(("itm_head.{p}",), ("itm_head.{p}",), _SAME),
)
# QLLaMA under the chat model's names, so that adapters find its layers.
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
    """Converts a name of InternVL-C's own `.pth` file to InternVL-14B's official one."""
    for theirs, official in _PTH_NAMES:
        if name.startswith(theirs):
            # LayerScale is a module there (ls1.gamma) and a parameter in InternVL-14B (ls1).
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
    """Returns the rules of Qwen3-MoE: a module per expert in files, stacked in `transformers`."""
    theirs = "language_model.model.layers.{i}.mlp.experts"
    ours = "model.language_model.layers.{i}.mlp.experts"
    experts = range(num_experts)
    both = tuple(f"{theirs}.{e}.{x}_proj.weight" for e in experts for x in ("gate", "up"))
    down = tuple(f"{theirs}.{e}.down_proj.weight" for e in experts)
    return (
        NameRule(both, (f"{ours}.gate_up_proj",), Experts()),
        NameRule(down, (f"{ours}.down_proj",), Stack()),
    )


def rules(config: PreTrainedConfig) -> tuple[NameRule, ...]:
    """Returns the rules of a configuration; the first that matches a name applies."""
    return _RULES[config.model_type](config)


def _dual_rules(config: PreTrainedConfig) -> tuple[NameRule, ...]:
    return (*_VISION_AND_PROJECTOR, *_HEADS, *_QLLAMA)


def _chat_rules(config: PreTrainedConfig) -> tuple[NameRule, ...]:
    text = config.text_config
    architecture = configs.language_model(config)
    if architecture == "InternLM2ForCausalLM":
        special = _internlm2(text.num_attention_heads, text.num_key_value_heads)
    elif architecture == "Qwen3MoeForCausalLM":
        special = _experts(text.num_experts)
    else:  # the others have transformers' own names below `language_model`
        special = ()
    return (*_VISION_AND_PROJECTOR, *special, *_STOCK)


_RULES = {InternVLConfig.model_type: _chat_rules, DualConfig.model_type: _dual_rules}


_WILDCARDS = {"{i}": r"(?P<i>\d+)", "{p}": r"(?P<p>weight|bias)", "{rest}": r"(?P<rest>.+)"}


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)  # the wildcards too, so they are replaced in their escaped form
    for wildcard, pattern in _WILDCARDS.items():
        text = text.replace(re.escape(wildcard), pattern)
    return re.compile(text)


def groups(config: PreTrainedConfig, names: Iterable[str]) -> list[Group]:
    """Fills in the rules so that they cover the model's `names`, each exactly once.

    Raises:
        ModelFolderError: no rule matches a name.
    """
    table = [(_pattern(ours), rule) for rule in rules(config) for ours in rule.ours]
    done: set[str] = set()
    filled: list[Group] = []
    for name in names:
        if name in done:  # q of a fused rule covers k and v
            continue
        match, rule = next(
            ((m, rule) for pattern, rule in table if (m := pattern.fullmatch(name))), (None, None)
        )
        if match is None or rule is None:
            raise ModelFolderError(f"no official name for the weight {name}")
        fill = match.groupdict()
        ours = tuple(template.format(**fill) for template in rule.ours)
        official = tuple(template.format(**fill) for template in rule.official)
        filled.append(Group(official, ours, rule.change))
        done.update(ours)
    return filled


_HF_PREFIXES = (
    # As the -hf releases and save_pretrained write them. In order: the first prefix that fits.
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    # As save_pretrained writes a subclass of transformers' model, ours included.
    ("model.language_model.model.", "model.language_model."),
)


HF_HEAD = "language_model.lm_head.weight"
"""The output matrix; not stored if it is tied to the input matrix."""


def hf_to_ours(name: str) -> str:
    """Converts a name of an hf-layout file, of any `transformers` version, to the model's."""
    for theirs, ours in _HF_PREFIXES:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def ours_to_hf(name: str) -> str:
    """Converts a name of the model to that of the -hf releases."""
    for theirs, ours in _HF_PREFIXES:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def has_adapters(names: Iterable[str]) -> bool:
    """True if official weights include LoRA (use_llm_lora or use_backbone_lora)."""
    return any(".lora_A." in name for name in names)


# Lazy tensors: adapters alone are read, or the base alone.
@dataclass(frozen=True)
class Adapted:
    """An official LoRA checkpoint, split into base weights and adapters."""

    base: dict[str, LazyTensor]
    adapters: dict[str, tuple[LazyTensor, LazyTensor]]
    """Official module name -> (A (r, in), B (out, r))."""


def split_adapters(stored: Mapping[str, LazyTensor]) -> Adapted:
    """Splits PEFT-wrapped official weights; those without adapters are returned as they are."""
    base: dict[str, LazyTensor] = {}
    matrices: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in stored.items():
        # PEFT wraps the language model (`base_model.model`) and each adapted layer (`base_layer`).
        plain = name.replace(".base_model.model.", ".", 1).replace(".base_layer.", ".")
        module, separator, _ = plain.partition(".lora_")
        if not separator:
            base[plain] = tensor
        else:
            # "A" or "B", the letter after the separator.
            matrices.setdefault(module, {})[plain[len(module) + len(separator)]] = tensor
    adapters = {module: (pair["A"], pair["B"]) for module, pair in matrices.items()}
    return Adapted(base, adapters)


@dataclass(frozen=True)
class Renamed:
    """Tensors of a checkpoint under the model's names, and the names that do not match."""

    tensors: dict[str, LazyTensor]
    missing: list[str]
    unexpected: list[str]
    """Both lists have the names of the file's layout."""


def official_to_ours(
    config: PreTrainedConfig, names: Iterable[str], stored: Mapping[str, LazyTensor]
) -> Renamed:
    """Renames official tensors to the model's names, lazily: nothing is read yet."""
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
            continue  # a fused tensor needs all of its sources
        for index, name in enumerate(group.ours):
            tensors[name] = _convert_lazily(group, present, index)
    return Renamed(tensors, missing, sorted(left))


def ours_to_official(
    config: PreTrainedConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yields (official name, tensor) of a model's weights, one group at a time."""
    for group in groups(config, state):
        official = group.change.to_official([state[name] for name in group.ours])
        yield from zip(group.official, official, strict=True)


def adapters_to_ours(
    config: PreTrainedConfig,
    names: Iterable[str],
    adapters: Mapping[str, tuple[LazyTensor, LazyTensor]],
) -> dict[str, Tensor]:
    """Converts official adapters to `….lora_A.weight` and `….lora_B.weight` of our modules."""
    state: dict[str, Tensor] = {}
    left = dict(adapters)
    for group in groups(config, names):
        pair = left.pop(group.official[0].removesuffix(".weight"), None)
        if pair is None or not group.official[0].endswith(".weight"):
            continue
        # B A of a fused layer: A is shared by its outputs, and B splits like the weight itself.
        down, up = pair[0].read(), pair[1].read()
        for name, own_up in zip(group.ours, group.change.to_ours([up]), strict=True):
            state[f"{name.removesuffix('.weight')}.lora_A.weight"] = down
            state[f"{name.removesuffix('.weight')}.lora_B.weight"] = own_up
    if left:
        raise ModelFolderError(f"adapters for unknown layers, {next(iter(left))}")
    return state


def hf_to_model(
    config: PreTrainedConfig, names: Iterable[str], stored: Mapping[str, LazyTensor]
) -> Renamed:
    """Like `official_to_ours`, for the hf layout of any `transformers` version."""
    left = dict(stored)
    tensors: dict[str, LazyTensor] = {}
    expected = list(names)
    # Older versions store experts one by one, like the official layout; newer ones stacked.
    for group in groups(config, expected):
        if _per_expert(group) and group.official[0] in left:
            sources = [left.pop(name) for name in group.official if name in left]
            if len(sources) == len(group.official):
                tensors[group.ours[0]] = _convert_lazily(group, sources, 0)
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
    """Yields (name, tensor) as the -hf releases store them: experts one by one."""
    for group in groups(config, state):
        if _per_expert(group):
            experts = group.change.to_official([state[name] for name in group.ours])
            yield from zip(group.official, experts, strict=True)
        else:
            yield from ((ours_to_hf(name), state[name]) for name in group.ours)


def _per_expert(group: Group) -> bool:
    return isinstance(group.change, Experts | Stack)


def _convert_lazily(group: Group, sources: list[LazyTensor], index: int) -> LazyTensor:
    """Returns tensor `index` of the group's conversion of `sources`, computed when it is read.

    Raises:
        ModelFolderError: the shapes do not fit the conversion.
    """
    change = group.change.to_ours
    # The shape comes from a conversion on the meta device, without data.
    empty = [torch.empty(source.shape, dtype=source.dtype, device="meta") for source in sources]
    try:
        shape = tuple(change(empty)[index].shape)
    except (RuntimeError, IndexError) as error:
        raise ModelFolderError(
            f"config.json: does not fit the weight {group.official[0]}, which is "
            f"{sources[0].shape} in the file; the two are not of the same model, copy both again"
        ) from error
    return LazyTensor(
        shape,
        sources[0].dtype,
        lambda: change([source.read() for source in sources])[index],
        lambda start, stop: group.change.rows(sources, index, start, stop),
    )
