"""Low-rank adapters (PEFT): attached, saved and loaded.

Adapters are injected into the model itself, so that it keeps its class and its forward, and are
written as a folder that plain `peft` loads onto plain `transformers`' model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from internvl import dist
from internvl.config import LoraConfig
from internvl.errors import ModelFolderError, UserError
from internvl.files import atomic_file, write_json, write_text
from internvl.models import bases, configs
from internvl.models.adapters import fused_lora, merging
from internvl.models.adapters import layers as adapter_layers
from internvl.models.adapters.dropout import DrawnDropout, RepeatedDropout
from internvl.models.adapters.folder import BASE_KEY, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE
from internvl.models.adapters.folder import base_of as base_of
from internvl.models.adapters.folder import is_adapter as is_adapter
from internvl.models.adapters.merging import MergedState as MergedState
from internvl.models.adapters.merging import adapted_layers
from internvl.models.adapters.merging import merge as merge
from internvl.models.trainable import PARTS as PARTS
from internvl.models.trainable import has_adapters as has_adapters
from internvl.models.trainable import select_trainable as select_trainable
from internvl.models.weights import save_tensors

_ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."
_LINEARS = {
    "vision_tower": r"model\.vision_tower\.encoder\.layer\.\d+\."
    r"(attention\.(q_proj|k_proj|v_proj|projection_layer)|mlp\.(fc1|fc2))",
    "language_model": r"model\.language_model\.layers\.\d+\."
    r"(self_attn\.(q_proj|k_proj|v_proj|qkv_proj|o_proj)"
    r"|mlp\.(gate_proj|up_proj|gate_up_proj|down_proj))",
}
"""The linear layers that take an adapter, as the original chooses them for each architecture."""


@dataclass(frozen=True)
class Adapter:
    """Rank and scale of the adapters of one part: each adds alpha / rank * B A."""

    rank: int
    alpha: float


def attach(model: nn.Module, settings: LoraConfig) -> nn.Module:
    """Puts adapters on `settings.on`; returns the model, its other weights as trainable as before.

    Where the original's projection is fused (InternLM2's `wqkv`, the vision tower's `qkv`), q, k
    and v share one A, as its one adapter does.

    Raises:
        UserError: a part without linear layers, or a model that has adapters already.
    """
    # The original's scale.
    alpha = 2.0 * settings.rank if settings.alpha is None else settings.alpha
    adapters = {str(part_name): Adapter(settings.rank, alpha) for part_name in settings.on}
    return inject(model, adapters, settings.dropout)


def inject(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    dropout: float = 0.0,
    share: bool | None = None,
) -> nn.Module:
    """As `attach`, with rank and alpha for each part; `share` overrules which q, k, v share A."""
    # Projector and heads have no linear layers that the original adapts.
    unknown = [part_name for part_name in adapters if part_name not in _LINEARS]
    if unknown:
        raise UserError(
            f"no adapter goes on {unknown[0]!r}; parts with adapters are {', '.join(_LINEARS)}"
        )
    if has_adapters(model):
        raise UserError("the model has adapters already; merge them first")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inject_adapter_in_model(_peft_config(adapters, dropout), model)
    for name, layer in _layers(model):
        # In float32 whatever the base has: their updates are far below a bfloat16 weight's steps.
        layer.lora_A.float()
        layer.lora_B.float()
        layer.get_base_layer().requires_grad_(False)
        if dropout:
            layer.lora_dropout[_ADAPTER] = DrawnDropout(dropout)
        layer.train(model.training)
        if name.endswith(".v_proj") and (_shares_a(model, name) if share is None else share):
            _share_a(model, name.replace(".v_proj", ".q_proj"))
    _keep_trainable(model, trained)
    return model


def drawn_again(model: nn.Module, state: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, weights) of the adapters that `attach` drew, one layer at a time.

    Args:
        state: state of torch's generator when `attach` began.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        for name, layer in adapted_layers(model):
            shape = (layer.out_features, layer.in_features)
            base = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            # On the CPU, where PEFT puts an adapter that is to be drawn there, but of no size.
            base.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
            alone = nn.ModuleDict({"layer": base})
            config = PeftLoraConfig(r=layer.r[_ADAPTER], target_modules=["layer"], bias="none")
            inject_adapter_in_model(config, alone)
            weights: Any = alone["layer"]
            for matrix in ("lora_A", "lora_B"):
                yield (
                    f"{name}.{matrix}.{_ADAPTER}.weight",
                    getattr(weights, matrix)[_ADAPTER].weight,
                )


def _peft_config(adapters: Mapping[str, Adapter], dropout: float) -> PeftLoraConfig:
    """Returns one PEFT configuration for all parts; ranks that differ go into its patterns."""
    # PEFT injects a configuration once: a second one would be a second adapter.
    first = next(iter(adapters.values()))
    others = {part_name: a for part_name, a in adapters.items() if a != first}
    return PeftLoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=dropout,
        target_modules="|".join(f"({_LINEARS[part_name]})" for part_name in adapters),
        rank_pattern={_LINEARS[part_name]: a.rank for part_name, a in others.items()},
        alpha_pattern={_LINEARS[part_name]: a.alpha for part_name, a in others.items()},
        bias="none",
    )


def _shares_a(model: Any, name: str) -> bool:
    """True if q, k and v are one layer in the original."""
    if name.startswith(PARTS["vision_tower"]):
        return True
    return configs.language_model(model.config) == "InternLM2ForCausalLM"


def _share_a(model: Any, name: str) -> None:
    """Shares q's A with k and v: one tensor, one gradient, and one mask of dropout."""
    stem = name.removesuffix("q_proj")
    q, k, v = (model.get_submodule(f"{stem}{x}_proj") for x in "qkv")
    drawn = q.lora_dropout[_ADAPTER]
    # Attention calls q, k and v in this order, in a recomputed forward too.
    for layer in (k, v):
        layer.lora_A[_ADAPTER] = q.lora_A[_ADAPTER]
        if isinstance(drawn, DrawnDropout):
            drawn.keep = True
            layer.lora_dropout[_ADAPTER] = RepeatedDropout(drawn, last=layer is v)
            layer.train(model.training)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields (name without wrappers, adapted layer)."""
    for name, module in merging.adapted_layers(model):
        yield merging.unwrapped(name), module


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapters' weights by the names of a PEFT folder, on CPU; on rank 0 alone.

    All ranks call it: each has a shard.

    Raises:
        UserError: the model has no adapters, or others than plain LoRA.
    """
    state = {}
    has_layers = False
    for name, layer in _layers(model):
        has_layers = True
        if not fused_lora.is_plain(layer):
            raise UserError(
                f"{name}: its adapter is more than plain LoRA, which is not written here; export "
                "the model, which merges it"
            )
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)[_ADAPTER].weight.detach()
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            # Cloned, because a shared A must be three tensors in the file.
            if dist.is_main():
                whole = whole.to("cpu", copy=True).contiguous()
                state[f"{_PEFT_PREFIX}{name}.{matrix}.weight"] = whole
    if not has_layers:
        raise UserError("the model has no adapters to save")
    return state


