"""Replies of judges: score pairs of LLaVA-Bench, ratings of MMHal-Bench and of ours.

Original: `internvl_chat/eval/llava_bench/*` and `eval/mmhal/eval_gpt_mmhal.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from internvl.errors import UserError

MMHAL_TYPES = 8
"""Kinds of questions, which take turns in the file."""
_RATING = re.compile(r"rating\W*\s*(\d+(?:\.\d+)?)", re.IGNORECASE)


def score_pair(review: str | None) -> list[float]:
    """Returns the two scores in the first line of a review; [-1, -1] if it has not exactly two."""
    line = (review or "").split("\n")[0].replace(",", " ")
    try:
        # Single spaces separate: two of them make an empty third score, as in the original.
        pair = [float(text) for text in line.split(" ")]
    except ValueError:
        return [-1, -1]
    return pair if len(pair) == 2 else [-1, -1]


def review_table(reviews: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], float]]:
    """Returns category -> (mean scores of reference and model, their ratio in percent), sorted.

    The ratio is of the means rounded to three places. Failed reviews count as -1 each.

    Raises:
        UserError: the reference's mean is 0.
    """
    pairs: dict[str, list[Sequence[float]]] = {}
    for review in reviews:
        pair = review["tuple"] if "tuple" in review else review["score"]
        if "category" in review:
            pairs.setdefault(review["category"], []).append(pair)
        pairs.setdefault("all", []).append(pair)
    rows = {}
    # "all" comes first by its name, before "llava_bench_…".
    for name, values in sorted(pairs.items()):
        means = [round(sum(side) / len(values), 3) for side in zip(*values, strict=True)]
        if means[0] == 0:
            raise UserError(f"the reviews of {name} give the reference answers 0 on average")
        rows[name] = (means, round(means[1] / means[0] * 100, 1))
    return rows


def review_lines(title: str, reviews: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines that the original's summary prints."""
    lines = [title]
    for name, (means, ratio) in review_table(reviews).items():
        lines.append(f"{name} {means} {ratio}")
        lines.append(f"{name} {ratio} {round(means[0] * 10, 1)} {round(means[1] * 10, 1)}")
    return [*lines, "================================="]


def rating(reply: str) -> int:
    """Returns the only s of 0 to 6 with "rating: s" in a reply, 0 if there are none or several."""
    values = _ratings(reply)
    return values[0] if len(values) == 1 else 0


def is_rated(reply: str) -> bool:
    """True if a reply has the one rating that `rating` needs."""
    return len(_ratings(reply)) == 1


def _ratings(reply: str) -> list[int]:
    # eval_gpt_mmhal.py:130: "Rating: 10" holds "rating: 1"; bold marks hide the digit.
    return [value for value in range(7) if f"rating: {value}" in reply.lower()]


def careful_rating(reply: str, most: int = 6) -> int | None:
    """Returns the last rating of a reply if it is at most `most`, else None."""
    values = [float(text) for text in _RATING.findall(reply)]
    return int(values[-1]) if values and values[-1] <= most else None


def hallucination_scores(
    ratings: Sequence[int], positions: Sequence[int] | None = None
) -> dict[str, float]:
    """Returns the average rating, the share below 3, and the average of every kind of question.

    Args:
        positions: place of each question in the file, modulo 8 its type; None: all, in order.
    """
    scores = {
        "average": sum(ratings) / len(ratings),
        # A reply with two ratings is a 0, and so counts as a hallucination.
        "hallucination_rate": sum(value < 3 for value in ratings) / len(ratings),
    }
    by_type: dict[int, list[int]] = {}
    for position, value in zip(positions or range(len(ratings)), ratings, strict=True):
        by_type.setdefault(position % MMHAL_TYPES, []).append(value)
    for index, values in sorted(by_type.items()):
        scores[f"type_{index + 1}"] = sum(values) / len(values)
    return scores


def answer_after_rationale(answer: str) -> str:
    """Returns the text behind the last "Answer:", stripped."""
    return answer.rpartition("Answer:")[2].strip()
