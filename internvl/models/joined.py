"""LoRA at the price of slightly wider base products.

A layer with an adapter is W x + s B A x. Beside W x, the outputs of B would be written, read and
added once more, and the gradient read twice: memory traffic that costs more than the adapter's
FLOPs. Here the base weight lies in one buffer with B, and one product does both:

    y      = [W, B] [x, s A x]
    dx, du = [W, B]' dy          du: of the inner output s A x

On a GPU dropout before A leaves no mask in memory (dropped.py).
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

from internvl.models import dropped as kernels

_ADAPTER = "default"


class JoinedLinear(Linear):
    """PEFT's LoRA layer, its parameters as they are, with one product for base and B.

    `joined` is (out, in + rank) in the base's type. The base's weight is a view of it; B is copied
    there by `refresh` whenever it has changed.
    """

    joined: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, in) -> (…, out) in the base's type."""
        kind = self.joined.dtype
        x = x.to(kind)
        dropout = self.lora_dropout[_ADAPTER]
        rate = getattr(dropout, "rate", 0.0) if self.training else 0.0
        dropped = None
        if rate and kernels.used(x):
            dropped, rate = dropout.draw_seed(x), kernels.possible(rate)
        elif rate:
            dropped = dropout.draw(x)
        a, b = self.lora_A[_ADAPTER].weight, self.lora_B[_ADAPTER].weight
        fixed = (self.joined, self.base_layer.bias, self.scaling[_ADAPTER])
        return _Joined.apply(x, a, b, dropped, rate, *fixed)


class _Joined(torch.autograd.Function):
    """The layer; `dropped` is where dropout at `rate` makes the input of A zero: a mask (bool, of
    the input's shape), its seed (int32), or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        dropped: Tensor | None,
        rate: float,
        joined: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        a = a.to(x.dtype)
        if _is_seed(dropped):
            inner = kernels.down(_rows(x), a, dropped, rate).view(*x.shape[:-1], len(a))
        else:
            seen = x if dropped is None else x.masked_fill(dropped, 0) / (1 - rate)
            inner = F.linear(seen, a)
        both = torch.cat([x, inner * scale], -1)
        widths = [x.shape[-1], inner.shape[-1]]
        # With dropout x itself is kept: the compiler would keep it beside `both`.
        kept = both.split(widths, -1) if dropped is None else (x, inner)
        ctx.save_for_backward(*kept, a, dropped, joined)
        ctx.rate, ctx.scale = rate, scale
        return F.linear(both, joined, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, dropped, joined = ctx.saved_tensors
        gradient = gradients[0].to(joined.dtype)
        dx, du = (gradient @ joined).split([x.shape[-1], len(a)], -1)
        db = (_rows(gradient).t() @ _rows(inner)).float()
        du = du * ctx.scale
        if dropped is None:
            return dx + du @ a, (_rows(du).t() @ _rows(x)).float(), db, *[None] * 5
        db = db * ctx.scale
        # x is changed before it is used: as it is, the compiler would keep it rather than make it
        # again from what it keeps anyway.
        factor = 1 / (1 - ctx.rate)
        if _is_seed(dropped):
            through_a = kernels.up(_rows(du), a, dropped, ctx.rate).view(x.shape)
            da = kernels.across(_rows(du), _rows(x * factor), dropped, ctx.rate)
        else:
            through_a = (du @ a * factor).masked_fill(dropped, 0)
            da = (_rows(du).t() @ _rows(x * dropped.logical_not() * factor)).float()
        return dx + through_a, da, db, *[None] * 5


def _is_seed(dropped: Tensor | None) -> TypeGuard[Tensor]:
    return dropped is not None and dropped.dtype == torch.int32


def _rows(values: Tensor) -> Tensor:
    """(…, D) -> (M, D)."""
    return values.reshape(-1, values.shape[-1])


def join(model: nn.Module) -> int:
    """Joins every adapter on a frozen linear layer with its base; how many.

    Those with another base (4 bits, float8) stay as PEFT computes them. Names and values of
    parameters do not change.
    """
    count = 0
    for module in model.modules():
        if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
            continue
        weight, b = module.base_layer.weight, _b(module)
        if weight.requires_grad:
            continue
        joined = torch.cat([weight.detach(), b.detach().to(weight.dtype)], 1)
        module.register_buffer("joined", joined, persistent=False)
        weight.data = joined[:, : weight.shape[1]]
        module.__class__ = JoinedLinear
        count += 1
    return count


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Copies every B to its place beside the base: after a step, or a loaded checkpoint."""
    layers = list(_joined(model))
    if layers:
        places = [layer.joined[:, layer.in_features :] for layer in layers]
        torch._foreach_copy_(places, [_b(layer) for layer in layers])


def part(model: nn.Module) -> None:
    """Undoes `join`."""
    for layer in list(_joined(model)):
        layer.base_layer.weight.data = layer.base_layer.weight.data.contiguous()
        del layer.joined
        layer.__class__ = Linear


def _joined(model: nn.Module) -> Iterator[JoinedLinear]:
    return (module for module in model.modules() if isinstance(module, JoinedLinear))


def _b(layer: Any) -> Tensor:
    return layer.lora_B[_ADAPTER].weight
