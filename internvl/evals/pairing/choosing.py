"""Chooses the pairs of a question from its answers.

Original: `mmpr_data_pipeline_correctness_postprocess.py` and `mmpr_data_pipeline_dropout_ntp.py`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from internvl.evals.pairing.forms import Form
from internvl.evals.pairing.rules import is_right
from internvl.evals.scoring.answers import Reference

CORRECTNESS, FORMAT, DROPOUT_NTP = "correctness", "format", "dropout-ntp"
"""What sets the answers of a pair apart: right and wrong; right and not in its form; with the image
and without."""


@dataclass(frozen=True)
class Pair:
    """Two answers to a question."""

    chosen: str
    rejected: str
    made_by: str
    """CORRECTNESS, FORMAT or DROPOUT_NTP."""


@dataclass(frozen=True)
class Chosen:
    """What the answers of a question gave."""

    pairs: tuple[Pair, ...]
    reason: str = ""
    """Why there are no pairs."""
    num_right: int = 0
    num_answers: int = 0


def by_correctness(
    responses: Sequence[str], reference: Reference, rule: str, form: Form, most: int, seed: int
) -> Chosen:
    """Pairs right answers with wrong ones, and with those that are not in their form.

    Args:
        responses: texts, which may be equal or empty.
        rule: a name of RULES.
        most: most pairs of either sort; more are drawn from.
        seed: of that draw.
    """
    finals = [(text, form.final(text)) for text in responses]
    right, wrong, malformed = [], [], []
    for text, final in finals:
        if final is None:
            # An empty answer cannot be trained on.
            malformed += [text] if text.strip() else []
        elif is_right(final, reference, rule):
            right.append((text, final))
        else:
            wrong.append((text, final))
    counts = {"num_right": len(right), "num_answers": len(finals)}
    # Equal answers would make equal pairs.
    right, wrong = list(dict.fromkeys(right)), list(dict.fromkeys(wrong))
    malformed = list(dict.fromkeys(malformed))
    if not right:
        in_form = any(final is not None for _, final in finals)
        return Chosen((), "no answer is right" if in_form else "no answer is in its form", **counts)
    if not wrong and not malformed:
        return Chosen((), "no answer is wrong", **counts)
    # A wrong answer that contains the right one is a matter of length, not of correctness.
    apart = [
        Pair(text, other, CORRECTNESS)
        for text, final in right
        for other, other_final in wrong
        if final.lower() not in other_final.lower()
    ]
    unformed = [Pair(text, other, FORMAT) for text, _ in right for other in malformed]
    draw = random.Random(seed)
    # Each sort by itself: many wrong answers must not crowd out those of another form.
    pairs = [*draw.sample(apart, min(most, len(apart)))]
    pairs += draw.sample(unformed, min(most, len(unformed)))
    reason = "" if pairs else "every wrong answer contains the right one"
    return Chosen(tuple(pairs), reason, **counts)


def by_dropout(chosen: str, continued: Sequence[str]) -> Chosen:
    """Pairs an answer with its beginning as the model continues it without the image."""
    rejected = [text for text in dict.fromkeys(continued) if text.strip() not in ("", chosen)]
    pairs = tuple(Pair(chosen, text, DROPOUT_NTP) for text in rejected)
    return Chosen(pairs, "" if pairs else "it is continued as it was", num_answers=len(continued))


def beginning(answer: str, share: float) -> str:
    """Returns the first words of an answer, or characters if it is written without spaces.

    >>> beginning("A dog runs on grass.", 0.5), beginning("一只狗在跑", 0.5)
    ('A dog', '一只')
    """
    # By single spaces, as the original: line breaks within the beginning stay.
    words = answer.split(" ")
    if len(words) > 1:
        return " ".join(words[: int(len(words) * share)]).strip()
    return answer[: int(len(answer) * share)].strip()
