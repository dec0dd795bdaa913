"""RMSNorm in one fused kernel for models that run without torch.compile.

`transformers` computes it in about seven elementwise passes. Apex's kernel (the original's) and
torch's round once, after the product with the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class RMSNorm(LlamaRMSNorm):
    """Replaces LlamaRMSNorm and InternVLVisionRMSNorm, which compute the same."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalizes `hidden_states` (…, D); same shape and dtype.

        Falls back to the parent under autocast and if the weight has another dtype.
        """
        mixed = hidden_states.dtype != self.weight.dtype
        if mixed or torch.is_autocast_enabled(hidden_states.device.type):
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fuse(model: nn.Module) -> None:
    """Replaces every RMS norm of `transformers` in `model` by the fused `RMSNorm`."""
    # A list: the loop replaces modules of the tree that it walks.
    for name, module in list(model.named_modules()):
        if isinstance(module, InternVLVisionRMSNorm | LlamaRMSNorm):
            model.set_submodule(name, RMSNorm(len(module.weight), module.variance_epsilon))
