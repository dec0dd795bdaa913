"""Scores of one's own questions, each chosen by what its reference answer is."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from internvl.evals.scoring import boxes, letters, texts, yes_no

_BOX = re.compile(r"\[\s*-?[\d.]+\s*,\s*-?[\d.]+\s*,\s*-?[\d.]+\s*,\s*-?[\d.]+\s*\]")
_YES_NO = ("yes", "no", "true", "false", "是", "否", "不是", "对", "不对")
_LETTER = re.compile(r"^\(?([A-J])\)?[.:]?$")
_OPTION = re.compile(r"^\s*\(?([A-J])[).:]\s*(.*)$", re.MULTILINE)
_AMOUNT = re.compile(
    r"^[^\d\-+.]{0,3}\s*([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(%?)\s*"
    # A unit is a word or a sign; other digits behind it would be another number.
    r"(?:[^\d]{0,12}|[a-zA-Z]{1,6}[23²³])$"
)
_SHORT_WORDS = 12
"""Longest answer, in words, whose letters are compared; longer ones need a judge."""
_SHARED = 0.5
"""Least intersection over union of a right box."""


@dataclass(frozen=True)
class Reference:
    """What an answer is compared with."""

    texts: Sequence[str]
    """Reference answers; usually one."""
    question: str = ""
    """With the options, for a letter."""
    tolerance: float = 0.0
    """Largest relative error of a number."""


def metric_of(reference: Reference) -> str:
    """Returns the metric that suits a question: a key of METRICS, or "judge".

    >>> metric_of(Reference(["12.5 %"])), metric_of(Reference(["No."]))
    ('number', 'yes-no')
    """
    stripped = [text.strip() for text in reference.texts]
    # Several people answered: their agreement is the measure, as in VQA.
    if len(stripped) >= 3:
        return "soft"
    if all(_BOX.search(text) for text in stripped):
        return "boxes"
    if all(text.rstrip(".!。").lower() in _YES_NO for text in stripped):
        return "yes-no"
    if all(_LETTER.match(text) for text in stripped) and options_of(reference.question):
        return "choice"
    if all(amount(text) is not None for text in stripped):
        return "number"
    words = max(len(text.split()) for text in stripped)
    # Chinese has no spaces; two characters are about a word.
    words = max(words, *(len(text) // 8 for text in stripped))
    return "anls" if words <= _SHORT_WORDS else "judge"


def options_of(question: str) -> dict[str, str]:
    """Returns the options in the lines of a question, "A. cat" or "(A) cat"."""
    return {letter: text.strip() for letter, text in _OPTION.findall(question)}


def amount(text: str) -> float | None:
    """Parses a number with a currency, thousands, a percent sign or a short unit.

    >>> amount("$1,200.50"), amount("12 %"), amount("3 km"), amount("about")
    (1200.5, 0.12, 3.0, None)
    """
    match = _AMOUNT.match(text.strip().rstrip("."))
    if match is None or not re.search(r"\d", match[1]):
        return None
    value = float(match[1].replace(",", ""))
    return value / 100 if match[2] else value


def same_amount(answer: str, reference: Reference) -> float:
    """Returns 1 if an answer, or the only number in it, equals a reference number."""
    value = amount(answer)
    if value is None:
        # A sentence around it is fine; with two numbers nobody knows which one is meant.
        numbers = re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?\s*%?", answer)
        value = amount(numbers[0].rstrip(",")) if len(numbers) == 1 else None
    if value is None:
        return 0.0
    for text in reference.texts:
        expected = amount(text)
        if expected is None:
            continue
        # A rounding error of the percent sign's division is no difference.
        if abs(value - expected) <= max(reference.tolerance, 1e-9) * abs(expected):
            return 1.0
    return 0.0


def matched_boxes(answer: str, reference: Reference) -> float:
    """Returns the share of boxes that have a counterpart with an IoU of 0.5, of the larger set.

    Coordinates are from 0 to 1000, or from 0 to 1.
    """
    ours, theirs = _boxes(answer), [box for text in reference.texts for box in _boxes(text)]
    if not ours or not theirs:
        return 0.0
    left, matches = list(ours), 0
    for box in theirs:
        overlaps = [boxes.box_iou(box, other) for other in left]
        best = max(range(len(left)), key=overlaps.__getitem__, default=None)
        # Each box of the answer counts once.
        if best is not None and overlaps[best] >= _SHARED:
            matches += 1
            del left[best]
    return matches / max(len(ours), len(theirs))


def _boxes(text: str) -> list[list[float]]:
    parsed = (boxes.careful_box(match, 1, 1) for match in _BOX.findall(text))
    return [box.tolist() for box in parsed if box is not None]


def same_choice(answer: str, reference: Reference) -> float:
    """Returns 1 if an answer chooses the reference's letter among the options of the question."""
    options = options_of(reference.question)
    letter = letters.careful_letter(letters.final_answer(answer), options)
    expected = [letters.careful_letter(text, options) for text in reference.texts]
    return float(bool(letter) and letter in expected)


def same_label(answer: str, reference: Reference) -> float:
    """Returns 1 if an answer says yes or no as the reference does."""
    label = yes_no.careful_yes_no(answer)
    return float(bool(label) and label in map(yes_no.careful_yes_no, reference.texts))


METRICS: dict[str, Callable[[str, Reference], float]] = {
    "exact": lambda answer, reference: texts.exact(answer, reference.texts),
    "soft": lambda answer, reference: texts.agreement(answer, reference.texts),
    "anls": lambda answer, reference: texts.careful_anls(answer, reference.texts),
    "number": same_amount,
    "boxes": matched_boxes,
    "yes-no": same_label,
    "choice": same_choice,
}
"""Name -> score of an answer, from 0 to 1."""
