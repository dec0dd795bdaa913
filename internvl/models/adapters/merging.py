"""Merging of adapters into their weights, as PEFT's `merge_and_unload`, with each layer checked."""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv2d, Embedding, ParamWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from internvl.errors import UserError
from internvl.models.adapters import fused_lora

ADAPTER = "default"
"""The name of the one adapter a model has at a time."""


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yields (name in the model, layer with an adapter); of nested ones the outermost."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ".base_layer" not in name:
            yield name, module


def unwrapped(name: str) -> str:
    """Returns a module's name without the wrappers of compilation and recomputation."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def merge(model: Any) -> Any:
    """Merges every adapter into its layer's weights, in float32 and rounded once to their dtype.

    Each layer is compared with its output before, within its dtype's rounding. For plain LoRA that
    output is computed from the adapter's settings rather than by the layer.

    Raises:
        UserError: no adapters (merged already), an adapter that no weight can take in, or a base
            that is quantized or in float8.
        RuntimeError: a merged layer computes something else.
    """
    # Merged weights need memory of their own; fused ones are views.
    fused_lora.unfuse(model)
    adapted = list(adapted_layers(model))
    if not adapted:
        raise UserError("the model has no adapters; were they merged already?")
    for name, layer in adapted:
        merged = merged_parameters(layer, name)
        base = layer.get_base_layer()
        inputs, expected = _before(model, layer, unwrapped(name))
        with torch.no_grad():
            for leaf, values in merged.items():
                getattr(base, leaf).copy_(values)
            outputs = _after(base, layer, inputs)
        error = (outputs - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        dtype = next(iter(merged.values())).dtype
        # Negated, so that NaN counts as a difference.
        if not error <= 32 * torch.finfo(dtype).eps:
            raise RuntimeError(f"{name}: merging changed its output by {float(error):.1e}")
        model.set_submodule(name, base)  # only now: a failed check leaves the adapters on
    # PEFT sets it on the model whose layers it replaces; a stack of layers alone has none.
    vars(model).pop("peft_config", None)
    return model


@torch.no_grad()
def merged_parameters(layer: LoraLayer, name: str) -> dict[str, Tensor]:
    """Returns the base's parameters with the adapter merged, by their names in the base layer.

    W + alpha / rank * B A (out, in) for plain LoRA; what PEFT merges for its variants.

    Raises:
        UserError: an adapter that no weight can take in, or a base that is quantized or in float8.
    """
    base = layer.get_base_layer()
    parameters = dict(base.named_parameters(recurse=False))
    for weight in parameters.values():
        _check_mergeable(weight, name)
    if fused_lora.is_plain(layer):
        # Not through PEFT, which adds in the weight's dtype and rounds twice.
        weight = parameters["weight"].detach()
        return {"weight": (weight.float() + delta(layer)).to(weight.dtype)}
    if layer.lora_bias.get(ADAPTER) and "bias" not in parameters:
        raise UserError(
            f"{name}: its adapter has a bias (lora_bias) and the layer itself has none, so that "
            "nothing can take it in; use the adapter as it is, or train one without lora_bias"
        )
    merged = _in_float32(layer)
    if isinstance(merged, ParamWrapper):
        values = merged.unload_and_optionally_merge_module(True, True, None)
    else:
        merged.merge(safe_merge=True)
        values = merged.get_base_layer()
    return {
        leaf: getattr(values, leaf).detach().to(weight.dtype) for leaf, weight in parameters.items()
    }


def _check_mergeable(weight: Tensor, name: str) -> None:
    if weight.dtype == torch.float8_e4m3fn:
        raise UserError(
            f"{name}: its base is in float8 for training; merge from the adapter in the run folder "
            "instead, which takes the weights as released"
        )
    # By name: bitsandbytes, which has these types, need not be installed.
    if not weight.is_floating_point() or type(weight).__name__ in ("Params4bit", "Int8Params"):
        raise UserError(
            f"{name}: its base is quantized; load the model without quantize, then the adapters, "
            "and merge that"
        )


def delta(layer: Any) -> Tensor:
    """alpha / rank * B A, float32 (out, in), of a plain layer."""
    a = layer.lora_A[ADAPTER].weight.detach().float()
    b = layer.lora_B[ADAPTER].weight.detach().float()
    return (b @ a) * layer.scaling[ADAPTER]


def _in_float32(layer: LoraLayer) -> Any:
    """Returns a copy of the layer in float32 and evaluation mode (no dropout)."""
    module: Any = layer
    return copy.deepcopy(module).float().eval()


@torch.no_grad()
def _before(model: Any, layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Returns (inputs, float32 outputs) of an adapted layer."""
    inputs = _probe(layer)
    if isinstance(layer, ParamWrapper):
        return inputs, _of_parameters(layer)
    if not fused_lora.is_plain(layer):
        return inputs, _in_float32(layer)(inputs)
    base, a, b = layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    update = F.linear(F.linear(inputs, a.weight.float()), b.weight.float())
    # From the settings: a layer with a wrong scale would merge it, and agree with itself.
    scale = _configured_scale(model.peft_config[ADAPTER], name, len(a.weight))
    return inputs, F.linear(inputs, base.weight.float()) + scale * update


def _configured_scale(settings: Any, name: str, rank: int) -> float:
    """Returns the scale of a layer's update, from the settings alone."""
    patterns = settings.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), name), settings.lora_alpha)
    return alpha / (math.sqrt(rank) if settings.use_rslora else rank)


def _after(base: Any, layer: Any, inputs: Tensor) -> Tensor:
    if isinstance(layer, ParamWrapper):
        # Nested wrappers, one for each adapted parameter, the last one outermost.
        names = []
        while isinstance(layer, ParamWrapper):
            names.append(layer.parameter_name)
            layer = layer.base_layer
        return torch.cat([getattr(base, name).detach().float().flatten() for name in names])
    if fused_lora.is_plain(layer):
        return F.linear(inputs, base.weight.float())
    return copy.deepcopy(base).float()(inputs)


def _probe(layer: Any) -> Tensor:
    """Draws inputs of a layer's base: tokens for embeddings, else float32."""
    base = layer.get_base_layer()
    device = next(base.parameters()).device
    if isinstance(layer, Embedding):
        return torch.randint(len(base.weight), (64,), device=device)
    if isinstance(layer, Conv2d):
        return torch.randn(2, base.in_channels, *base.kernel_size, device=device)
    return torch.randn(4, layer.in_features, device=device)


def _of_parameters(layer: Any) -> Tensor:
    """Returns the float32 values that nested layers compute with for their adapted parameters."""
    used = []
    layer = _in_float32(layer)
    while isinstance(layer, ParamWrapper):
        # PEFT has no public way to the weight that such a layer computes with.
        with layer._activate_lora(layer.active_adapters):
            used.append(layer.get_param().detach().flatten().clone())
        layer = layer.base_layer
    return torch.cat(used)


class MergedState(Mapping[str, Tensor]):
    """The state dict that a merged model would have; each weight is merged when it is read."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {unwrapped(name): layer for name, layer in adapted_layers(model)}
        self._state = {
            re.sub(r"(\.base_layer)+\.", ".", name): tensor
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name
        }

    def __getitem__(self, name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        layer = self._layers.get(module)
        if layer is None or (fused_lora.is_plain(layer) and leaf != "weight"):
            return self._state[name]
        return merged_parameters(layer, module)[leaf]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
