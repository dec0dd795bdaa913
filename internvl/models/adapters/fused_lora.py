"""LoRA at the price of slightly wider base products.

A layer with an adapter is W x + s B A x. Beside W x, the outputs of B would be written, read and
added once more, and the gradient read twice: memory traffic that costs more than the adapter's
FLOPs. Here the base weight lies in one buffer with B, and one product does both:

    y      = [W, B] [x, s A x]
    dx, du = [W, B]' dy          du: of the inner output s A x

Where q, k and v share one A, as the original's fused projection does, they share the buffer as
well, row below row, and the input with its inner output; backward is one product. On a GPU dropout
before A leaves no mask in memory (seeded_dropout.py).
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from internvl.models.adapters import seeded_dropout as kernels

_ADAPTER = "default"


class JoinedLinear(Linear):
    """PEFT's LoRA layer, its parameters as they are, with one product for base and B.

    `joined` is (out, in + rank) in the base's type, `out` of this layer and its `followers`. Their
    bases' weights are views of it; every B is copied there by `refresh` whenever it has changed.
    """

    joined: Tensor
    followers: "tuple[Follower, ...]"
    """Layers that are called with the same input after this one: a tuple, so that their parameters
    keep one name."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, in) -> (…, out) in the base's type; the followers' outputs wait with them."""
        kind = self.joined.dtype
        x = x.to(kind)
        dropout = self.lora_dropout[_ADAPTER]
        rate = getattr(dropout, "rate", 0.0) if self.training else 0.0
        dropped = None
        if rate and kernels.used(x):
            dropped, rate = dropout.draw_seed(x), kernels.possible(rate)
        elif rate:
            dropped = dropout.draw(x)
        if rate and self.followers:
            dropout.dropped = None  # which would wait for them
        layers: list[Any] = [self, *self.followers]
        fixed = (self.joined, [layer.base_layer.bias for layer in layers], self.scaling[_ADAPTER])
        a, bs = self.lora_A[_ADAPTER].weight, [_b(layer) for layer in layers]
        own, *others = _Joined.apply(x, a, dropped, rate, *fixed, *bs)
        for follower, output in zip(self.followers, others, strict=True):
            follower.output = output
        return own


class Follower(Linear):
    """A layer whose output another one has made, from the same input."""

    output: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the leader made of this input."""
        output, self.output = self.output, None
        assert output is not None, "called before the layer that it follows"
        return output


class _Joined(torch.autograd.Function):
    """The layers side by side; `dropped` is where dropout at `rate` makes the input of A zero: a
    mask (bool, of the input's shape), its seed (int32), or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        dropped: Tensor | None,
        rate: float,
        joined: Tensor,
        biases: list[Tensor | None],
        scale: float,
        *bs: Tensor,
    ) -> tuple[Tensor, ...]:
        a = a.to(x.dtype)
        if _is_seed(dropped):
            inner = kernels.down(_rows(x), a, dropped, rate).view(*x.shape[:-1], len(a))
        else:
            seen = x if dropped is None else x.masked_fill(dropped, 0) / (1 - rate)
            inner = F.linear(seen, a)
        kept, outputs = _outputs(x, inner * scale, joined, [len(b) for b in bs], biases)
        # With dropout x itself is kept: the compiler would keep it beside what it is joined in.
        ctx.save_for_backward(*(kept if dropped is None else (x, inner)), a, dropped, joined)
        ctx.rate, ctx.scale, ctx.outputs = rate, scale, [len(b) for b in bs]
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, dropped, joined = ctx.saved_tensors
        each = [gradient.to(joined.dtype) for gradient in gradients]
        gradient = torch.cat(each, -1) if len(each) > 1 else each[0]
        dx, du = (gradient @ joined).split([x.shape[-1], len(a)], -1)
        db = (_rows(gradient).t() @ _rows(inner)).float()
        du = du * ctx.scale
        if dropped is None:
            da = (_rows(du).t() @ _rows(x)).float()
            return dx + du @ a, da, *[None] * 5, *db.split(ctx.outputs)
        db = db * ctx.scale
        # x is changed before it is used: as it is, the compiler would keep it rather than make it
        # again from what it keeps anyway.
        factor = 1 / (1 - ctx.rate)
        if _is_seed(dropped):
            through_a, da = kernels.back(_rows(du), _rows(x * factor), a, dropped, ctx.rate)
            through_a = through_a.view(x.shape)
        else:
            through_a = (du @ a * factor).masked_fill(dropped, 0)
            da = (_rows(du).t() @ _rows(x * dropped.logical_not() * factor)).float()
        return dx + through_a, da, *[None] * 5, *db.split(ctx.outputs)


