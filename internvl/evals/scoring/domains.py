"""Rules of single data sets: MIRB's tasks, remote-sensing answers, DriveLM's camera points.

Original: `internvl_chat/eval/{mirb,domain_specific}`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from internvl.errors import UserError

_CARDINALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_CARDINALS)} | {
    word: str(value) for value, word in enumerate(_ORDINALS, start=1)
}

MIRB_GROUPS: Mapping[str, tuple[str, ...]] = {
    "Knowledge": ("food", "sightseeing"),
    "Reasoning": ("codeu", "plot_code", "analogy", "3d_scene"),
    "Perception": ("image_jigsaw", "count", "attribute"),
    "Multi-Hop": ("visual_chain", "arxiv"),
}
"""Group -> the tasks whose means it averages."""

_WORD, _SYMBOL = "Answer with a single word.", "Answer with the option symbol."
_TITLE, _COUNT = "Answer with the paper title.", "Answer with a single number."
_SCENE = f"The following images are different views of the same 3D scene. {_COUNT}"

# Task -> (instruction, rule of its score).
_MIRB_TASKS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("analogy", "attribute"), (_WORD, "yes_no")),
    **dict.fromkeys(("plot_code", "plot_text"), (_WORD, "text")),
    "sightseeing": (_WORD, "contained"),
    **dict.fromkeys(("image_needles", "image_needles_concat"), (_WORD, "number")),
    **dict.fromkeys(("visual_chain", "visual_chain_concat"), (_WORD, "number")),
    **dict.fromkeys(("codeu", "food", "image_jigsaw", "codeu_text"), (_SYMBOL, "text")),
    **dict.fromkeys(("arxiv", "arxiv_text"), (_TITLE, "text")),
    **dict.fromkeys(("count", "count_concat"), (_COUNT, "number")),
    **dict.fromkeys(("3d_scene", "3d_scene_concat"), (_SCENE, "number")),
}


def mirb_instruction(task: str) -> str:
    """Returns the instruction after a question. Raises UserError for an unknown task."""
    return _mirb_task(task)[0]


def _mirb_task(task: str) -> tuple[str, str]:
    if task not in _MIRB_TASKS:
        names = ", ".join(_MIRB_TASKS)
        raise UserError(f"MIRB has no rule for the task {task!r}; it has {names}")
    return _MIRB_TASKS[task]


def mirb_score(prediction: str, expected: Any, task: str, *, careful: bool = False) -> float:
    """Returns 1 if a prediction is right by the rule of its task, else 0.

    The prediction ends at its first line break, or else at its first period: "3.5" becomes "3".

    Args:
        careful: a period between digits does not end it, and an empty answer is wrong.
    """
    _, rule = _mirb_task(task)
    text, answer = _first_sentence(prediction, careful).lower(), str(expected).lower()
    if careful and not text:
        return 0.0
    if rule == "yes_no" or (rule == "contained" and answer in ("yes", "no")):
        return float(answer in ("yes", "no") and ("yes" in text) == (answer == "yes"))
    if rule == "contained":
        return float(answer in text)
    if rule == "number":
        match = re.search(r"\d+(?:\.\d+)?" if careful else r"\d+", text)
        # evaluate_mirb.py:42: without any digit the whole reply must be a number word, so that
        # an expected empty text equals every reply without a number.
        text = match[0] if match else _NUMBER_WORDS.get(text, "")
    return float(text == answer)


def _first_sentence(text: str, careful: bool) -> str:
    text = text.strip()
    # The line break has precedence; a period counts only where there is none.
    end = text.find("\n")
    if end <= 0:
        periods = [m.start() for m in re.finditer(r"\.(?!\d)" if careful else r"\.", text)]
        end = periods[0] if periods else -1
    return text[:end] if end > 0 else text


def mirb_averages(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the mean of every group's task means, and the mean of the groups as "mean".

    A task without rows is left out of its group; the original stops.
    """
    groups = {}
    for name, tasks in MIRB_GROUPS.items():
        means = [sum(scores[task]) / len(scores[task]) for task in tasks if scores.get(task)]
        if means:
            groups[name] = sum(means) / len(means)
    return groups | ({"mean": sum(groups.values()) / len(groups)} if groups else {})


