"""Base of the objectives' sections: name, weights of the loss terms, checks of the recipe."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from internvl.config.types import STRICT

if TYPE_CHECKING:  # at run time a cycle: recipe.py imports the objectives
    from internvl.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss to minimize. Each objective is a subclass with keys of its own."""

    __pydantic_config__ = STRICT
    family: ClassVar[Literal["chat", "dual"]]
    """Models that it trains: chat models, or InternVL-14B with its two encoders."""
    rows_are_packed: ClassVar[bool]
    """True if a batch is a packed row of conversations, False if it is pairs."""
    terms: ClassVar[tuple[str, ...]]
    """The terms of the loss, in the order of the log."""
    # Named in the refusal: who sets it wants its effect, not its name.
    instead: ClassVar[dict[str, str]] = {}
    """Key of another objective -> the recipe's key with the same effect for this one."""

    name: str
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each term in the loss, by default 1; a term of weight 0 is left out."""

    # Left out, not multiplied by 0: a term costs a pass of its own.
    @property
    def term_weights(self) -> dict[str, float]:
        """Term -> weight, for terms whose weight is not 0."""
        weights = {term: self.weights.get(term, 1.0) for term in self.terms}
        return {term: weight for term, weight in weights.items() if weight}

    def reference_of(self, recipe: "Recipe") -> str:
        """Returns where the log-probabilities of a reference come from; "" if none is used."""
        return ""

    def forwards(self, recipe: "Recipe", rows: float) -> float:
        """Returns the forward passes of a step that keep no graph, in steps.

        Args:
            rows: micro-batches of a GPU in a step.
        """
        return 0.0

    def problems(self, recipe: "Recipe") -> Iterator[str]:
        """Yields "key: reason" for each value of `recipe` that does not fit this objective."""
        unknown = [term for term in self.weights if term not in self.terms]
        for term in unknown:
            terms = ", ".join(self.terms)
            yield f"objective.weights.{term}: {self.name} has no such term; it has {terms}"
        if not unknown and not self.term_weights:
            yield "objective.weights: all are 0, so nothing is learned"
