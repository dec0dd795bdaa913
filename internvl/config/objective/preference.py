"""Objectives of chat models on preference pairs: a question, a better and a worse answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from internvl.config.objective.packed import PackedConfig
from internvl.config.types import Positive

if TYPE_CHECKING:
    from internvl.config.recipe import Recipe

PAIR_TERMS = ("dpo", "bco", "ipo", "hinge", "robust")


# A function, for a dictionary may not be a default.
def _published() -> dict[str, float]:
    return {"dpo": 0.8, "bco": 0.2, "sft": 1.0}


@dataclass(frozen=True, kw_only=True)
class MpoConfig(PackedConfig):
    """Mixed preference optimization: preference (dpo), quality (bco) and generation (sft).

    Other weights make other objectives of the field: `{dpo: 1}` is DPO, `{bco: 1}` BCO.
    """

    terms = (*PAIR_TERMS, "sft")
    instead: ClassVar[dict[str, str]] = {
        **PackedConfig.instead,
        "loss_normalization": "objective.normalize",
        "weighting": "objective.normalize",
    }

    name: Literal["mpo"] = "mpo"
    weights: dict[str, float] = field(default_factory=_published)
    """Weight of each term in the loss; a term that is not listed is left out. dpo, bco, ipo, hinge
    and robust are means over pairs; sft is the next-token loss on the chosen answers."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of rewards: beta times the log-ratio of an answer under policy and reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose labels are assumed to be swapped, in dpo and robust."""
    delta: Literal["exact", "lagged"] = "exact"
    """The running mean of rewards that bco compares with. exact: with the rewards of this step, as
    in the original, for a second forward pass of all rows but one; lagged: with those of the steps
    before."""
    normalize: Literal["pairs", "tokens"] = "pairs"
    """sft is the mean over pairs of each chosen answer's mean over tokens, as in the original, or
    the mean over all of their tokens."""
    reference: Literal["adapters", "precomputed", "live"] | None = None
    """Log-probabilities that rewards are relative to. adapters: of the same weights with adapters
    off; precomputed: of the first weights, computed before the first step into the run folder;
    live: of a second model in memory. null: adapters if nothing else trains, else precomputed."""
    watch: Literal["warn", "stop", "off"] = "warn"
    """What to do if chosen answers become less probable while the margin grows, or if every pair
    has been right for `watch_steps` steps."""
    watch_steps: Positive = 50
    """Steps that are compared with as many before them."""

    @property
    def term_weights(self) -> dict[str, float]:
        """See `ObjectiveConfig.term_weights`; a term that is not listed has weight 0."""
        # Not 1 as elsewhere: `{dpo: 1}` must be DPO alone.
        weights = {term: self.weights.get(term, 0.0) for term in self.terms}
        return {term: weight for term, weight in weights.items() if weight}

    def reference_of(self, recipe: "Recipe") -> str:
        """See `ObjectiveConfig.reference_of`; resolves `reference`."""
        if self.reference is not None:
            return self.reference
        return "adapters" if _trains_adapters_alone(recipe) else "precomputed"

    def forwards(self, recipe: "Recipe", rows: float) -> float:
        """See `ObjectiveConfig.forwards`; exact delta computes all rows but one beforehand."""
        reference = 0.0 if self.reference_of(recipe) == "precomputed" else 1.0
        if self.delta == "lagged" or "bco" not in self.term_weights:
            return reference
        return reference + max(0.0, rows - 1) / max(1.0, rows)

    def problems(self, recipe: "Recipe") -> Iterator[str]:
        """Also yields what a reference cannot do, and packing that cuts rows."""
        yield from super().problems(recipe)
        reference = self.reference_of(recipe)
        if reference == "adapters" and not _trains_adapters_alone(recipe):
            yield (
                "objective.reference: adapters needs model.lora and model.train: [], for other "
                "weights that train are not those of the start any more; choose precomputed"
            )
        # Those of a meta file are read later; `reference.Precomputed` looks at them too.
        augmented = [source.name for source in recipe.data.sources if source.augment]
        if reference == "precomputed" and augmented:
            yield (
                f"objective.reference: precomputed needs the same pixels each time, but source "
                f"{augmented[0]} has augment: true; set it to false, or choose live"
            )
        if recipe.data.allow_overflow:
            yield "data.allow_overflow: cuts rows, and a pair must stay whole; set it to false"


def _trains_adapters_alone(recipe: "Recipe") -> bool:
    model = recipe.model
    return model.lora is not None and not model.parts and not model.train_last_vision_blocks
