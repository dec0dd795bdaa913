"""Boxes in answers: parsing, scaling to pixels, intersection over union.

Original: `internvl_chat/eval/refcoco/evaluate_grounding.py` and `eval/domain_specific/rs_det`.
"""

import json
import re
from collections.abc import Sequence

import numpy as np

_REF_BOX = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*")
_REMOTE_BOX = re.compile(r"\[*\[.*?,.*?,.*?,.*?\]\]*")
_NUMBER = r"\s*(-?\d*\.?\d+(?:[eE][+-]?\d+)?)\s*"
_PLAIN_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""


def referred_box(answer: str, height: float, width: float) -> np.ndarray:
    """Returns the first bracket of an answer as a box in pixels, float32 (4,); zeros if it is none.

    Coordinates whose sum is below 4 are taken from 0 to 1, others from 0 to 1000.
    """
    # evaluate_grounding.py:185: lazy groups from the first bracket on, so that a bracketed word
    # before the box, or a fifth number, loses it.
    match = _REF_BOX.search(answer)
    try:
        numbers = [float(text) for text in match.groups()] if match else [0.0] * 4
    except ValueError:
        numbers = [0.0] * 4
    return _scaled(numbers, height, width)


def careful_box(answer: str, height: float, width: float) -> np.ndarray | None:
    """Returns the first bracket of four numbers as a box in pixels, float32 (4,); None without one.

    Swapped corners are put right and the box is cut at the image's border.
    """
    match = _PLAIN_BOX.search(answer)
    if match is None:
        return None
    numbers = [float(text) for text in match.groups()]
    # A value above 1 cannot be a share of the image, whatever the sum is.
    shares = max(numbers) <= 1
    box = np.array(numbers, np.float32) / (1 if shares else 1000)
    x1, x2 = sorted((box[0], box[2]))
    y1, y2 = sorted((box[1], box[3]))
    return np.clip(np.array([x1, y1, x2, y2]), 0, 1) * np.array([width, height] * 2, np.float32)


def _scaled(numbers: Sequence[float], height: float, width: float) -> np.ndarray:
    # float32 throughout, as the original's tensors: the threshold may hang on the last bit.
    with np.errstate(all="ignore"):
        box = np.array(numbers, np.float32)
        if box.sum(dtype=np.float32) >= 4:
            box = box / np.float32(1000)
        return box * np.array([width, height, width, height], np.float32)


def box_iou(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float:
    """Computes the intersection over union of two boxes in float32; NaN if both are empty."""
    a, b = np.asarray(left, np.float32), np.asarray(right, np.float32)
    with np.errstate(all="ignore"):
        sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), np.float32(0))
        shared = sides[0] * sides[1]
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        return float(shared / (areas[0] + areas[1] - shared))


def pixel_iou(left: Sequence[float], right: Sequence[float]) -> float:
    """Computes the intersection over union with inclusive pixels: one more in every side."""
    (x1, y1, x2, y2), (x3, y3, x4, y4) = left, right
    shared = max(0, min(x2, x4) - max(x1, x3) + 1) * max(0, min(y2, y4) - max(y1, y3) + 1)
    union = (x2 - x1 + 1) * (y2 - y1 + 1) + (x4 - x3 + 1) * (y4 - y3 + 1) - shared
    return shared / union


def remote_box(numbers: Sequence[float], width: float, height: float) -> list[float]:
    """Scales a box from 0…1000 to pixels and cuts it at the image's border."""
    x1, y1, x2, y2 = numbers
    return [
        min(max(value / 1000 * side, 0), side)
        for value, side in ((x1, width), (y1, height), (x2, width), (y2, height))
    ]


def remote_correct(answer: str, expected: Sequence[float], size: Sequence[float]) -> bool:
    """True if the first [[x1, y1, x2, y2]] of an answer has an IoU above 0.5 with `expected`.

    Original: DIOR-RSVG; any other form, a single bracket too, is wrong. size: (width, height).
    """
    match = _REMOTE_BOX.search(answer)
    if match is None:
        return False
    try:
        box = remote_box(json.loads(match[0])[0], *size)
        return pixel_iou(box, expected) > 0.5
    # Whatever the bracket holds instead of four numbers, or two boxes without any pixel.
    except (ValueError, TypeError, IndexError, KeyError, ZeroDivisionError):
        return False
