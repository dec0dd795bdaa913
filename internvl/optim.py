"""Parameter groups, AdamW, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from internvl.config import OptimConfig


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients; matrices decay, vectors do not.

    With `decay_vectors` everything decays, as in the original (DeepSpeed sees one flat group).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1 or config.decay_vectors]
    others = [p for p in trainable if not (p.ndim > 1 or config.decay_vectors)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then cosine to the floor.

    Original: the cosine schedule of transformers, warm-up steps rounded up.
    """
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
