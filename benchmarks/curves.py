"""Curves of runs over their seeds. Results are by name, `ARM-SEED`: of every point of measuring
`curve` has the figures, beside its `step` and `samples`; `train_loss` is the smoothed loss."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PLACE = ("step", "samples")


def last_points(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of every arm the mean and spread over its seeds of the last point's figures."""
    arms: dict[str, list[dict[str, float]]] = {}
    for name, result in results.items():
        arms.setdefault(name.rpartition("-")[0], []).append(result["curve"][-1])
    return {
        arm: {"seeds": len(last)}
        | {key: mean_and_spread([row[key] for row in last]) for key in last[0] if key not in PLACE}
        for arm, last in arms.items()
    }


def effect(results: Mapping[str, Any], arm: str, base: str) -> dict[str, Any]:
    """What `arm` adds to the figures of `base` with the same seed.

    Returns:
        points: of every figure the mean and spread of that difference over seeds, and as
            `spread_of_BASE` how far the seeds of `base` themselves are apart.
        train_loss: its mean over seeds.
    """
    seeds = [name.rpartition("-")[2] for name in results if name.rpartition("-")[0] == arm]
    pairs = [
        (results[f"{arm}-{seed}"], results[f"{base}-{seed}"])
        for seed in seeds
        if f"{base}-{seed}" in results
    ]
    points = []
    for ours in zip(*(zip(a["curve"], b["curve"], strict=True) for a, b in pairs), strict=True):
        first = ours[0][0]
        points.append({key: first[key] for key in PLACE})
        for key in first:
            if key not in PLACE:
                # A loss that is taken in float8 stands beside the one loss of bfloat16.
                of_base = [row[key.removesuffix("_in_float8")] for _, row in ours]
                added = [a[key] - b for (a, _), b in zip(ours, of_base, strict=True)]
                spread = mean_and_spread(of_base)["spread"]
                points[-1][key] = mean_and_spread(added) | {f"spread_of_{base}": spread}
    curves = [zip(a["train_loss"], b["train_loss"], strict=True) for a, b in pairs]
    return {
        "seeds": len(pairs),
        "points": points,
        "train_loss": [
            round(statistics.mean(a - b for a, b in part), 5) for part in zip(*curves, strict=True)
        ],
    }


def mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """The spread is the standard deviation of a sample; a single value has none."""
    spread = round(statistics.stdev(values), 5) if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 5), "spread": spread}
