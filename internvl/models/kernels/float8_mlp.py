"""MLPs whose inner states are activated and rounded to e4m3 in one pass, where nothing trains.

The second matrix of an MLP takes rows too wide for the compiler's fused kernel to hold: it reads
them twice, and a tower's GELU was a pass of its own before that. A program for each row reads it
once. Not for training: there is no gradient.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation
from transformers.models.internvl.modeling_internvl import InternVLVisionMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from internvl.models.kernels.float8 import Float8Linear, quantize
from internvl.models.modules import replace_module

_HAS_TRITON = find_spec("triton") is not None

# Not `custom_op`, whose wrapper takes the processor 20 us a call.
_LIBRARY = torch.library.Library("internvl", "FRAGMENT")
_LIBRARY.define("activate_rounded(Tensor states, Tensor? gate) -> (Tensor, Tensor)")


def activate(states: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns GELU of the states, or SiLU of the gate times them, as `float8.quantize` does.

    Args:
        states, gate: (M, K), contiguous.
    """
    return torch.ops.internvl.activate_rounded(states, gate)


@torch.library.impl(_LIBRARY, "activate_rounded", "CPU")
def _(states: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = states.float()
    return quantize(F.gelu(wide) if gate is None else F.silu(gate.float()) * wide)


@torch.library.impl(_LIBRARY, "activate_rounded", "CUDA")
def _(states: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    from internvl.models.kernels import float8_triton

    return float8_triton.activate(states, gate)


@torch.library.register_fake("internvl::activate_rounded", lib=_LIBRARY)
def _(states: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    # Contiguous, as the kernel returns it: a compiler plans memory by these strides.
    small = states.new_empty(states.shape, dtype=torch.float8_e4m3fn)
    # Not `len`, which is an int: the compiler would take this number of rows for the only one.
    return small, states.new_empty((states.shape[0], 1), dtype=torch.float32)


class TowerMlp(InternVLVisionMLP):
    """A vision block's, whose second matrix is in float8."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if torch.is_grad_enabled():
            return super().forward(hidden_states)
        inner = self.fc1(hidden_states)
        return self.fc2.rounded(*activate(inner.flatten(0, -2)), inner.shape[:-1])


class _GatedMlp(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: Float8Linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if torch.is_grad_enabled():
            return super().forward(x)
        gate, states = self.gate_proj(x), self.up_proj(x)
        small, scale = activate(states.flatten(0, -2), gate.flatten(0, -2))
        return self.down_proj.rounded(small, scale, states.shape[:-1])


class GatedLlamaMlp(_GatedMlp, LlamaMLP):
    """Llama's and InternLM2's, whose last matrix is in float8."""


class GatedQwen2Mlp(_GatedMlp, Qwen2MLP):
    """Qwen2's, likewise."""


class GatedQwen3Mlp(_GatedMlp, Qwen3MLP):
    """Qwen3's without experts, likewise."""


_GATED: dict[type[nn.Module], type[nn.Module]] = {
    LlamaMLP: GatedLlamaMlp,
    Qwen2MLP: GatedQwen2Mlp,
    Qwen3MLP: GatedQwen3Mlp,
}


def enable(tower: nn.Module, text: nn.Module) -> int:
    """Replaces the MLPs whose last matrix is in float8 and passes no gradient; returns how many.

    Names and values of weights stay.
    """
    if not _HAS_TRITON and next(text.parameters()).is_cuda:
        return 0
    # Listed first: replacing modules while walking over them would visit the new ones.
    names = []
    for root in (tower, text):
        for name, module in root.named_modules():
            cls = _class_for(module)
            if cls is not None:
                names.append((root, name, cls))
    for root, name, cls in names:
        replace_module(root, name, cls)
    return len(names)


def _class_for(module: nn.Module) -> type[nn.Module] | None:
    """Returns what an MLP is replaced by, None for any other module."""
    # By exact type: a subclass may compute something else.
    if type(module) is InternVLVisionMLP:
        is_exact = isinstance(module.activation_fn, GELUActivation)
        return TowerMlp if is_exact and _is_ready(module.fc2) else None
    if type(module) in _GATED:
        is_silu = isinstance(module.act_fn, nn.SiLU | SiLUActivation)
        return _GATED[type(module)] if is_silu and _is_ready(module.down_proj) else None
    return None


def _is_ready(layer: Any) -> bool:
    return isinstance(layer, Float8Linear) and layer.back_weight is None
