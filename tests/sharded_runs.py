"""Steps of the same runs on one process and on several: losses, norms and the first gradient."""

from pathlib import Path

import torch
from ranks import run_ranks

STEPS = """
import torch
from torch.distributed.tensor import DTensor

from internvl import dist, train
from internvl.config import recipes


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


for name, settings in {cases!r}.items():
    run = train.build(recipes.load_recipe({recipe!r}, settings))
    gradients = {{}}

    def keep(optimizer, *_):
        if not gradients:
            for key, p in run.model.named_parameters():
                if p.grad is not None:
                    gradients[key] = full(p.grad).clone()

    run.optimizer.register_step_pre_hook(keep)
    {prepare}
    values = []
    for step in train._steps(run):
        metrics = train.train_step(run, step.batches)
        values.append([metrics["loss"], metrics["grad_norm"]])
    trained = {{key: p for key, p in run.model.named_parameters() if p.requires_grad}}
    weights = {{key: full(p).detach() for key, p in trained.items()}}
    if dist.is_main():
        torch.save([values, gradients, weights], {to!r} + f"/{{name}}.pt")
"""


def steps(project, folder, cases, *, num_ranks, prepare="pass"):
    """Runs every case, a name and its settings, to its end on `num_ranks` ranks.

    Returns name -> (losses and norms, float64 (steps, 2), gradients of the first step, weights).
    """
    folder = Path(folder) / str(num_ranks)
    folder.mkdir(parents=True, exist_ok=True)
    cases = {
        name: ["optim.max_grad_norm=1e9", f"run={folder / 'run'}", *settings]
        for name, settings in cases.items()
    }
    code = STEPS.format(cases=cases, recipe=str(project), to=str(folder), prepare=prepare)
    run_ranks(code, num_ranks=num_ranks)
    results = {}
    for name in cases:
        values, gradients, weights = torch.load(folder / f"{name}.pt", weights_only=True)
        results[name] = torch.tensor(values, dtype=torch.float64), gradients, weights
    return results


def assert_same(one, several, tolerance=1e-5):
    """Losses and norms are the same relatively; gradients, relatively to the largest value."""
    (values, gradients, _), (their_values, their_gradients, _) = one, several
    torch.testing.assert_close(their_values, values, rtol=tolerance, atol=0)
    assert their_gradients.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        error = (their_gradients[name] - gradient).abs().max()
        assert error <= tolerance * largest, (name, error)
