"""RMSNorm in one kernel where the model is used as it is loaded.

`transformers` writes it out, some seven passes over the hidden states without the compiler. Apex's,
which the original runs, and torch's round once, after the product with the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class RMSNorm(LlamaRMSNorm):
    """Llama's and the vision tower's, which differ in nothing but their name."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, D) -> the same.

        As `transformers` in training: under autocast, and where the types differ.
        """
        mixed = hidden_states.dtype != self.weight.dtype
        if mixed or torch.is_autocast_enabled(hidden_states.device.type):
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def fuse(part: nn.Module) -> None:
    """Replaces the RMS norms of `part`, which `transformers` has made, by ours."""
    for name, module in list(part.named_modules()):
        if isinstance(module, InternVLVisionRMSNorm | LlamaRMSNorm):
            part.set_submodule(name, RMSNorm(len(module.weight), module.variance_epsilon))
