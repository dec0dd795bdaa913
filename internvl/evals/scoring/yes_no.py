"""Yes or no: MME's and POPE's labels and scores.

Original: `internvl_chat/eval/mme/{eval,calculation}.py` and `eval/pope/eval_pope.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from internvl.errors import UserError, counted

MME_TASKS: Mapping[str, tuple[str, ...]] = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": (
        *("commonsense_reasoning", "numerical_calculation"),
        *("text_translation", "code_reasoning"),
    ),
}
"""Group -> its tasks, in the order of their sum."""

_CHINESE = re.compile("[\u4e00-\u9fa5]")
_UNDECIDED = re.compile(
    r"\b(?:unsure|uncertain|unclear|not (?:sure|certain|clear|known)"
    r"|(?:do not|don['’]t|can ?not|can['’]t)"
    r" (?:know|tell|say|determine|be (?:determined|answered)))\b"
    r"|不知道|不确定|不清楚|无法(?:判断|确定|回答)"
)
_NEGATIVE = re.compile(r"\b(no|not|none|never|isn't|aren't|cannot|can't|doesn't)\b|不|否|没")


def mme_reply(answer: str) -> str:
    """Returns an answer as MME's result file holds it: one line, lower case, Chinese replaced."""
    # eval.py:26, in its order: 不是 before 是, or every "is not" would be a yes.
    text = answer.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    text = text.lower().replace("true", "yes").replace("false", "no")
    return _CHINESE.sub("", text)


def mme_label(reply: str) -> str:
    """Returns "yes" or "no" if the first four characters of a reply hold it, else "other"."""
    # Leading spaces count among the four: calculation.py:24 does not strip the line.
    head = reply if reply in ("yes", "no") else reply[:4]
    # "yes" first, anywhere in them: "eyes" is a yes, "know" and "none" are a no.
    return next((label for label in ("yes", "no") if label in head), "other")


def binary_metrics(expected: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Counts and rates of labels "yes", "no", "other" against "yes" and "no".

    Precision and recall are over the labels that are not "other"; 0 where they are undefined.

    Raises:
        UserError: another label, or an expected answer that is neither yes nor no.
    """
    unknown = [v for v in expected if v not in ("yes", "no")]
    unknown += [v for v in labels if v not in ("yes", "no", "other")]
    if unknown:
        raise UserError(f"MME knows the answers yes and no, not {unknown[0]!r}")
    pairs = list(zip(expected, labels, strict=True))
    counts = {
        name: pairs.count(pair)
        for name, pair in (
            ("TP", ("yes", "yes")),
            ("FN", ("yes", "no")),
            ("TN", ("no", "no")),
            ("FP", ("no", "yes")),
        )
    }
    positives = counts["TP"] + counts["FP"]
    actual = counts["TP"] + counts["FN"]
    return counts | {
        "precision": counts["TP"] / positives if positives else 0.0,
        "recall": counts["TP"] / actual if actual else 0.0,
        "other_num": list(labels).count("other"),
        # A task without a readable line has no accuracy; sklearn's mean of nothing is NaN.
        "acc": sum(a == b for a, b in pairs) / len(pairs) if pairs else float("nan"),
    }


def mme_task_score(pairs: Sequence[tuple[str, str]]) -> float:
    """Computes 100·accuracy + 100·share of images with both answers right, from 0 to 200.

    Args:
        pairs: (expected, reply) of every question; two consecutive ones are of one image. A pair
            of empty texts is an unreadable line: it counts for its image alone.

    Raises:
        UserError: an odd number of questions.
    """
    if len(pairs) % 2:
        raise UserError(
            "MME has two questions an image, and scores both together; a task has "
            f"{counted(len(pairs), 'question')}, so --limit must be even"
        )
    lowered = [(expected.lower(), reply.lower()) for expected, reply in pairs]
    labels = [(expected, mme_label(reply)) for expected, reply in lowered]
    readable = [pair for pair, raw in zip(labels, lowered, strict=True) if raw != ("", "")]
    metrics = binary_metrics([e for e, _ in readable], [label for _, label in readable])
    # By position, not by the image's name: calculation.py:84 takes lines in twos.
    right = [bool(expected) and expected == label for expected, label in labels]
    both = sum(first and second for first, second in zip(right[::2], right[1::2], strict=True))
    return metrics["acc"] * 100 + both / (len(pairs) // 2) * 100


def pope_label(text: str) -> str:
    """Returns "no" if the first sentence has the word No, no or not between spaces, else "yes"."""
    # eval_pope.py:6: split at single spaces alone, so "NO", "no!" and "No\n" are yes.
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def careful_yes_no(text: str) -> str:
    """Returns "yes" or "no", in any case and with any mark, in English or Chinese; "" for neither.

    >>> careful_yes_no("NO!"), careful_yes_no("不是"), careful_yes_no("Yes, it is")
    ('no', 'no', 'yes')
    """
    lowered = text.strip().lower()
    first = re.match(r"\W*(yes|no|true|false)\b", lowered)
    if first:
        return {"true": "yes", "false": "no"}.get(first[1], first[1])
    # "Not sure" is no "no", which its "not" would make it.
    if _UNDECIDED.search(lowered):
        return ""
    if _NEGATIVE.search(lowered):
        return "no"
    return "yes" if re.search(r"\byes\b|是|对|有", lowered) else ""


@dataclass(frozen=True)
class BinaryScores:
    """POPE's scores of one category."""

    counts: tuple[int, int, int, int]
    """True positives, false positives, true negatives, false negatives."""
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def binary_scores(predicted: Sequence[str], expected: Sequence[str]) -> BinaryScores:
    """Computes POPE's scores; any expected answer but "no" counts as yes.

    Pairs end with the shorter list, as in the original; where it divides by zero, the value is 0.
    """
    pairs = [
        (label == "yes", answer != "no") for label, answer in zip(predicted, expected, strict=False)
    ]
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    tn, fn = pairs.count((False, False)), pairs.count((False, True))
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return BinaryScores(
        (tp, fp, tn, fn),
        _ratio(tp + tn, len(pairs)),
        precision,
        recall,
        # In the original's order of products: equal to the last bit.
        _ratio(2 * precision * recall, precision + recall),
        _ratio(list(predicted).count("yes"), len(predicted)),
    )


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator) / float(denominator) if denominator else 0.0
