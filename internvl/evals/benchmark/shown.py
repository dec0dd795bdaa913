"""What a reader is shown of a question beside its answer: references, categories, boxes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internvl.datasets.tasks import Dataset
from internvl.evals.benchmark.results import Outcome
from internvl.evals.scoring import boxes, domains, mmmu

_MOST_REFERENCES = 10


Categories = Callable[[Outcome], list[str]]
Boxes = tuple[float, float, Sequence[float], Sequence[float]]
"""Width and height of an image; the boxes of reference and answer."""


def _fields(*paths: str) -> Categories:
    """Returns a function that lists the values of some fields, without those that are missing."""

    def categories(outcome: Outcome) -> list[str]:
        values = (_lookup(outcome.item.fields, path) for path in paths)
        return [str(value) for value in values if value is not None]

    return categories


def _mmmu_subject(outcome: Outcome) -> list[str]:
    # Subjects stand in the ids alone.
    name = mmmu.subject(str(outcome["id"]))
    return [*(d for d, names in mmmu.DOMAINS.items() if name in names), name]


def _seed_type(outcome: Outcome) -> list[str]:
    if outcome["type_id"] is None:
        return _fields("type")(outcome)
    # As the original's table: each type, and the two halves of the set.
    return [str(outcome["type"]), "image" if outcome["type_id"] in range(1, 10) else "video"]


def _mirb_groups(outcome: Outcome) -> list[str]:
    # Its number is a mean of groups: a task belongs to one, or counts nowhere.
    task = outcome["task"]
    return [task, *(g for g, names in domains.MIRB_GROUPS.items() if task in names)]


def _referred(outcome: Outcome) -> Boxes:
    # Each benchmark has its own order of the sides.
    height, width = outcome["hw"]
    answered = boxes.referred_box(outcome.answer, height, width).tolist()
    return width, height, outcome["gt_bbox"], answered


def _remote(outcome: Outcome) -> Boxes:
    width, height = outcome["size"]
    careful = boxes.careful_box(outcome.answer, height, width)
    return width, height, outcome["bbox"], [0.0] * 4 if careful is None else careful.tolist()


@dataclass(frozen=True)
class _Shown:
    """What is shown of the questions of a score; a path's dot leads into a field's mapping."""

    references: str = ""
    """Path of the field that holds them."""
    categories: Categories = _fields()
    boxes: Callable[[Outcome], Boxes] | None = None


_LETTER = "letter_of_answer"
_SHOWN: Mapping[str, _Shown] = {
    "soft_accuracy": _Shown("answers"),
    "anls": _Shown("answers"),
    "relaxed_accuracy": _Shown("annotation"),
    "exact": _Shown("annotation"),
    "gqa": _Shown("annotation"),
    "referred_box": _Shown("gt_bbox", boxes=_referred),
    "remote_box": _Shown("bbox", boxes=_remote),
    "mme": _Shown("expected", _fields("task")),
    "pope": _Shown("label", _fields("category")),
    "option_table": _Shown(_LETTER, _fields("category")),
    # MMMU-Pro's rows have a subject; ScienceQA's and M3CoT's have none.
    "letter_accuracy": _Shown(_LETTER, _fields("row.subject")),
    "pairs": _Shown(_LETTER),
    "seed": _Shown("scored_answer", _seed_type),
    "mvbench": _Shown("gt", _fields("task_type")),
    "world": _Shown(_LETTER, _fields("task")),
    "interleaved_choice": _Shown("row.answer", _fields("question_type")),
    "mirb": _Shown("answers", _mirb_groups),
    "mmiu": _Shown("gt", _fields("task")),
    "mmmu": _Shown("expected.ground_truth", _mmmu_subject),
    "contained": _Shown("gt_answers", _fields("task_type")),
    "remote_answers": _Shown("gt_answer", _fields("type")),
    "mathvista": _Shown("row.answer", _fields("row.metadata.task")),
    "mathvista_quick": _Shown("row.answer", _fields("row.metadata.task")),
    "mmhal": _Shown("row.gt_answer", _fields("row.question_type")),
    "llava_bench": _Shown("", _fields("category")),
    "mm_vet": _Shown("expected"),
}
"""Name of a score or rubric -> what is shown of its questions."""


def described(outcome: Outcome, dataset: Dataset) -> dict[str, Any]:
    """Returns what a row of ours adds about a question: `references`, `category` and `boxes`, each
    only where the data set has it."""
    shown = _SHOWN.get(dataset.score or dataset.judge, _Shown())
    references = _texts(_lookup(outcome.item.fields, shown.references))
    categories = shown.categories(outcome)
    boxes_of = _shares(*shown.boxes(outcome)) if shown.boxes else {}
    return {
        **({"references": references[:_MOST_REFERENCES]} if references else {}),
        **({"category": categories} if categories else {}),
        **({"boxes": boxes_of} if boxes_of else {}),
    }


def _lookup(fields: Mapping[str, Any], path: str) -> Any:
    value: Any = fields
    for name in path.split(".") if path else ():
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if path else None


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    if _is_box(value):
        return [f"[{', '.join(f'{side:g}' for side in value)}]"]
    # Ten people's answers to a question of VQA repeat one another.
    several = isinstance(value, list | tuple)
    return list(dict.fromkeys(map(str, value))) if several else [str(value)]


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 4
        and all(isinstance(side, int | float) for side in value)
    )


def _shares(
    width: float, height: float, reference: Sequence[float], answer: Sequence[float]
) -> dict[str, list[float]]:
    """Returns the boxes of reference and answer in shares of the image's sides."""
    sides = (width, height, width, height)
    return {
        role: [round(float(value) / side, 4) for value, side in zip(box, sides, strict=True)]
        for role, box in (("reference", reference), ("answer", answer))
        # The original's box of an answer without one: nothing to draw.
        if any(box) and all(map(math.isfinite, box))
    }
