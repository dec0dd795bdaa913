"""LoRA at the cost of slightly wider base products.

A layer with an adapter is W x + s B A x. Computed apart, the output of B is written, read and added
to that of W, and the gradient is read twice: memory traffic that costs more than the adapter's
FLOPs. Here the base weight lies in one buffer with B, and one product does both:

    y      = [W, B] [x, s A x]
    dx, du = [W, B]' dy          du: gradient of the inner output s A x

q, k and v that share one A (as in the original's fused projection) share the buffer as well, row
below row, and the input with its inner output; their backward pass is one product. On a GPU dropout
before A leaves no mask in memory (seeded_dropout.py).

The parameters stay PEFT's, so B exists twice. Nobody has to remember that: a fused layer compares
the version counters of its parameters with those it copied (torch counts every in-place write), and
copies again when they differ. Compiled layers cannot look at counters; the stack of blocks that
holds them does so before it runs. Writes through `.data` are not counted and must not be used.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from internvl.models.adapters import seeded_dropout
from internvl.models.adapters.dropout import DrawnDropout, RepeatedDropout
from internvl.models.modules import replace_module

_ADAPTER = "default"


class FusedLinear(Linear):
    """PEFT's LoRA layer with one product for base and B; its parameters keep names and values."""

    fused: Tensor
    """(out, in + rank) in the base's dtype, `out` of this layer and its `followers`: the base
    weights are views of it, every B is copied into it."""
    followers: "tuple[Follower, ...]"
    """Layers that are called with the same input after this one: a tuple and no ModuleList, so that
    their parameters keep one name."""
    copied: list[tuple[nn.Module, Tensor, int]]
    """(linear layer, its weight, the weight's version) of all that is in `fused`."""
    views: "_Views | None"
    """What `_sync` copies, None before the first time."""
    sync_hook: RemovableHandle
    """The hook of the stack of blocks that this layer is in."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(…, in) -> (…, out) in the base's dtype; leaves the followers' outputs with them."""
        if not torch.compiler.is_compiling() and self.is_stale():
            _sync([self])
        x = x.to(self.fused.dtype)
        if self.disable_adapters:
            for follower in self.followers:
                follower.output = follower.base_layer(x)
            return self.base_layer(x)
        dropout = self.lora_dropout[_ADAPTER]
        rate = 0.0 if isinstance(dropout, nn.Identity) or not self.training else dropout.rate
        dropped = None
        if rate and seeded_dropout.used(x):
            dropped = dropout.draw_seed(x)
        elif rate:
            dropped = dropout.draw(x)
        if rate and self.followers:
            dropout.dropped = None  # the followers' dropouts are not called, so none would free it
        layers: list[Any] = [self, *self.followers]
        fixed = (self.fused, [layer.base_layer.bias for layer in layers], self.scaling[_ADAPTER])
        a, bs = self.lora_A[_ADAPTER].weight, [_b(layer) for layer in layers]
        # Bs are arguments for their gradients alone; their values are read from `fused`.
        first, *others = _FusedProduct.apply(x, a, dropped, rate, *fixed, *bs)
        for follower, output in zip(self.followers, others, strict=True):
            follower.output = output
        return first

    def is_stale(self) -> bool:
        """True if a weight was written or replaced since it was copied into `fused`."""
        return any(
            linear.weight is not weight or weight._version != version
            for linear, weight, version in self.copied
        )


class _Views(NamedTuple):
    """Views of a `fused`, taken once: a step that takes them anew waits for the host."""

    linears: list[Any]
    """Every base layer and B."""
    memory: list[int]
    """Addresses of `fused` and of their weights."""
    columns: list[Tensor]
    """The columns (out, rank) of each B."""
    bs: list[Tensor]