def same_bucket(response: Any, expected: Any) -> bool:
    """True if two whole numbers are both 0, or both in 1…100, 101…1000 or above 1000.

    Original: RSVQA's counts; negative numbers are never right, nor is what is no whole number.
    """
    try:
        count = 0 if response is None else int(response)
        target = int(expected)
    except (ValueError, TypeError):
        return False
    if count == 0 and target == 0:
        return True
    return any(
        low < count <= high and low < target <= high
        for low, high in ((0, 100), (100, 1000), (1000, float("inf")))
    )


def same_area(response: Any, expected: Any) -> bool:
    """`same_bucket` of areas; every final "m" and "2" of the expected one is dropped, so that
    "12m2" is 1. Original: RSVQA."""
    # score.py:23: rstrip takes characters, not a suffix; the reply keeps its unit and is wrong.
    return isinstance(expected, str) and same_bucket(response, expected.rstrip("m2"))


def remote_answer(response: Any, expected: Any, question_type: str) -> bool:
    """True if an answer is right by RSVQA's rule for its type of question."""
    rule = {"count": same_bucket, "area": same_area}.get(question_type)
    if rule is not None:
        return rule(response, expected)
    return bool(response) and response.lower() == str(expected).lower()


def careful_remote_answer(response: str, expected: Any, question_type: str) -> bool:
    """`remote_answer` without units, spaces, marks and words around."""
    text, answer = str(response).strip().rstrip(".").lower(), str(expected).strip().lower()
    if question_type not in ("count", "area"):
        return bool(text) and text == answer.rstrip(".")
    numbers = [re.search(r"-?\d[\d,]*", value) for value in (text, answer)]
    if None in numbers:
        return False
    # The unit follows the number, so its first digits are the number.
    return same_bucket(*(match[0].replace(",", "") for match in numbers if match))


_TAG = re.compile(r"<c[^,]*,\s*[^,]*,\s*\[\s*-?[0-9]*\.?[0-9]+\s*,\s*-?[0-9]*\.?[0-9]+\s*\]\s*>")
_CAMERAS = {
    name: (column, row)
    for row, names in enumerate(
        (
            ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"),
            ("CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"),
        )
    )
    for column, name in enumerate(names)
}
_CELL = (896, 448)  # pixels of a camera in the mosaic of 3 x 2
_CAMERA = (1600, 900)  # pixels of a camera


def camera_points(answer: str) -> str:
    """Replaces points of the mosaic, <c1,CAM_BACK,[x,y]> in 0…1000, by camera pixels,
    <c1,CAM_BACK,x,y>. Original: DriveLM; tags of other cameras stay."""
    text = answer.strip()
    for tag in _TAG.findall(text):
        inner = tag.replace("<", "").replace(">", "")
        name, camera, *point = inner.split(",")
        if camera not in _CAMERAS:
            continue
        try:
            x, y = json.loads(",".join(point))
        except ValueError:
            continue  # ".5" is no JSON number, and stays as in the original
        cell_x, cell_y = _CAMERAS[camera]
        px = _camera_pixel(x, 3 * _CELL[0], cell_x * _CELL[0], _CELL[0], _CAMERA[0])
        py = _camera_pixel(y, 2 * _CELL[1], cell_y * _CELL[1], _CELL[1], _CAMERA[1])
        text = text.replace(tag, f"<{name},{camera},{px},{py}>")
    return text


def _camera_pixel(value: float, whole: int, offset: int, cell: int, camera: int) -> float:
    pixel = (value / 1000 * whole - offset) / cell * camera
    # A bound stays an integer, so that it is written without ".0".
    return round(max(0, min(camera, pixel)), 1)
