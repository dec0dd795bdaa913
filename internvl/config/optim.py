"""`optim:` AdamW or Muon and their schedules."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from internvl.config.types import STRICT, Fraction


@dataclass(frozen=True, kw_only=True)
class LayerDecayConfig:
    """Learning rate per layer of InternVL-14B: the peak times rate ** (layers above)."""

    __pydantic_config__ = STRICT
    vision: Fraction = 1.0
    """Rate of the vision tower; its projector keeps the peak."""
    qllama: Fraction = 1.0
    """Rate of QLLaMA, the queries and the logit scale; norm, output matrix and heads keep the
    peak."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, and the learning rate over the steps."""

    __pydantic_config__ = STRICT
    name: Literal["adamw", "adamw-8bit", "muon"] = "adamw"
    """adamw-8bit keeps the two moments of every matrix in 8 bits with a scale for each 256 of them
    (torchao): 2 instead of 8 bytes per trained weight. muon orthogonalizes the updates of linear
    layers inside the model and leaves the rest to AdamW (arXiv 2502.16982): 4 instead of 8 bytes
    for most weights, and for randomly initialized weights far fewer steps."""
    lr: Annotated[float, Field(gt=0)] = 4e-5
    """Peak learning rate."""
    momentum: Fraction = 0.95
    """Momentum of muon's matrices."""
    schedule: Literal["cosine", "wsd", "as_shipped"] = "cosine"
    """cosine: linear warm-up, then a cosine. wsd: linear warm-up, the peak, then a linear decay
    over the last `decay_ratio` of the steps. as_shipped: what the original's InternVL-14B scripts
    really run, because their DeepSpeed files override the cosine that the scripts name:
    logarithmic warm-up, linear decay to 0, and after the first update one rate for every layer."""
    min_lr_ratio: Fraction = 0.0
    """cosine and wsd end at this share of the peak."""
    decay_ratio: Fraction = 0.2
    """Share of all steps in which wsd decays (rounded up)."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps with a rising rate (rounded up)."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps with a rising rate, instead of `warmup_ratio`."""
    layer_decay: LayerDecayConfig | None = None
    """Smaller rates for lower layers, for InternVL-14B; null gives every layer the same."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled weight decay."""
    decay_vectors: bool = False
    """Decay biases, norms and scales too, as the original does; otherwise matrices only."""
    decay_scalars: bool = False
    """Decay scalars too: the logit scale, as the original's InternVL-14B does."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global norm."""
    offload: bool = False
    """Keep the two moments in CPU memory, 8 of the 16 bytes of a trained weight. They are copied
    to the GPU for the update, so results are the same. Only with adamw."""