def _outputs(
    x: Tensor, inner: Tensor, joined: Tensor, widths: list[int], biases: list[Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """((x, s A x) as they are to be kept, y of each layer)."""
    inputs = x.shape[-1]
    if len(biases) == 1 and inputs > len(
        joined
    ):  # a narrow y is written twice sooner than a wide x
        weight, b = joined.split([inputs, joined.shape[1] - inputs], 1)
        y = torch.addmm(F.linear(_rows(inner), b, biases[0]), _rows(x), weight.t())
        return (x, inner), (y.view(*x.shape[:-1], len(joined)),)
    both = torch.cat([x, inner], -1)
    kept = both.split([inputs, inner.shape[-1]], -1)
    if len(set(widths)) == 1 and len(widths) > 1:
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        return kept, F.linear(both, joined, bias).split(widths, -1)
    # Fewer keys than queries: as parts of one output, the values that are kept would keep it whole.
    parts = zip(joined.split(widths), biases, strict=True)
    return kept, tuple(F.linear(both, part, bias) for part, bias in parts)


def _is_seed(dropped: Tensor | None) -> TypeGuard[Tensor]:
    return dropped is not None and dropped.dtype == torch.int32


def _rows(values: Tensor) -> Tensor:
    """(…, D) -> (M, D)."""
    return values.reshape(-1, values.shape[-1])


def is_plain(layer: Any) -> bool:
    """Whether a layer computes W x + b + s B A x, with one adapter, and nothing else."""
    return (
        isinstance(layer, LoraLayer)
        and list(layer.lora_A) == [_ADAPTER]
        and isinstance(layer.lora_A[_ADAPTER], nn.Linear)
        and not isinstance(layer, ParamWrapper)
        and not layer.lora_variant
        and not layer.lora_bias[_ADAPTER]
        and not getattr(layer, "fan_in_fan_out", False)
    )


def join(model: nn.Module) -> int:
    """Joins every adapter on a frozen linear layer with its base; how many.

    Those with another base (4 bits, float8), and those that compute more than plain LoRA (DoRA, a
    bias that trains, …), stay as PEFT computes them. Names and values of parameters do not change.
    """
    groups: dict[tuple[int, torch.dtype, float], list[Any]] = {}
    module: Any
    for module in model.modules():
        if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
            continue
        if not is_plain(module) or not _can_drop(module.lora_dropout[_ADAPTER]):
            continue
        weight = module.base_layer.weight
        # One product has no gradients for the base and gives all its rows one scale.
        if any(parameter.requires_grad for parameter in module.base_layer.parameters()):
            continue
        # Who shares A is called in the order of the modules (lora.py).
        group = (id(module.lora_A[_ADAPTER]), weight.dtype, module.scaling[_ADAPTER])
        groups.setdefault(group, []).append(module)
    for leader, *followers in groups.values():
        _join(leader, followers)
    return sum(map(len, groups.values()))


def _can_drop(dropout: nn.Module) -> bool:
    """Whether the layer's dropout is none, or one whose mask can be had (lora.py)."""
    return isinstance(dropout, nn.Identity) or hasattr(dropout, "rate")


def _join(leader: Linear, followers: list[Linear]) -> None:
    layers = [leader, *followers]
    weights = [layer.base_layer.weight for layer in layers]
    bs = torch.cat([_b(layer).detach().to(weights[0]) for layer in layers])
    joined = torch.cat([torch.cat([weight.detach() for weight in weights]), bs], 1)
    leader.register_buffer("joined", joined, persistent=False)
    for weight, rows in zip(weights, joined.split([len(w) for w in weights]), strict=True):
        weight.data = rows[:, : weight.shape[1]]
    leader.__class__ = JoinedLinear
    for follower in followers:
        follower.__class__ = Follower
    leader.followers = tuple(followers)


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Copies every B to its place beside the base: after a step, or a loaded checkpoint."""
    places, bs = [], []
    for leader in _leaders(model):
        new = [_b(layer) for layer in (leader, *leader.followers)]
        places += leader.joined[:, leader.in_features :].split([len(b) for b in new])
        bs += new
    if bs:
        torch._foreach_copy_(places, bs)


def part(model: nn.Module) -> None:
    """Undoes `join`."""
    for leader in list(_leaders(model)):
        layers: list[Any] = [leader, *leader.followers]
        for layer in layers:
            layer.base_layer.weight.data = layer.base_layer.weight.data.contiguous()
            layer.__class__ = Linear
        del leader.joined, leader.followers


def _leaders(model: nn.Module) -> Iterator[JoinedLinear]:
    return (module for module in model.modules() if isinstance(module, JoinedLinear))


def _b(layer: Any) -> Tensor:
    return layer.lora_B[_ADAPTER].weight
