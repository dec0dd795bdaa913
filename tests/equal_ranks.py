"""Trains the same small runs on one process and on several, and says by how much they differ.

    python tests/equal_ranks.py --to benchmarks/results/equal_ranks_cpu.json
    python tests/equal_ranks.py "adapters" "pairs" --steps 20

Losses of all steps, relatively; the first gradient, relatively to its largest value. Half of the
samples have no image, and a rank has none of the rows of one half in every second step.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pair_runs
import sharded_runs
from sharded_runs import CUT_TOWER, TRAINED, WHOLE_TOWER, Case

HALVES = "ranks == 1 or (rank == step % 2) == (row.num_tiles > 0)"
SPREAD = "(i + step) % 3 == rank if ranks > 1 else True"
CHAT = ("data.max_tokens=64", "compute.checkpointing=full", "optim.lr=1e-4")
PAIRS = ("global_batch=5", "compute.checkpointing=full", "optim.lr=1e-4")
STAGES = ("zero1", "zero2", "zero3")
EAGER = "torch.compiler.set_stance('force_eager')"
"""Compiled for every shape, the update of 8-bit moments takes minutes."""


@dataclass(frozen=True)
class Comparison:
    """A run, and how several ranks take it."""

    case: Case
    stages: tuple[str, ...] = ("zero3",)
    more: tuple[str, ...] = ()
    """Settings of the run on several ranks."""
    num_ranks: int = 2
    pairs: bool = False


def of_chat(case, **more):
    settings = ("global_batch=2", *CHAT, *case.settings)
    return Comparison(replace(case, settings=settings, deal=HALVES), **more)


COMPARISONS = {
    **{
        name: of_chat(case, stages=STAGES if name == "full" else ("zero3",))
        for name, case in TRAINED.items()
    },
    "adamw-8bit": of_chat(Case(("optim.name=adamw-8bit",), EAGER), stages=("zero1", "zero3")),
    "four ranks, 2 x 2, one without rows": Comparison(
        Case(("global_batch=3", *CHAT), deal=SPREAD), STAGES, ("parallel.replicas=2",), 4
    ),
    "pairs": Comparison(Case(PAIRS, WHOLE_TOWER), STAGES, pairs=True),
    "pairs, frozen tower cut": Comparison(
        Case((*PAIRS, "model.train=[language_model, heads]"), CUT_TOWER), pairs=True
    ),
}


def compare(name, num_steps, folder):
    """Yields the differences of a comparison, one a stage."""
    chosen = COMPARISONS[name]
    objective = {"name": "retrieval", "micro_batch": 2}
    make = pair_runs.make if chosen.pairs else sharded_runs.project
    recipe = make(folder, **({"objective": objective} if chosen.pairs else {}))
    case = replace(chosen.case, settings=(*chosen.case.settings, f"steps={num_steps}"))
    (one,) = sharded_runs.take(recipe, folder / "one", {"one": case}, num_ranks=1).values()
    cases = {
        stage: replace(case, settings=(*case.settings, *chosen.more, f"parallel.shard={stage}"))
        for stage in chosen.stages
    }
    taken = sharded_runs.take(recipe, folder / "many", cases, num_ranks=chosen.num_ranks)
    for stage, several in taken.items():
        losses = (several.values[:, 0] / one.values[:, 0] - 1).abs().max()
        largest = max(gradient.abs().max() for gradient in one.gradients.values())
        pairs = [(several.gradients[key], one.gradients[key]) for key in one.gradients]
        gradient = max((first - second).abs().max() for first, second in pairs) / largest
        yield {
            "run": name,
            "shard": stage,
            "ranks": chosen.num_ranks,
            "steps": len(one.values),
            "rows": [sum(rows for rows, _ in steps) for steps in several.rows],
            "images": [sum(tiles for _, tiles in steps) for steps in several.rows],
            "losses": float(f"{losses.item():.2g}"),
            "first_gradient": float(f"{gradient.item():.2g}"),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="RUN", help=", ".join(COMPARISONS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--to", type=Path, help="JSON file; its other runs stay")
    options = parser.parse_args()
    rows = []
    if options.to is not None and options.to.exists():
        rows = json.loads(options.to.read_text(encoding="utf-8"))
    for name in options.names or COMPARISONS:
        if name == "adamw-8bit" and find_spec("torchao") is None:
            sys.stderr.write(f"{name}: left out, torchao is not installed\n")
            continue
        rows = [row for row in rows if row["run"] != name]
        with tempfile.TemporaryDirectory() as folder:
            for row in compare(name, options.steps, Path(folder)):
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
                rows.append(row)
        if options.to is not None:
            options.to.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
