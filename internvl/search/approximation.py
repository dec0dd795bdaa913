"""Approximate indexes of an index: built when asked for, renewed when many photos have come."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from internvl.log import get_logger
from internvl.search.encoder import Encoder
from internvl.search.ranking import build_approximate
from internvl.search.store import Store

COVERED = 0.9
"""Least share of the rows that an approximate index covers; the others are ranked exactly."""

NUM_IMAGES = 100
"""Photos whose nearest ones measure the recall, besides `TEXTS`."""

_NOUNS = (
    *("a dog", "a cat", "a child", "a bride", "a birthday cake", "a beach", "a mountain lake"),
    *("a city at night", "a bicycle", "a car", "a train", "a ship", "flowers", "snow", "a forest"),
    *("food on a plate", "a document", "a screenshot", "people at a table", "a football match"),
    *("狗", "猫", "孩子", "婚礼", "海边", "山", "城市夜景", "自行车", "花", "雪", "食物", "文件"),
)
TEXTS = [*_NOUNS, *(f"a photo of {noun}" for noun in _NOUNS[:20])]
"""Queries whose nearest photos measure the recall."""


def renew(store: Store, encoder: Encoder, recall: float | None) -> dict[str, dict[str, Any]]:
    """Builds the approximate index of every mode, if it is asked for or has become old.

    Args:
        recall: share of the best ten that it finds; None to keep what there is up to date.

    Returns:
        Mode -> what `build_approximate` measured, of those that were built.
    """
    results: dict[str, dict[str, Any]] = {}
    for mode in store.settings.modes:
        file, built = store.approximate(mode)
        # A compaction removes the file; the share that was asked for stays.
        earlier = store.meta(f"approximate_{mode}")
        target = recall or (json.loads(earlier)["target"] if earlier is not None else None)
        is_old = built is None or built["rows"] < COVERED * store.num_rows
        if target is None or not store.num_rows or not (is_old or recall):
            continue
        get_logger().info("building the approximate index of mode %s …", mode)
        features = store.features(mode)
        # A fixed seed: the same photos are measured with every time.
        draw = np.random.default_rng(0)
        rows = draw.choice(len(features), min(NUM_IMAGES, len(features)), replace=False)
        images = torch.from_numpy(features[np.sort(rows)].astype(np.float32))
        # Texts lie elsewhere than photos, and often need more lists.
        queries = {"texts": encoder.texts(TEXTS), "images": images}
        measured = build_approximate(features, file, recall=target, queries=queries)
        results[mode] = measured | {"target": target}
        store.set_meta(f"approximate_{mode}", json.dumps(results[mode]))
    return results


def describe(built: Mapping[str, Any]) -> str:
    """Describes it: "reads 8 of 4,000 lists, recall@10 0.993 (texts), 0.998 (images)"."""
    recalls = ", ".join(f"{value:.3f} ({name})" for name, value in built["recall"].items())
    lists = f"reads {built['probes']:,} of {built['lists']:,} lists"
    return f"{lists}, recall@{built['k']} {recalls}"
