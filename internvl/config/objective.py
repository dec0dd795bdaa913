"""`objective:` what is minimized."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from internvl.config.types import STRICT, Fraction, Positive


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimized."""

    __pydantic_config__ = STRICT
    name: Literal["sft", "retrieval", "stage2"] = "sft"
    """sft: next-token loss on the answers. For InternVL-14B, on pairs of an image and a caption:
    retrieval, contrastive in both branches (itc) and matching (itm), as its fine-tuning; stage2,
    contrastive in the query branch, matching and captioning (itg), as its pre-training."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each term of the loss in the total, 1 where none is given; a term of weight 0 is
    left out."""
    micro_batch: Positive | None = None
    """Pairs that a device encodes at once; null takes its whole share of a step. Fewer need less
    memory and one more forward pass; the loss still compares all pairs of a step."""
    kept_micro_batches: Positive = 1
    """Micro-batches that keep the graph of their features from that first pass and are not encoded
    again; each needs memory for it."""
    label_smoothing: Fraction = 0.0
    """Of the contrastive term of stage2."""
    weighting: Literal["token", "sample", "square"] = "token"
    """Weight of a supervised token in a sample of n: 1, 1 / n or 1 / sqrt(n)."""
    loss_normalization: Literal["global", "micro_batch"] = "global"
    """global: the mean over all supervised tokens of a step, however it is cut; micro_batch: the
    mean of each row's own mean, as the original, which then depends on how samples pack."""

    @property
    def packs(self) -> bool:
        """Whether a batch is a packed row of conversations; otherwise it is pairs."""
        return self.name == "sft"

    def weights_of(self, terms: Sequence[str]) -> dict[str, float]:
        """Weight of every term that counts."""
        all_ = {term: self.weights.get(term, 1.0) for term in terms}
        return {term: weight for term, weight in all_.items() if weight}


TERMS = {"sft": ("sft",), "retrieval": ("itc", "itm"), "stage2": ("itc", "itm", "itg")}
"""The terms of every objective."""