def save_adapter(
    model: Any,
    folder: Path,
    base: str | Path | None = None,
    step: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the adapters as a PEFT folder; all ranks call it.

    A base on this disk is found again if it is moved together with the folder, see `bases`.

    Args:
        base: the model they belong to, by path or hub id.
        step: step of its checkpoint that they were trained on, if it is a run.
        settings: official keys of images and conversations that they were trained with.
    """
    state = adapter_state(model)
    if not dist.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[_ADAPTER].to_dict()
    # As it is: a pattern stays a string, and a set is sorted below.
    config["target_modules"] = model.peft_config[_ADAPTER].target_modules
    name = None if base is None else str(base)
    places = {}
    if base is not None and bases.is_model(Path(base).expanduser()):
        record = bases.new_place("", Path(base), step)
        # Absolute: PEFT looks up a relative path from the working directory.
        name = record.path
        places[BASE_KEY] = replace(record, name=name)
    config[BASE_KEY] = name
    config["inference_mode"] = True
    # Enums by their values, as PEFT's own files have them.
    config = {key: getattr(value, "value", value) for key, value in config.items()}
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    with atomic_file(folder / WEIGHTS_FILE) as partial:
        save_tensors(state, partial)
    write_text(folder / CONFIG_FILE, text + "\n")
    bases.write(folder, places)
    if settings is not None:
        write_json(folder / SETTINGS_FILE, dict(settings), indent=1)


def load_adapter(model: Any, folder: Path) -> Any:
    """Puts the adapters of a PEFT folder onto `model`, which then computes what `peft` computes.

    q, k and v share one A if those of the file are equal.

    Raises:
        UserError: the model has adapters already.
        ModelFolderError: a damaged folder, a setting that is not computed here, or adapters of
            another model.
    """
    if has_adapters(model):
        raise UserError("the model has adapters already; merge them first")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    resolved = adapter_layers.resolve(model, folder)
    adapter_layers.apply(model, resolved)
    dropout = resolved.settings.lora_dropout
    for name, layer in _layers(model):
        layer.get_base_layer().requires_grad_(False)
        if fused_lora.is_plain(layer) and dropout:
            layer.lora_dropout[_ADAPTER] = DrawnDropout(dropout)
        layer.train(model.training)
        if name.endswith(".v_proj") and _equal_a(model, name.removesuffix("v_proj")):
            _share_a(model, name.replace(".v_proj", ".q_proj"))
    # Last: also the loop above has frozen layers.
    _keep_trainable(model, trained)
    return model


def _keep_trainable(model: nn.Module, trained: set[str]) -> None:
    """Sets the parameters named in `trained` to train again."""
    # PEFT freezes everything but the adapters when it injects them.
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)


def _equal_a(model: Any, stem: str) -> bool:
    """True if q, k and v have the same A and are plain LoRA of one scale."""
    attention = model.get_submodule(stem[:-1])
    layers: list[Any] = [getattr(attention, f"{x}_proj", None) for x in "qkv"]
    if not all(fused_lora.is_plain(layer) for layer in layers):
        return False
    q, *others = layers
    return all(
        layer.scaling == q.scaling
        and torch.equal(layer.lora_A[_ADAPTER].weight, q.lora_A[_ADAPTER].weight)
        for layer in others
    )


def load_official(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """Puts adapters of an official LoRA checkpoint (by our names) onto `model`; alpha is 2 rank."""
    # Ranks are read from the shapes, which the layers must fit.
    ranks = {
        part_name: next(
            (t.shape[0] for n, t in state.items() if n.startswith(PARTS[part_name])), None
        )
        for part_name in _LINEARS
    }
    adapters = {name: Adapter(rank, 2.0 * rank) for name, rank in ranks.items() if rank}
    inject(model, adapters)
    _fill(model, state, folder)
    return model


def _fill(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Copies adapter weights by module name into the injected layers, each exactly once."""
    left = dict(state)
    for name, layer in _layers(model):
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)[_ADAPTER].weight
            stored = left.pop(f"{name}.{matrix}.weight", None)
            if stored is None or stored.shape != weight.shape:
                shape = "missing" if stored is None else f"{tuple(stored.shape)}"
                raise ModelFolderError(
                    f"{folder}: {name}.{matrix} is {shape}, the model needs {tuple(weight.shape)}; "
                    "these adapters are of another model"
                )
            with torch.no_grad():
                weight.copy_(stored)
    if left:
        raise ModelFolderError(f"{folder}: adapters for unknown layers, {next(iter(left))}")
