"""Objectives of InternVL-14B: pairs of an image and a caption."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from internvl.config.objective.base import ObjectiveConfig
from internvl.config.types import Fraction, Positive

if TYPE_CHECKING:
    from internvl.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PairsConfig(ObjectiveConfig):
    """Base of the objectives over pairs."""

    family = "dual"
    rows_are_packed = False

    micro_batch: Positive | None = None
    """Pairs that a device encodes at once; null: all of its pairs of a step. Fewer need less memory
    but a second forward pass; the loss still compares all pairs of a step."""
    kept_micro_batches: Positive = 1
    """Micro-batches that keep their graph from the first forward pass and skip the second; each
    needs memory for it."""

    def problems(self, recipe: "Recipe") -> Iterator[str]:
        """Also yields settings that are for chat models only."""
        yield from super().problems(recipe)
        # Refused, not ignored: the run would not do what its recipe says.
        if recipe.global_batch_rows is not None:
            yield "global_batch_rows: is for packed rows, not for pairs; give global_batch"
        # A chat model's config.json stores it for later users; InternVL-14B's has no key for it.
        if recipe.data.exif == "apply":
            yield "data.exif: apply is for chat models; turn the images of InternVL-14B beforehand"
        # Both kernels know documents in a row; InternVL-14B's masks mix queries and captions.
        attention = recipe.compute.attention
        if attention in ("flex", "flash"):
            yield (f"compute.attention: {attention} is for packed rows, not for pairs; choose auto")
        if recipe.compute.float8:
            yield "compute.float8: is for chat models, which train with objective sft"


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(PairsConfig):
    """Contrastive in both branches (itc) and matching (itm), as InternVL-14B's fine-tuning."""

    terms = ("itc", "itm")

    name: Literal["retrieval"] = "retrieval"


@dataclass(frozen=True, kw_only=True)
class Stage2Config(PairsConfig):
    """Contrastive in the query branch (itc), matching (itm) and captioning (itg), as InternVL-14B's
    pre-training."""

    terms = ("itc", "itm", "itg")

    name: Literal["stage2"] = "stage2"
    label_smoothing: Fraction = 0.0
    """Label smoothing of the contrastive term."""
