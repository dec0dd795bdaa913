"""Objectives of chat models: conversations in packed rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from internvl.config.objective.base import ObjectiveConfig

if TYPE_CHECKING:
    from internvl.config.recipe import Recipe

_CAPTIONS = ("coco-captions", "captions", "pairs", "flickr_format", "coco_format")


@dataclass(frozen=True, kw_only=True)
class PackedConfig(ObjectiveConfig):
    """What objectives over packed rows of conversations share."""

    family = "chat"
    rows_are_packed = True
    # A device's share of a step is cut into rows, whatever the number of samples in each.
    instead: ClassVar[dict[str, str]] = {"micro_batch": "data.row_tokens"}

    def problems(self, recipe: "Recipe") -> Iterator[str]:
        """Also yields sources of captions that no question is given for."""
        yield from super().problems(recipe)
        for number, source in enumerate(recipe.data.sources):
            if source.type in _CAPTIONS and source.prompt is None:
                key = f"data.sources.{number}.prompt"
                yield f"{key}: missing; a source of type {source.type} needs a question"


@dataclass(frozen=True, kw_only=True)
class SftConfig(PackedConfig):
    """Supervised fine-tuning: next-token loss on the answers."""

    terms = ("sft",)

    name: Literal["sft"] = "sft"
    weighting: Literal["token", "sample", "square"] = "token"
    """Weight of a supervised token in a sample of n: 1, 1 / n or 1 / sqrt(n)."""
    loss_normalization: Literal["global", "micro_batch"] = "global"
    """global: the mean over all supervised tokens of a step, however it is cut; micro_batch: the
    mean of each row's own mean, as the original, which then depends on how samples pack."""
