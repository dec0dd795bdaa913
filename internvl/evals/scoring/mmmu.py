"""MMMU: numbers and key phrases of open answers, accuracy by subject and domain.

Original: `internvl_chat/eval/mmmu/{eval_utils,main_eval_only,data_utils}.py`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine"),
        *("Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
"""Domain -> its subjects, in the order of the printed table."""

SUBJECTS = tuple(sorted(subject for subjects in DOMAINS.values() for subject in subjects))
"""The 30 subjects, in the order in which they are loaded and joined."""

_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MARKS = (":", ",", ".", "!", "?", ";", "'")

Normalized = float | str


def is_number(text: str) -> bool:
    """True if a text is a number, thousands separated by commas or not."""
    try:
        float(text.replace(",", ""))
    except ValueError:
        return False
    return True


def normalize(text: str) -> list[Normalized]:
    """Returns a number rounded to two places, or the text in lower case; one character becomes two
    texts with a space, so that it does not match inside words."""
    text = text.strip()
    if is_number(text):
        return [round(float(text.replace(",", "")), 2)]
    text = text.lower()
    # eval_utils.py:79: an expected "b" would stand in every word with a b.
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def extract_numbers(text: str) -> list[str]:
    """Lists the numbers of a text: with commas, in scientific notation, plain."""
    # A number with commas also gives its last group by the plain pattern: eval_utils.py:104.
    patterns = (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE)
    return [digits for pattern in patterns for digits in pattern.findall(text)]


def key_phrases(response: str) -> list[str]:
    """Lists the shortest text behind an indicator ("is ", "so ", …) of every line.

    The original lowers the text before it looks for sentences that begin with a capital, so only
    line breaks separate.
    """
    text = response.strip().strip(".").lower()
    phrases = []
    lines = text.split("\n")
    for index, line in enumerate(lines):
        # An equation counts in the last line alone.
        indicators = [*_INDICATORS, "="] if index == len(lines) - 1 else _INDICATORS
        shortest = ""
        # Substrings, as eval_utils.py:127 has them: "is " also matches in "this ".
        for indicator in indicators:
            tail = line.rpartition(indicator)[2].strip() if indicator in line else None
            if tail is not None and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _MARKS:
            phrases.append(shortest)
    return phrases or [text]


def parse_open(response: str) -> set[Normalized]:
    """Returns the normalized key phrases of a response and the numbers in them."""
    phrases = key_phrases(response)
    numbers = [digits for phrase in phrases for digits in extract_numbers(phrase)]
    return {value for text in [*phrases, *numbers] for value in normalize(text)}


def open_correct(expected: Sequence[str] | str, parsed: Iterable[Normalized]) -> bool:
    """True if an expected text stands in a parsed one, or an expected number is among them."""
    texts = [expected] if isinstance(expected, str) else expected
    accepted = [value for text in texts for value in normalize(text)]
    for value in parsed:
        # A parsed text is never compared with an expected number: eval_utils.py:200.
        if isinstance(value, str):
            if any(isinstance(text, str) and text in value for text in accepted):
                return True
        elif value in accepted:
            return True
    return False


def choice_correct(expected: Sequence[str] | str, letter: str) -> bool:
    """True if the letter is the expected one, or one of them."""
    return letter in expected if isinstance(expected, list | tuple) else letter == expected


def subject(question_id: str) -> str:
    """Returns the subject in an id such as "validation_Art_Theory_12"."""
    return "_".join(question_id.split("_")[1:-1])


def table(correct: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """Returns the original's table of counts and accuracies: domains, subjects, all.

    Args:
        correct: id of every answered question -> whether it is right.
    """
    by_subject: dict[str, list[bool]] = {}
    for question_id, right in correct.items():
        by_subject.setdefault(subject(question_id), []).append(right)
    rows: dict[str, dict[str, Any]] = {}
    for domain, subjects in DOMAINS.items():
        answered = {name: by_subject[name] for name in subjects if name in by_subject}
        rows[f"Overall-{domain}"] = _row([v for values in answered.values() for v in values])
        rows |= {name: _row(values) for name, values in answered.items()}
    # An id of another subject counts nowhere, as in the original.
    rows["Overall"] = _row([v for name in SUBJECTS for v in by_subject.get(name, [])])
    return rows


def _row(values: Sequence[bool]) -> dict[str, Any]:
    # Rounded here, so the printed table and the metric are the same number.
    accuracy = round(sum(values) / len(values), 3) if values else 0
    return {"num": len(values), "acc": accuracy}
