"""Time that a step loses to its slowest rank, by the planner's costs; no model, no GPU.

    python benchmarks/balance.py --to benchmarks/results/balance_cpu.json

Samples are drawn, dealt to ranks as training deals them (each rank reads every N-th sample of the
step, then `balance.even_rows`), and costed as InternVL-Chat-V1-2 trained whole. Two losses, each
the slowest over the mean, minus 1:

    step    every rank computes all of its rows before it meets the others (weights are whole)
    row     ranks meet in every row (weights are sharded: each block is gathered by all)

`unbalanced` is what every N-th sample alone would lose, packed by best fit on each rank.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import rows as tables
import workloads

from internvl import plan
from internvl.config import recipes
from internvl.data.balance import Piece, even_rows
from internvl.data.packing import ROW_SHARES, least_padded, padded_tokens
from internvl.plan import costs as plan_costs
from internvl.plan.work import Sequences, Work

SAMPLES = 512
"""Samples of a step, as InternVL-Chat-V1-2's."""
ROW_TOKENS, MAX_TILES = 16384, 64
LENGTHS = [int(ROW_TOKENS * share) for share in ROW_SHARES]
RECIPE = {
    "model": {"id": "OpenGVLab/InternVL-Chat-V1-2"},
    "data": {"sources": [{"name": "drawn", "annotations": "none.jsonl"}], "max_tokens": 4096},
    "compute": {"checkpointing": "full"},
    "run": "run",
    "global_batch": SAMPLES,
    "epochs": 1,
}

Size = tuple[int, int, int]
"""(tokens, tiles, supervised tokens)"""


def one_tile(seed: int) -> Iterator[Size]:
    """A tile and texts of 50 to 1,700 tokens, the shorter the more frequent."""
    rng = random.Random(seed)
    while True:
        text = round(50 * 34 ** rng.random())
        yield 256 + text, 1, round(0.6 * text)


def mixture(seed: int) -> Iterator[Size]:
    """Instruction tuning with up to 13 tiles, as `workloads.mixture` draws it."""
    for sample in workloads.mixture(seed):
        tiles = workloads.num_tiles(sample.size, sample.max_tiles)
        yield sample.question + sample.answer + 256 * tiles, tiles, sample.answer


MIXTURES = {"one tile": one_tile, "mixture": mixture}


def lost(costs: list[list[float]]) -> tuple[float, float]:
    """(step, row): what is lost with rows of these costs on every rank."""
    rounds = max(map(len, costs))
    table = np.array([sorted(row, reverse=True) + [0.0] * (rounds - len(row)) for row in costs])
    mean = table.sum(axis=1).mean()
    return table.sum(axis=1).max() / mean - 1, table.max(axis=0).sum() / mean - 1


def packed(sizes: list[Size], values: list[float]) -> list[float]:
    """Costs of the rows that a rank packs its samples into."""
    dealt = least_padded([size[:2] for size in sizes], ROW_TOKENS, MAX_TILES)
    return [sum(values[i] for i in row) for row in dealt]


def measure(name: str, num_ranks: int, steps: int, costs: plan_costs.Costs) -> dict[str, Any]:
    """Losses of one mixture at one number of ranks, over `steps` steps."""
    stream = MIXTURES[name](0)
    found: dict[str, list[Any]] = {
        key: [] for key in ("unbalanced", "balanced", "rows", "fill", "moved", "s")
    }
    for _ in range(steps):
        drawn = list(islice(stream, SAMPLES))
        read = [drawn[rank::num_ranks] for rank in range(num_ranks)]
        values = [[cost_of(size, costs) for size in sizes] for sizes in read]
        pieces = [
            [Piece(cost, *size[:2]) for cost, size in zip(*rank, strict=True)]
            for rank in zip(values, read, strict=True)
        ]
        started = time.perf_counter()
        dealt = even_rows(pieces, LENGTHS, MAX_TILES)
        found["s"].append(time.perf_counter() - started)
        moved = sum(
            holder != rank for rank, rows in enumerate(dealt) for row in rows for holder, _ in row
        )
        found["moved"].append(moved / SAMPLES)
        found["rows"].append(len(dealt[0]))
        padded = sum(
            padded_tokens(sum(read[r][i][0] for r, i in row), ROW_TOKENS)
            for rows in dealt
            for row in rows
        )
        found["fill"].append(sum(size[0] for size in drawn) / padded)
        found["unbalanced"].append(lost(list(map(packed, read, values))))
        found["balanced"].append(
            lost([[sum(values[r][i] for r, i in row) for row in rows] for rows in dealt])
        )
    before, after = (np.mean(found[key], axis=0) for key in ("unbalanced", "balanced"))
    return {
        "row": f"{name}, {num_ranks} ranks",
        "steps": steps,
        "samples_per_step": SAMPLES,
        "unbalanced": {"step": before[0], "row": before[1]},
        "balanced": {"step": after[0], "row": after[1]},
        "worst_step": dict(
            zip(("step", "row"), map(float, np.max(found["balanced"], axis=0)), strict=True)
        ),
        "rows_per_rank": float(np.mean(found["rows"])),
        "fill": float(np.mean(found["fill"])),
        "moved_share": float(np.mean(found["moved"])),
        "ms_to_deal": 1000 * float(np.mean(found["s"])),
    }


def cost_of(size: Size, costs: plan_costs.Costs) -> float:
    tokens, tiles, supervised = size
    attended = tokens * (tokens + 1) / 2
    return costs.of_work(Work(1, tiles, supervised, Sequences(0, tokens, attended)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    recipe = plan.complete(recipes.resolve(RECIPE)).recipe
    costs = plan_costs.costs_of(recipe, plan.model_of(recipe))
    measured = []
    for name in MIXTURES:
        for num_ranks in arguments.ranks:
            row = measure(name, num_ranks, arguments.steps, costs) | {"commit": tables.commit()}
            measured.append(tables.rounded(row))
            print(json.dumps(measured[-1]), flush=True)
    if arguments.to is not None:
        arguments.to.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
