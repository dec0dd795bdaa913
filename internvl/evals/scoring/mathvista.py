"""MathVista: the value that a response gives, and accuracy by the kinds of its questions.

Original: `internvl_chat/eval/mathvista/{extract_answer,calculate_score}.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from internvl.evals.scoring.letters import final_answer
from internvl.evals.scoring.texts import distance

_LETTER = re.compile(r"\(([a-zA-Z])\)")
GROUPS = (
    *("question_type", "answer_type", "language", "source"),
    *("category", "task", "context", "grade", "skills"),
)
"""Keys of a question and of its metadata that scores are given by."""


def extract(
    response: str,
    problem: Mapping[str, Any],
    quick: bool = False,
    ask: Callable[[str, str], str] | None = None,
) -> str:
    """Returns the answer in a response: itself if it is a choice or a number, else by a rule or a
    judge.

    Args:
        problem: a row of the data set.
        quick: take what follows "Answer:", as the original does with reasoning.
        ask: a judge that extracts it from (query, response); None leaves the response as it is.
    """
    # A multiple-choice question without choices stops the original.
    choices = problem["choices"] or ()
    if response == "" or (problem["question_type"] == "multi_choice" and response in choices):
        return response
    to_type: Callable[[str], Any] | None
    to_type = {"integer": int, "float": float}.get(problem["answer_type"])
    if to_type is not None:
        try:
            return str(to_type(response))
        except ValueError:
            pass  # no bare number: the rules below
    if quick:
        return final_answer(response)
    return response if ask is None else ask(problem["query"], response)


def is_settled(response: str, problem: Mapping[str, Any]) -> bool:
    """True if `extract` needs neither a rule nor a judge."""
    marker = "\0"
    return extract(response, problem, ask=lambda query, text: marker) != marker


def most_similar(text: str, choices: Sequence[str]) -> str:
    """Returns the choice with the least edit distance, the first of equal ones."""
    return min(choices, key=lambda choice: distance(text, choice))


def normalize(extraction: Any, problem: Mapping[str, Any]) -> Any:
    """Returns an extraction in the form of the data set's answers; None if it cannot be."""
    choices, answer_type = problem["choices"], problem["answer_type"]
    if problem["question_type"] == "multi_choice":
        # Without choices nothing can be chosen; the original stops.
        return _choice(str(extraction).strip(), choices) if choices else None
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), int(problem["precision"])))
    except (ValueError, TypeError, OverflowError):
        return None
    return str(extraction) if answer_type == "list" else extraction


def _choice(text: str, choices: Sequence[str]) -> str:
    letters = _LETTER.findall(text)
    letter = letters[0].upper() if letters else text
    options = {chr(ord("A") + index): choice for index, choice in enumerate(choices)}
    # calculate_score.py:19: whatever is no letter becomes the nearest choice, an empty text too.
    return options[letter] if letter in options else most_similar(letter, choices)


def scores(problems: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the original's score file: accuracy of all, then of every group, best first.

    Args:
        problems: rows with `true_false`, their metadata merged in.
    """
    total, correct = len(problems), sum(bool(p["true_false"]) for p in problems)
    accuracy = str(round(correct / total * 100, 2))
    result: dict[str, Any] = {"average": {"accuracy": accuracy, "correct": correct, "total": total}}
    for key in GROUPS:
        groups: dict[Any, list[bool]] = {}
        for problem in problems:
            value = problem[key]
            for name in dict.fromkeys(value if key == "skills" else [value]):
                groups.setdefault(name, []).append(bool(problem["true_false"]))
        rows = {
            name: {
                "accuracy": f"{sum(values) / len(values) * 100:.2f}",
                "correct": sum(values),
                "total": len(values),
            }
            for name, values in groups.items()
        }
        # A stable sort: groups of equal accuracy stay in the order of the file.
        result[key] = dict(sorted(rows.items(), key=lambda row: -float(str(row[1]["accuracy"]))))
    return result