class Follower(Linear):
    """A layer whose output its leader has computed from the same input."""

    output: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output (…, out) that the leader computed, once."""
        output, self.output = self.output, None
        assert output is not None, "called before the layer that it follows"
        return output


class _FusedProduct(torch.autograd.Function):
    """The layers side by side; `dropped` says where dropout at `rate` sets the input of A to zero:
    a mask (bool, shape of the input), its seed (int32), or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        dropped: Tensor | None,
        rate: float,
        fused: Tensor,
        biases: list[Tensor | None],
        scale: float,
        *bs: Tensor,
    ) -> tuple[Tensor, ...]:
        a = a.to(x.dtype)
        if _is_seed(dropped):
            inputs = seeded_dropout.zeroed(x, dropped, rate)
            # The factor on the narrow side: on x it would be a pass of its own.
            inner = F.linear(inputs, a) / (1 - rate)
        else:
            inputs = x if dropped is None else x.masked_fill(dropped, 0) / (1 - rate)
            inner = F.linear(inputs, a)
        saved, outputs = _outputs(x, inner * scale, fused, [len(b) for b in bs], biases)
        # With dropout x itself is saved: the compiler would save it beside what it is joined in.
        if dropped is not None:
            saved = x, inner
        ctx.save_for_backward(*saved, a, dropped, fused)
        ctx.rate, ctx.scale, ctx.outputs = rate, scale, [len(b) for b in bs]
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, dropped, fused = ctx.saved_tensors
        gradients = tuple(gradient.to(fused.dtype) for gradient in gradients)
        gradient = torch.cat(gradients, -1) if len(gradients) > 1 else gradients[0]
        dx, du = (gradient @ fused).split([x.shape[-1], len(a)], -1)
        db = (_rows(gradient).t() @ _rows(inner)).float()
        du = du * ctx.scale
        if dropped is None:
            da = (_rows(du).t() @ _rows(x)).float()
            # No gradients for dropped, rate, fused, biases and scale.
            return dx + du @ a, da, *[None] * 5, *db.split(ctx.outputs)
        db = db * ctx.scale
        factor = 1 / (1 - ctx.rate)
        if _is_seed(dropped):
            du = du * factor
            through_a = seeded_dropout.zeroed(du @ a, dropped, ctx.rate, again=True)
            # Saved with dropout applied it would be 11 GiB more for a 2B model, and no faster.
            x = seeded_dropout.zeroed(x, dropped, ctx.rate, again=True)
            da = (_rows(du).t() @ _rows(x)).float()
        else:
            # x is multiplied before it is used: as it is, the compiler would save it rather than
            # recompute it from what it saves anyway.
            through_a = (du @ a * factor).masked_fill(dropped, 0)
            da = (_rows(du).t() @ _rows(x * dropped.logical_not() * factor)).float()
        return dx + through_a, da, *[None] * 5, *db.split(ctx.outputs)


