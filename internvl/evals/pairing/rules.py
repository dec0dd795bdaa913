"""Rules that call an answer right or wrong by its references; see also evals/scoring."""

from collections.abc import Callable
from statistics import fmean

from internvl.evals.scoring import answers, texts
from internvl.evals.scoring.answers import METRICS, Reference

Rule = Callable[[str, Reference], float]
RIGHT = 0.9
"""An answer is right if its score is above this, as in the original."""
_CAPTION_WORDS = 5
"""Several references with more words on average are captions, which nobody repeats literally."""


def _same_short(answer: str, reference: Reference) -> float:
    """Returns 1 if a short answer equals a reference after VQA's normalization, or as a number."""
    normalized = texts.normalize(answer)
    # A reference that is an article alone is empty too, and would equal no answer at all.
    if not normalized:
        return 0.0
    if normalized in map(texts.normalize, reference.texts):
        return 1.0
    return answers.same_amount(answer, reference) if answers.amount(answer) is not None else 0.0


RULES: dict[str, Rule] = {"short": _same_short, **METRICS}
"""Name -> score of a final answer, from 0 to 1."""


def rule_of(reference: Reference) -> str | None:
    """Returns the rule that suits a reference, None for long texts, which no rule can compare.

    >>> rule_of(Reference(["12.5"])), rule_of(Reference(["brown dog"]))
    ('number', 'short')
    """
    name = answers.metric_of(reference)
    if name == "judge":
        return None
    if name == "soft" and fmean(len(text.split()) for text in reference.texts) > _CAPTION_WORDS:
        return None
    # A likeness of texts is no correctness: "19" is nearly "1998".
    return "short" if name == "anls" else name


def is_right(answer: str, reference: Reference, rule: str) -> bool:
    """True if a final answer is right by a rule of RULES."""
    return RULES[rule](answer, reference) > RIGHT
