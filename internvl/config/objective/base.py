"""What every objective's section has: a name, weights of its terms, what it fits."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from internvl.config.types import STRICT

if TYPE_CHECKING:  # a recipe holds an objective, which checks it
    from internvl.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimized. Each objective is a subclass that states what it is for."""

    __pydantic_config__ = STRICT
    family: ClassVar[Literal["chat", "dual"]]
    """Models that train with it: chat models, or InternVL-14B with its two encoders."""
    rows_are_packed: ClassVar[bool]
    """Whether a batch is a packed row of conversations; otherwise it is pairs."""
    terms: ClassVar[tuple[str, ...]]
    """The terms of the loss, in the order of the log."""
    instead: ClassVar[dict[str, str]] = {}
    """Key of another objective -> the recipe's key that does the same for this one."""

    name: str
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each term of the loss in the total, 1 where none is given; a term of weight 0 is
    left out."""

    @property
    def term_weights(self) -> dict[str, float]:
        """Weight of every term that counts."""
        weights = {term: self.weights.get(term, 1.0) for term in self.terms}
        return {term: weight for term, weight in weights.items() if weight}

    def problems(self, recipe: "Recipe") -> Iterator[str]:
        """Yields "key: reason" for each value of `recipe` that this objective contradicts."""
        unknown = [term for term in self.weights if term not in self.terms]
        for term in unknown:
            terms = ", ".join(self.terms)
            yield f"objective.weights.{term}: {self.name} has no such term; it has {terms}"
        if not unknown and not self.term_weights:
            yield "objective.weights: all are 0, so nothing is learned"
