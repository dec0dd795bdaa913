"""Frozen linear layers whose matrix products are in float8, on GPUs that have such products.

A frozen weight is rounded to e4m3 once, with a scale for each output channel. What enters a layer
is rounded anew each time, with a scale for each token. A weight that passes a gradient on is stored
a second time, transposed and with a scale for each input channel, so that both copies together take
what the bfloat16 weight took. Scales are powers of two (as torchao's row-wise recipe has them):
both copies then stand for the same numbers, and the gradient is that of the rounded layer.

e4m3 has three bits of mantissa: rounding moves a number by 2.6 % in the root mean square, and a
product of two rounded matrices by 3.7 %. Gradients are in e4m3 too. e5m2 would halve their
precision for a range that nothing needs: with a scale for each token, e4m3 reaches down to 2^-17 of
the token's largest number.
"""

import logging
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from internvl.errors import UserError

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
_SIDE = 16
"""What both sides of a matrix must be a multiple of."""
_LEAST = 2.0**-100
"""Stands for the largest number of a row of zeros."""


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> (M, K) in e4m3 and the scales (M, 1), float32: rows = e4m3 x scale.

    A row with a number that is not finite becomes one of NaN.
    """
    wide = rows.float()
    # A row of zeros has no largest number to take the logarithm of.
    largest = wide.abs().amax(1, keepdim=True).clamp(min=_LEAST)
    exponent = torch.ceil(torch.log2(largest / torch.finfo(E4M3).max))
    return (wide * torch.exp2(-exponent)).to(E4M3), torch.exp2(exponent)


def _product(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows (M, K) times an e4m3 weight (N, K), transposed, with scales (1, N): bfloat16 (M, N)."""
    return _rounded_product(*quantize(rows), weight, scale, bias)


def _rounded_product(
    small: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    return torch._scaled_mm(
        small,
        weight.t(),
        scale_a=row_scale,
        scale_b=scale,
        bias=bias,
        out_dtype=torch.bfloat16,
        # Partial sums have fewer bits than float32: far below the rounding of the factors.
        use_fast_accum=True,
    )


class _FrozenProduct(torch.autograd.Function):
    """The product and the gradient of its input; the weight has none, so no input is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        back_weight: Tensor,
        back_scale: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(back_weight, back_scale)
        ctx.dtype = rows.dtype
        return _product(rows, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # e4m3 here too: e5m2 has a range that nothing needs with a scale for each token.
        gradient = _product(gradients[0], *ctx.saved_tensors)
        return gradient.to(ctx.dtype), None, None, None, None, None


class Float8Linear(nn.Module):
    """A frozen `nn.Linear` (N, K) with float8 products.

    `weight` e4m3 (N, K), `scale` float32 (1, N); for the gradient of the input `back_weight` e4m3
    (K, N) and `back_scale` float32 (1, K), or None if no gradient passes.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear, *, passes_gradient: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight, scale = quantize(layer.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.t().contiguous())
        # Both stay None below the first weight that trains: half the memory.
        back, back_scale = None, None
        if passes_gradient:
            back, back_scale = quantize(layer.weight.detach().t().contiguous())
            back_scale = back_scale.t().contiguous()
        self.register_buffer("back_weight", back)
        self.register_buffer("back_scale", back_scale)
        self.bias = None
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().bfloat16(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., K) -> (..., N), bfloat16."""
        rows = inputs.reshape(-1, self.in_features)
        if self.back_weight is None:
            outputs = _product(rows, self.weight, self.scale, self.bias)
        else:
            weights = (self.weight, self.scale, self.bias, self.back_weight, self.back_scale)
            outputs = _FrozenProduct.apply(rows, *weights)
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def rounded(self, small: Tensor, scale: Tensor, shape: Sequence[int]) -> Tensor:
        """As `forward` for inputs (*shape, K) that `quantize` has rounded to `small` and `scale`.

        Without a gradient.
        """
        outputs = _rounded_product(small, scale, self.weight, self.scale, self.bias)
        return outputs.view(*shape, self.out_features)

    def extra_repr(self) -> str:
        gradient = self.back_weight is not None
        return f"{self.in_features}, {self.out_features}, passes_gradient={gradient}"


def convert_frozen_linears(model: Any, device: torch.device, key: str = "compute.float8") -> int:
    """Replaces the frozen linear layers in the blocks of a chat model by `Float8Linear`s.

    Adapters stay on them. Layers that train, those with a side that is no multiple of 16, and
    everything around the blocks (embeddings, projector, output matrix) stay as they are.

    Args:
        key: the setting that asked for it, in error messages.

    Returns:
        how many layers were replaced.

    Raises:
        UserError: a GPU without float8 products, or no layer to replace.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        check_gpu(name, torch.cuda.get_device_capability(device), key)
    tower, language = model.model.vision_tower, model.model.language_model
    # A gradient passes through a layer only if something before it trains.
    below = _trains(tower.embeddings)
    count = 0
    for block in tower.encoder.layer:
        below = below or _trains(block)
        count += _convert(block, passes_gradient=below)
    below = below or _trains(model.model.multi_modal_projector) or _trains(language.embed_tokens)
    for block in language.layers:
        below = below or _trains(block)
        count += _convert(block, passes_gradient=below)
    if not count:
        raise UserError(
            f"{key}: no linear layer of the model's blocks is frozen; set "
            "compute.float8=false, or train adapters (model.lora)"
        )
    logger.info("%d frozen linear layers compute in float8", count)
    return count


def check_gpu(name: str, capability: tuple[int, int], key: str = "compute.float8") -> None:
    """Raises UserError if a GPU of this compute capability has no float8 products."""
    if capability < (8, 9):
        remedy = f"set {key}=false" if key == "compute.float8" else f"leave {key} out"
        raise UserError(
            f"{key}: {name} has no float8 products, which came with compute capability "
            f"8.9 (Ada, Hopper); {remedy}"
        )


def is_used(model: nn.Module) -> bool:
    """True if any layer was replaced."""
    return any(isinstance(module, Float8Linear) for module in model.modules())


def _convert(block: nn.Module, *, passes_gradient: bool) -> int:
    # Listed first: replacing modules while walking over them would visit the new ones.
    layers = [(name, module) for name, module in block.named_modules() if _is_convertible(module)]
    for name, layer in layers:
        block.set_submodule(name, Float8Linear(layer, passes_gradient=passes_gradient))
    return len(layers)


def _is_convertible(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        # By exact type: bitsandbytes' layers are subclasses, and compute something else.
        type(module) is nn.Linear
        and not _trains(module)
        and module.in_features % _SIDE == module.out_features % _SIDE == 0
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
