"""Steps of the same runs on one process and on several: losses, norms and the first gradient."""

import json
from dataclasses import dataclass
from pathlib import Path

import tiny_run
import torch
from ranks import run_ranks

STEPS = """
import sys
import torch
from torch.distributed.tensor import DTensor

from internvl import dist, train
from internvl.config import recipes
from internvl.data import loader
from internvl.models import units
from internvl.training.run import reading


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def dealt(run, deal):
    \"\"\"Rows of every step: as the loader shares them out, or those that `deal` takes.\"\"\"
    if deal is None:
        yield from (step.batches for step in reading.steps(run))
        return
    names = {{"rank": dist.rank(), "ranks": dist.world_size()}}
    steps = loader.steps(
        run.order, run.reader, run.objective.batches, first=0, last=run.num_steps,
        global_batch=run.recipe.batch_samples, total=run.total_samples,
    )
    for step in steps:
        rows = [(step.index, i, row) for i, row in enumerate(step.batches)]
        yield [row for s, i, row in rows if eval(deal, names | {{"step": s, "i": i, "row": row}})]


for name, (settings, before, deal) in {cases!r}.items():
    exec(before)
    run = train.build(recipes.load_recipe({recipe!r}, settings))
    gradients, values, rows = {{}}, [], []

    def keep(optimizer, *_):
        if not gradients:
            for key, p in run.model.named_parameters():
                if p.grad is not None:
                    gradients[key] = full(p.grad).clone()

    run.optimizer.register_step_pre_hook(keep)
    for batches in dealt(run, deal):
        metrics = train.train_step(run, batches)
        values.append([metrics["loss"], metrics["grad_norm"]])
        rows.append([len(batches), sum(batch.num_tiles for batch in batches)])
    rows = dist.gather_objects(rows)
    if dist.is_main():
        dynamo = sys.modules.get("torch._dynamo.utils")
        graphs = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
        torch.save([values, gradients, rows, graphs], {to!r} + f"/{{name}}.pt")
"""


@dataclass(frozen=True)
class Case:
    """A run: settings of its recipe, code before it is built, and which rows each rank takes."""

    settings: tuple[str, ...]
    before: str = ""
    deal: str | None = None
    """Expression over step, i, row, rank and ranks; None: as training shares them out."""


CUT_TOWER = "units.SMALL_TOWER = 0"
WHOLE_TOWER = "units.SMALL_TOWER = 10**9"
LORA = "model.lora={{rank: 4, on: [{}], dropout: 0.0}}"
FROZEN = "model.train=[multi_modal_projector, language_model]"
TRAINED = {
    "full": Case((), WHOLE_TOWER),
    "frozen tower on every rank": Case((FROZEN,), WHOLE_TOWER),
    "frozen tower cut": Case((FROZEN, "compute.offload=true"), CUT_TOWER),
    "adapters": Case(("model.train=[multi_modal_projector]", LORA.format("language_model"))),
    "adapters on both": Case(
        ("model.train=[]", LORA.format("language_model, vision_tower"), "compute.offload=true"),
        CUT_TOWER,
    ),
    "muon": Case(("optim.name=muon",), WHOLE_TOWER),
}


def project(folder):
    """Makes the small project, each sample with a row of its own, every second without an image."""
    recipe = tiny_run.make(folder)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for line in lines[1::2]:
        del line["image"]
        line["conversations"][0]["value"] = line["conversations"][0]["value"].split("\n")[1]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recipe


@dataclass(frozen=True)
class Steps:
    """Losses and norms, float64 (steps, 2), the first gradient, (rows, tiles) of each rank, and how
    many graphs rank 0 has compiled since its process began."""

    values: torch.Tensor
    gradients: dict[str, torch.Tensor]
    rows: list[list[list[int]]]
    graphs: int


def take(recipe, folder, cases, *, num_ranks):
    """Runs every case, by name, to its end on `num_ranks` ranks; returns name -> Steps."""
    folder = Path(folder) / str(num_ranks)
    folder.mkdir(parents=True, exist_ok=True)
    # Unclipped, with a rate from the first step on: gradients are compared, and used.
    common = ["optim.max_grad_norm=1e9", "optim.warmup_ratio=0.0", f"run={folder / 'run'}"]
    plain = {name: ([*common, *c.settings], c.before, c.deal) for name, c in cases.items()}
    run_ranks(STEPS.format(cases=plain, recipe=str(recipe), to=str(folder)), num_ranks=num_ranks)
    saved = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in cases}
    return {
        name: Steps(torch.tensor(values, dtype=torch.float64), gradients, rows, graphs)
        for name, (values, gradients, rows, graphs) in saved.items()
    }


def assert_same(one, several, tolerance=1e-5, later=None):
    """Losses and norms are the same relatively; gradients, relatively to the largest value.

    Args:
        later: tolerance of norms after the first step, which rounding has led elsewhere.
    """
    torch.testing.assert_close(several.values[:, 0], one.values[:, 0], rtol=tolerance, atol=0)
    torch.testing.assert_close(
        several.values[:, 1], one.values[:, 1], rtol=later or tolerance, atol=0
    )
    assert several.gradients.keys() == one.gradients.keys()
    largest = max(gradient.abs().max() for gradient in one.gradients.values())
    for name, gradient in one.gradients.items():
        error = (several.gradients[name] - gradient).abs().max()
        assert error <= tolerance * largest, (name, error)
