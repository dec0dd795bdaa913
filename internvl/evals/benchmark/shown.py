"""What a reader is shown of a question beside its answer: references, categories, boxes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl.datasets.tasks import Dataset
from internvl.evals.benchmark.results import Outcome
from internvl.evals.scoring import boxes, domains, mmmu

_MOST_REFERENCES = 10


@dataclass(frozen=True)
class _Fields:
    """Where the fields of a question hold them; a dot leads into a field that is a mapping."""

    references: str = ""
    categories: tuple[str, ...] = ()


_LETTER = "letter_of_answer"
_FIELDS: Mapping[str, _Fields] = {
    "soft_accuracy": _Fields("answers"),
    "anls": _Fields("answers"),
    "relaxed_accuracy": _Fields("annotation"),
    "exact": _Fields("annotation"),
    "gqa": _Fields("annotation"),
    "referred_box": _Fields("gt_bbox"),
    "remote_box": _Fields("bbox"),
    "mme": _Fields("expected", ("task",)),
    "pope": _Fields("label", ("category",)),
    "option_table": _Fields(_LETTER, ("category",)),
    # MMMU-Pro's rows have a subject; ScienceQA's and M3CoT's have none.
    "letter_accuracy": _Fields(_LETTER, ("row.subject",)),
    "pairs": _Fields(_LETTER),
    "seed": _Fields("scored_answer", ("type",)),
    "mvbench": _Fields("gt", ("task_type",)),
    "world": _Fields(_LETTER, ("task",)),
    "interleaved_choice": _Fields("row.answer", ("question_type",)),
    "mirb": _Fields("answers", ("task",)),
    "mmiu": _Fields("gt", ("task",)),
    "mmmu": _Fields("expected.ground_truth"),
    "contained": _Fields("gt_answers", ("task_type",)),
    "remote_answers": _Fields("gt_answer", ("type",)),
    "mathvista": _Fields("row.answer", ("row.metadata.task",)),
    "mathvista_quick": _Fields("row.answer", ("row.metadata.task",)),
    "mmhal": _Fields("row.gt_answer", ("row.question_type",)),
    "llava_bench": _Fields("", ("category",)),
    "mm_vet": _Fields("expected"),
}
"""Name of a score or rubric -> its fields."""


def described(outcome: Outcome, dataset: Dataset) -> dict[str, Any]:
    """Returns what a row of ours adds about a question: `references`, `category` and `boxes`, each
    only where the data set has it."""
    fields = _FIELDS.get(dataset.score or dataset.judge, _Fields())
    references = _texts(_lookup(outcome.item.fields, fields.references))
    categories = _categories(outcome, fields, dataset)
    boxes_of = _boxes(outcome, dataset)
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


def _categories(outcome: Outcome, fields: _Fields, dataset: Dataset) -> list[str]:
    if dataset.score == "mmmu":
        # Subjects stand in the ids alone.
        name = mmmu.subject(str(outcome["id"]))
        return [*(d for d, names in mmmu.DOMAINS.items() if name in names), name]
    if dataset.score == "seed" and outcome["type_id"] is not None:
        # As the original's table: each type, and the two halves of the set.
        half = "image" if outcome["type_id"] in range(1, 10) else "video"
        return [str(outcome["type"]), half]
    if dataset.score == "mirb":
        # Its number is a mean of groups: a task belongs to one, or counts nowhere.
        task = outcome["task"]
        return [task, *(g for g, names in domains.MIRB_GROUPS.items() if task in names)]
    values = (_lookup(outcome.item.fields, path) for path in fields.categories)
    return [str(value) for value in values if value is not None]


def _boxes(outcome: Outcome, dataset: Dataset) -> dict[str, list[float]]:
    """Returns the boxes of reference and answer in shares of the image's sides."""
    if dataset.score == "referred_box":
        (height, width), expected = outcome["hw"], outcome["gt_bbox"]
        answered = boxes.referred_box(outcome.answer, height, width).tolist()
    elif dataset.score == "remote_box":
        (width, height), expected = outcome["size"], outcome["bbox"]
        careful = boxes.careful_box(outcome.answer, height, width)
        answered = [0.0] * 4 if careful is None else careful.tolist()
    else:
        return {}
    sides = (width, height, width, height)
    shares = {"reference": expected, "answer": answered}
    return {
        role: [round(float(value) / side, 4) for value, side in zip(box, sides, strict=True)]
        for role, box in shares.items()
        # The original's box of an answer without one: nothing to draw.
        if any(box) and all(map(math.isfinite, box))
    }
