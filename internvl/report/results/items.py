"""Items of an evaluation: the rows of every evaluator in one form."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from internvl.errors import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """An image or question that was scored."""

    row: Row
    """As the evaluator wrote it."""
    form: str
    """Its evaluator."""
    question: str
    answer: str
    images: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    score: float | None = None
    """None if the metric leaves it out."""
    most: float | None = 1.0
    """The best score; None if it has no bound, as CIDEr."""
    order: float = 0.0
    """Larger is better, also among equal scores."""
    parsed: str = ""
    boxes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    key: tuple[Any, ...] = ()
    """Equal for the same item of another model."""

    @property
    def right(self) -> bool | None:
        """Whether the answer counts as right: at least half of the best score."""
        if self.score is None or self.most is None:
            return None
        return self.score >= self.most / 2


def read_items(file: Path) -> list[Item]:
    """Reads the rows of an evaluation; those that list a sample that was left out are no items.

    Raises:
        UserError: the file is missing, or a line is no row.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: the answers of this evaluation were not kept")
    items = []
    # At line feeds alone: an answer may hold any other separator.
    for position, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            # Both models may have left out others; what is missing shows in the keys.
            if {"sample", "reason"} <= row.keys():
                continue
            items.append(item_of(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{file} line {position} is no row of an evaluation ({reason})"
            ) from None
    # Ratings of a judge go to 6 or 10, and none of them is right or wrong.
    if any(item.score is not None and item.score > 1 for item in items):
        items = [replace(item, most=None) for item in items]
    return _with_keys(items)


def item_of(row: Row) -> Item:
    """Makes an item of a row, without its key."""
    for keys, read in _READERS:
        if keys <= row.keys():
            return read(row)
    raise ValueError("its keys are those of no evaluator")


def shown(items: Sequence[Item], most: int = 12) -> tuple[list[Item], list[Item]]:
    """Returns the items with the lowest and with the highest scores, at most `most` of each.

    Among equal scores they are spread evenly over the data, so that all its categories are there.
    """
    # Answers for a server have no scores: any of them are shown then.
    scored = [item for item in items if item.score is not None] or list(items)
    worst = _extreme(scored, most, 1.0)
    # By identity: equal rows are different items.
    taken = {id(item) for item in worst}
    return worst, _extreme([item for item in scored if id(item) not in taken], most, -1.0)


def _extreme(items: Sequence[Item], most: int, sign: float) -> list[Item]:
    ordered = sorted(items, key=lambda item: sign * item.order)
    if len(ordered) <= most:
        return ordered
    limit = sign * ordered[most - 1].order
    inside = [item for item in ordered if sign * item.order < limit]
    tied = [item for item in ordered if sign * item.order == limit]
    count = most - len(inside)
    return inside + [tied[n * len(tied) // count] for n in range(count)]


def _with_keys(items: Sequence[Item]) -> list[Item]:
    """Gives every item its key: what identifies it, and how often that stood before it."""
    # Sets ask the same question of an image more than once.
    seen: Counter[tuple[Any, ...]] = Counter()
    keyed = []
    for item in items:
        # File names alone: the same data may lie in another folder.
        names = tuple(PurePath(image).name for image in item.images)
        identity = (item.row.get("set"), item.question, names, item.references, item.categories)
        keyed.append(replace(item, key=(*identity, seen[identity])))
        seen[identity] += 1
    return keyed


def _benchmark(row: Row) -> Item:
    score = row.get("score")
    return Item(
        row=row,
        form="benchmark",
        question=row["question"],
        answer=row["answer"],
        images=tuple(row["images"]),
        references=tuple(row.get("references", ())),
        categories=_categories(row),
        score=score,
        order=-1.0 if score is None else score,
        parsed=str(row.get("parsed", "")),
        boxes=row.get("boxes", {}),
    )


def _categories(row: Row) -> tuple[str, ...]:
    # A domain's own files have a text here, ours a list.
    value = row.get("category", ())
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _qa(row: Row) -> Item:
    score = row.get("score")
    category = row.get("category")
    return Item(
        row=row,
        form="qa",
        question=row["question"],
        answer=row["answer"],
        images=tuple(row["images"]),
        references=tuple(row["references"]),
        categories=() if category is None else (str(category),),
        score=score,
        order=-1.0 if score is None else score,
    )


def _caption(row: Row) -> Item:
    scores = row.get("scores", {})
    # The metric that captions are compared by; without it, whether they are exact.
    cider = scores.get("cider")
    return Item(
        row=row,
        form="caption",
        question="",
        answer=row["answer"],
        images=(row["image"],),
        references=tuple(row["references"]),
        score=float(row["exact"]) if cider is None else cider,
        most=1.0 if cider is None else None,
        order=float(row["exact"]) if cider is None else cider,
    )


def _rank(row: Row) -> int:
    # The last mode: InternVL-G, and re-ranked if it was.
    return [*row["rank"].values()][-1]


def _retrieval(row: Row) -> Item:
    rank = _rank(row)
    return Item(
        row=row,
        form="retrieval",
        question=row.get("text", ""),
        answer=f"rank {rank + 1:,}",
        images=(row["image"],),
        score=float(rank == 0),
        order=-float(rank),
    )


def _classify(row: Row) -> Item:
    rank = _rank(row)
    # Older rows name no class, only the rank of the right one.
    predicted = [*row.get("predicted", {}).values()][-1:]
    return Item(
        row=row,
        form="classify",
        # An image inside a larger file has a name and no path.
        question=row.get("inside", ""),
        answer=predicted[0] if predicted else f"rank {rank + 1:,}",
        images=(row["image"],) if row.get("image") else (),
        references=(row["class"],),
        categories=(row["class"],),
        score=float(rank == 0),
        order=-float(rank),
    )


def _labels(row: Row) -> Item:
    predicted = [*row["predicted"].values()][-1]
    right = float(predicted in row["classes"])
    return Item(
        row=row,
        form="labels",
        question=row.get("inside", ""),
        answer=predicted,
        images=(row["image"],) if row.get("image") else (),
        references=tuple(row["classes"]),
        score=right,
        order=right,
    )


def _preference(row: Row) -> Item:
    return Item(
        row=row,
        form="preference",
        question=row["sample"],
        answer=f"margin {row['margin']:+.3f}",
        score=row["accuracy"],
        order=row["margin"],
    )


_READERS: tuple[tuple[set[str], Callable[[Row], Item]], ...] = (
    ({"rank", "class"}, _classify),
    ({"classes", "predicted"}, _labels),
    ({"rank", "image"}, _retrieval),
    ({"margin", "sample"}, _preference),
    ({"turn", "metric"}, _qa),
    ({"image_id", "exact"}, _caption),
    ({"question", "answer", "images"}, _benchmark),
)
"""For each evaluator, keys that its rows have and those of the evaluators after it lack, and what
makes an item of such a row."""
