"""Short answers: normalization, soft accuracy, relaxed accuracy, ANLS, exact and contained words.

Original: `internvl_chat/eval/vqa/{textvqa_eval,infographicsvqa_eval,evaluate_vqa}.py` and
`eval/tiny_lvlm/tools.py`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from internvl.errors import UserError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
# "none" is a zero to EvalAI's processor: textvqa_eval.py:199.
_DIGITS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}

_APOSTROPHES = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd
something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've
weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've
why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_DOUBLE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    """Returns word without an apostrophe -> the contraction that it stands for."""
    table = {word.replace("'", ""): word for word in _APOSTROPHES.split()}
    for word in _DOUBLE.split():
        # Each of the two apostrophes may be missing, but not both.
        first, middle, last = word.split("'")
        table |= {f"{first}{middle}'{last}": word, f"{first}'{middle}{last}": word}
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    # As the list of the original has it, with the apostrophe on the wrong side.
    return table | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""Periods that the original removes: it passes re.UNICODE, which is 32, as the count."""
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
ONE_COMMA_IN_NUMBER = re.compile(r"\d,\d")


def strip_punctuation(text: str, comma: re.Pattern[str] = _COMMA_IN_NUMBER) -> str:
    """Deletes punctuation next to a space, replaces other marks by a space, drops periods."""
    delete_all = comma.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        # Decided on the unmodified text, mark by mark, as EvalAI's processor does.
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or delete_all else " ")
    # textvqa_eval.py:187 means to spare decimals, but its look-ahead never blocks: a period goes
    # wherever no digit follows.
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def replace_words(text: str) -> str:
    """Replaces number words by digits, drops articles, restores contractions; lower case."""
    digits = [_DIGITS.get(word, word) for word in text.lower().split()]
    words = [word for word in digits if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def split_possessive(text: str) -> str:
    """Lowers a text, drops commas and question marks, and puts a space before "'s"."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


@lru_cache(maxsize=2**16)  # ten people give few answers, to VQA's 200,000 questions
def normalize(text: str) -> str:
    """Normalizes an answer as EvalAI does for VQA.

    >>> normalize("The two dogs' bone, isnt it?")
    "2 dogs' bone isn't it"
    """
    text = split_possessive(text).replace("\n", " ").replace("\t", " ").strip()
    return replace_words(strip_punctuation(text))


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
    """Returns normalized answer -> soft accuracy, by leaving out each of the ten answers in turn.

    Raises:
        UserError: not ten answers.
    """
    if len(answers) != 10:
        raise UserError(f"soft accuracy is defined for 10 answers of people, not {len(answers)}")
    all_normalized = [normalize(answer) for answer in answers]
    counts = Counter(all_normalized)
    # Summed as the original sums them, one left-out answer after the other: equal to the last bit.
    return {
        answer: sum(
            min(1, float(count - (normalized == answer)) / 3) for normalized in all_normalized
        )
        / 10
        for answer, count in counts.items()
    }


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns VQA's soft accuracy of a prediction against ten answers, from 0 to 1."""
    return answer_scores(answers).get(normalize(prediction), 0.0)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Returns min(1, n / 3) for n equal answers; with fewer than three answers, 1 for any."""
    normalized = normalize(prediction)
    equal = sum(normalize(answer) == normalized for answer in answers)
    return min(1.0, equal / min(3, max(1, len(answers))))


def distance(left: str, right: str) -> int:
    """Computes the Levenshtein distance of two texts, in characters."""
    if len(left) > len(right):
        left, right = right, left
    row = list(range(len(left) + 1))
    for i, right_char in enumerate(right, start=1):
        previous, row = row, [i]
        for j, left_char in enumerate(left):
            row.append(
                previous[j]
                if left_char == right_char
                else 1 + min(previous[j], previous[j + 1], row[j])
            )
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Computes the normalized Levenshtein similarity, 0 below the threshold, from 0 to 1.

    The distance is that of the collapsed texts, the divisor the length of the raw ones: spaces
    around a wrong answer raise its score, as in the original.

    Raises:
        UserError: no answers.
    """
    return _similarity(prediction, answers, threshold, raw_length=True)


def careful_anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Computes `anls` with the length of the texts that are compared."""
    return _similarity(prediction, answers, threshold, raw_length=False)


def _similarity(
    prediction: str, answers: Sequence[str], threshold: float, raw_length: bool
) -> float:
    if not answers:
        raise UserError("ANLS needs at least one answer")
    collapsed = " ".join(prediction.strip().lower().split())
    ratios = []
    for answer in answers:
        expected = " ".join(answer.strip().lower().split())
        # upper() can lengthen a text, and the original measures it after upper().
        left, right = (answer.upper(), prediction.upper()) if raw_length else (expected, collapsed)
        length = max(len(left), len(right))
        ratios.append(distance(expected, collapsed) / length if length else 0.0)
    score = 1 - min(ratios)
    return score if score >= threshold else 0.0


def to_number(text: str) -> float | None:
    """Parses a number as ChartQA's metric does, a percentage as its hundredth; None for others."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(target: str, prediction: str, tolerance: float = 0.05) -> bool:
    """True if two numbers differ by at most 5 % of `target`; other texts must be equal."""
    predicted, expected = to_number(prediction), to_number(target)
    # A target of 0 has no relative error and is compared as text, as in the original.
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= tolerance
    return prediction.lower() == target.lower()


def relaxed_accuracy(answer: str, annotations: Sequence[str]) -> float:
    """Returns 1 if `relaxed` holds for an annotation, with the answer as the target.

    Original: the tolerance is relative to the model's answer, for the arguments are swapped.
    """
    return float(any(relaxed(answer.strip(), annotation) for annotation in annotations))


def careful_relaxed_accuracy(answer: str, annotations: Sequence[str]) -> float:
    """Returns 1 if the answer is within 5 % of an annotation, 0 within nothing of 0."""
    return float(any(_is_close(answer.strip(), text.strip()) for text in annotations))


def _is_close(answer: str, annotation: str) -> bool:
    answered, expected = to_number(answer), to_number(annotation)
    if answered is not None and expected == 0:
        return answered == 0
    return relaxed(annotation, answer)


def exact(answer: str, annotations: Sequence[str]) -> float:
    """Returns 1 if the answer equals an annotation, without case and outer white space."""
    return float(any(answer.strip().lower() == text.strip().lower() for text in annotations))


def gqa_answer(answer: str) -> str:
    """Returns an answer as GQA's own script takes it: lower case, without final periods."""
    # convert_gqa_for_eval.py: spaces stay, so that a leading one makes an answer wrong.
    return answer.rstrip(".").lower()


def tiny_normalize(text: str) -> str:
    """Normalizes an answer as Tiny LVLM-eHub does."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return replace_words(strip_punctuation(text, ONE_COMMA_IN_NUMBER))


def has_word(sentence: str, word: str) -> bool:
    """True if `word` occurs in a sentence between word boundaries."""
    return re.search(rf"\b{re.escape(word)}\b", sentence) is not None


def contains_answer(answer: str, annotations: Sequence[str] | str) -> float:
    """Returns 1 if a normalized annotation occurs as words of the normalized answer."""
    texts = [annotations] if isinstance(annotations, str) else annotations
    normalized = tiny_normalize(answer)
    return float(any(has_word(normalized, tiny_normalize(text)) for text in texts))
