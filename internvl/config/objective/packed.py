"""Objectives of chat models: conversations in packed rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from internvl.config.objective.base import ObjectiveConfig

if TYPE_CHECKING:
    from internvl.config.recipe import Recipe

_CAPTION_TYPES = ("coco-captions", "captions", "pairs", "flickr_format", "coco_format")


@dataclass(frozen=True, kw_only=True)
class PackedConfig(ObjectiveConfig):
    """Base of the objectives over packed rows of conversations."""

    family = "chat"
    rows_are_packed = True
    # Memory is bounded by the length of a row, not by the number of samples in it.
    instead: ClassVar[dict[str, str]] = {"micro_batch": "data.row_tokens"}

    def problems(self, recipe: "Recipe") -> Iterator[str]:
        """Also yields caption sources without a question."""
        yield from super().problems(recipe)
        # Pairs have no question, and a chat model is taught to answer one.
        for index, source in enumerate(recipe.data.sources):
            if source.type in _CAPTION_TYPES and source.prompt is None:
                key = f"data.sources.{index}.prompt"
                yield f"{key}: missing; a source of type {source.type} needs a question"


@dataclass(frozen=True, kw_only=True)
class SftConfig(PackedConfig):
    """Supervised fine-tuning: next-token cross-entropy on the answers."""

    terms = ("sft",)

    name: Literal["sft"] = "sft"
    weighting: Literal["token", "sample", "square"] = "token"
    """Weight of a supervised token in a sample of n: 1, 1 / n or 1 / sqrt(n)."""
    loss_normalization: Literal["global", "micro_batch"] = "global"
    """global: the mean over all supervised tokens of a step, however it is cut into rows;
    micro_batch: the mean of the rows' means, as in the original, which depends on the packing."""