def _outputs(
    x: Tensor, inner: Tensor, fused: Tensor, widths: list[int], biases: list[Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Returns (x, s A x) as they are to be saved, and the output of each layer."""
    inputs = x.shape[-1]
    # A narrow y is written twice sooner than a wide x is copied beside s A x.
    if len(biases) == 1 and inputs > len(fused):
        weight, b = fused.split([inputs, fused.shape[1] - inputs], 1)
        y = torch.addmm(F.linear(_rows(inner), b, biases[0]), _rows(x), weight.t())
        return (x, inner), (y.view(*x.shape[:-1], len(fused)),)
    both = torch.cat([x, inner], -1)
    saved = both.split([inputs, inner.shape[-1]], -1)
    if len(set(widths)) == 1 and len(widths) > 1:
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        return saved, F.linear(both, fused, bias).split(widths, -1)
    # Fewer keys than queries: as views of one output, the values that attention saves would keep
    # all of it in memory.
    layers = zip(fused.split(widths), biases, strict=True)
    return saved, tuple(F.linear(both, weight, bias) for weight, bias in layers)


def _is_seed(dropped: Tensor | None) -> TypeGuard[Tensor]:
    return dropped is not None and dropped.dtype == torch.int32


def _rows(values: Tensor) -> Tensor:
    """(…, D) -> (M, D)."""
    return values.reshape(-1, values.shape[-1])


def is_plain(layer: Any) -> bool:
    """True if a layer computes W x + b + s B A x, with one adapter, and nothing else."""
    return (
        isinstance(layer, LoraLayer)
        and list(layer.lora_A) == [_ADAPTER]
        and isinstance(layer.lora_A[_ADAPTER], nn.Linear)
        and not isinstance(layer, ParamWrapper)
        and not layer.lora_variant
        and not layer.lora_bias[_ADAPTER]
        and not getattr(layer, "fan_in_fan_out", False)
    )


def fuse(model: nn.Module) -> int:
    """Fuses every adapter on a frozen linear layer with its base; returns how many.

    Adapters on another base (4 bits, float8), and those that compute more than plain LoRA (DoRA, a
    bias that trains, …), stay as PEFT computes them. Names and values of parameters do not change.
    """
    groups: dict[tuple[int, torch.dtype, float], list[str]] = {}
    module: Any
    for name, module in model.named_modules():
        if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
            continue
        if not is_plain(module) or not _can_drop(module.lora_dropout[_ADAPTER]):
            continue
        weight = module.base_layer.weight
        # One product has no gradients for the base and gives all its rows one scale.
        if any(parameter.requires_grad for parameter in module.base_layer.parameters()):
            continue
        # Layers that share A are called in the order of the modules (lora.py).
        group = (id(module.lora_A[_ADAPTER]), weight.dtype, module.scaling[_ADAPTER])
        groups.setdefault(group, []).append(name)
    stacks: dict[str, list[FusedLinear]] = {}
    for names in groups.values():
        stacks.setdefault(_stack_of(model, names[0]), []).append(_fuse_group(model, names))
    for stack, leaders in stacks.items():
        hook = model.get_submodule(stack).register_forward_pre_hook(_SyncBefore(leaders))
        for leader in leaders:
            leader.sync_hook = hook
    if stacks:
        _count_optimizer_writes()
    return sum(map(len, groups.values()))


def _can_drop(dropout: nn.Module) -> bool:
    """True if a layer has no dropout, or one that can return its mask."""
    return isinstance(dropout, nn.Identity | DrawnDropout | RepeatedDropout)


def _stack_of(model: nn.Module, name: str) -> str:
    """Returns the name of the module that runs the list of blocks a layer is in, else the root's.

    A stack is the innermost module around compiled blocks: a hook on it runs outside of them.
    """
    words = name.split(".")
    for depth in range(len(words)):
        if isinstance(model.get_submodule(".".join(words[: depth + 1])), nn.ModuleList):
            return ".".join(words[:depth])
    return ""


def _fuse_group(model: nn.Module, names: list[str]) -> FusedLinear:
    """Fuses the layers that share one A; returns the first, which computes for all."""
    leader = replace_module(model, names[0], FusedLinear)
    leader.followers = tuple(replace_module(model, name, Follower) for name in names[1:])
    layers: list[Any] = [leader, *leader.followers]
    rows = sum(layer.out_features for layer in layers)
    columns = leader.in_features + leader.r[_ADAPTER]
    # One buffer for base and B: concatenated in every forward, it would be copied each time.
    buffer = leader.base_layer.weight.detach().new_empty(rows, columns)
    # Not persistent: a checkpoint has the base and B under PEFT's names.
    leader.register_buffer("fused", buffer, persistent=False)
    leader.views = None
    _sync([leader])
    return leader


def _share_bases(leader: FusedLinear) -> None:
    """Makes base weights that have memory of their own views of `fused`, with their values."""
    layers: list[Any] = [leader, *leader.followers]
    weights = [layer.base_layer.weight for layer in layers]
    memory = leader.fused.untyped_storage()
    for weight, rows in zip(weights, leader.fused.split([len(w) for w in weights]), strict=True):
        if weight.untyped_storage() is not memory:
            rows = rows[:, : weight.shape[1]]
            rows.copy_(weight)
            weight.data = rows


def _memory(fused: Tensor, linears: list[Any]) -> list[int]:
    return [fused.data_ptr(), *[linear.weight.data_ptr() for linear in linears]]


def _views(leader: FusedLinear) -> _Views:
    """Makes base weights views of `fused` again and takes the columns of every B."""
    _share_bases(leader)
    layers: list[Any] = [leader, *leader.followers]
    linears: list[Any] = [x for layer in layers for x in (layer.base_layer, layer.lora_B[_ADAPTER])]
    bs = [_b(layer) for layer in layers]
    columns = leader.fused[:, leader.in_features :].split([len(b) for b in bs])
    return _Views(linears, _memory(leader.fused, linears), list(columns), bs)


@torch.no_grad()
def _sync(leaders: Iterable[FusedLinear]) -> None:
    """Copies every B into its columns of `fused`, and bases that were replaced or moved."""
    columns, bs = [], []
    for leader in leaders:
        views = leader.views
        # The device waits for this at the start of every step, so all but the first time it is a
        # comparison of addresses.
        if views is None or views.memory != _memory(leader.fused, views.linears):
            views = leader.views = _views(leader)
        columns += views.columns
        bs += views.bs
        weights = [(linear, linear.weight) for linear in views.linears]
        leader.copied = [(linear, weight, weight._version) for linear, weight in weights]
    torch._foreach_copy_(columns, bs)


class _SyncBefore:
    """Forward pre-hook of a stack of blocks: copies what has changed in its fused layers.

    An object rather than a closure, so that a deep copy of the model syncs its own layers.
    """

    def __init__(self, leaders: list[FusedLinear]) -> None:
        self.leaders = leaders

    def __call__(self, module: nn.Module, args: Any) -> None:
        stale = [leader for leader in self.leaders if leader.is_stale()]
        if stale:
            _sync(stale)


@cache
def _count_optimizer_writes() -> RemovableHandle:
    """Makes every optimizer count what it writes, once a process; torch's fused ones do not."""
    return register_optimizer_step_post_hook(_count_writes)


def _count_writes(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def unfuse(model: nn.Module) -> None:
    """Undoes `fuse`: PEFT's layers, each with a contiguous base weight of its own."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, FusedLinear | Follower)]
    module: Any
    for name, module in layers:
        weight = module.base_layer.weight
        weight.data = weight.data.contiguous()
        plain = replace_module(model, name, Linear)
        if isinstance(module, FusedLinear):
            module.sync_hook.remove()
            del plain.fused, plain.followers, plain.copied, plain.views, plain.sync_hook


def _b(layer: Any) -> Tensor:
    return layer.lora_B[_ADAPTER].weight
