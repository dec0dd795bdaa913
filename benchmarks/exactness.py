"""Do the fast paths train the same? A small model, the loop itself, 20 steps of the same samples.

    python benchmarks/exactness.py            # on a GPU: FlexAttention and compiled blocks too
    python benchmarks/exactness.py --cpu
    python benchmarks/exactness.py --only "flex, compiled, bfloat16, float8"
    python benchmarks/exactness.py --head-width 64 --only "flash, compiled, bfloat16"

Every step takes the whole data set (images with five captions each), so that each variant sees
the same samples however it packs them. Compared with one sample a row, a dense mask and no
compiler, all in float32: the largest relative difference of a loss over the 20 steps, of the first
gradient (norm of the difference over the norm), and of what the weights moved by in the end.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import workloads

from internvl import train
from internvl.config import recipes
from internvl.models.attention import flash4

STEPS = 20
DENSE = {"attention": "dense", "compile": False}
TILES = 7
"""Of every image here."""

PLAIN = {"share_prefix": False, "max_tiles": TILES}
"""No two samples fit into a row."""

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # data, compute, dtype
    "packed": ({"share_prefix": False}, DENSE, "float32"),
    "shared": ({}, DENSE, "float32"),
    "compiled": ({}, {"attention": "dense", "compile": True}, "float32"),
    "recomputed": ({}, DENSE | {"checkpointing": "full"}, "float32"),
    "flex": ({}, {"attention": "flex", "compile": False}, "float32"),
    "flex, compiled": ({}, {"attention": "flex", "compile": True}, "float32"),
    "plain, bfloat16": (PLAIN, DENSE, "bfloat16"),
    "flex, compiled, bfloat16": ({}, {"attention": "flex", "compile": True}, "bfloat16"),
    "flex, compiled, bfloat16, float8": (
        {},
        {"attention": "flex", "compile": True, "float8": True},
        "bfloat16",
    ),
    "flash, compiled, bfloat16": ({}, {"attention": "flash", "compile": True}, "bfloat16"),
    "flash, compiled, bfloat16, float8": (
        {},
        {"attention": "flash", "compile": True, "float8": True},
        "bfloat16",
    ),
    "shared, bfloat16, float8": ({}, DENSE | {"float8": True}, "bfloat16"),
}

LIMITS = {
    "float32": (1e-5, 1e-4, 1e-3),
    "bfloat16": (2e-3, 5e-2, 5e-2),
    "float8": (2e-3, 1.5e-1, 3e-1),
}
"""Allowed difference of losses, first gradient, and final weights."""


def trained(
    data: dict[str, Any],
    compute: dict[str, Any],
    dtype: str,
    device: str,
    rank: int | None,
    head_width: int,
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """(loss of each step, first gradient, change of the weights) of one variant."""
    torch.manual_seed(0)
    place = torch.device(device)
    chat = workloads.random_chat("InternVL2-2B", place, rank=rank, tiny=True, head_width=head_width)
    with tempfile.TemporaryDirectory() as folder:
        drawn = (s for s in workloads.coco(3) if workloads.num_tiles(s.size, s.max_tiles) == TILES)
        samples = list(itertools.islice(drawn, 6))
        sources = workloads.write(Path(folder), samples, chat.encoder, captions=5)
        recipe = recipes.resolve(
            {
                "model": {"id": "tiny"},
                "data": {"sources": sources, "tiles": {"size": chat.tiles.size, "max": 6}}
                | {"max_tokens": 512, "row_tokens": 4096, "max_tiles": 256, "workers": 0}
                | data,
                "optim": {"lr": 1e-3, "warmup_ratio": 0.1},
                "compute": compute,
                "run": str(Path(folder) / "run"),
                "global_batch": 30,
                "steps": STEPS,
                "device": device,
                "dtype": dtype,
            }
        )
        now = train.build(recipe, chat)
        weights = [p for p in now.model.parameters() if p.requires_grad]
        start = _flat(weights)
        gradients: list[torch.Tensor] = []

        def keep(*_: Any) -> None:
            if not gradients:
                gradients.append(_flat([p.grad for p in weights]))

        now.optimizer.register_step_pre_hook(keep)
        losses = [numbers["loss"] for numbers in train.updates(now)]
    return losses, gradients[0], _flat(weights) - start


def _flat(tensors: list[Any]) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", nargs="*", default=[*VARIANTS], choices=VARIANTS)
    parser.add_argument("--head-width", type=int, choices=(16, 64, 128), default=16)
    parser.add_argument("--methods", nargs="*", default=["lora", "full"])
    parser.add_argument("--to", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    device = "cpu" if options.cpu else "cuda"
    if options.cpu:  # torch has no backward pass of FlexAttention there
        options.only = [name for name in options.only if VARIANTS[name][1]["attention"] == "dense"]
    if options.head_width not in flash4.WIDTHS:  # else a language model takes flex in its place
        options.only = [name for name in options.only if not name.startswith("flash")]
    if not options.only:
        parser.error("variants with flex or flash need a GPU, flash also --head-width 64 or 128")
    rows = []
    for rank in (4 if method == "lora" else None for method in options.methods):
        wanted = trained(PLAIN, DENSE, "float32", device, rank, options.head_width)
        for name in options.only:
            data, compute, dtype = VARIANTS[name]
            found = trained(data, compute, dtype, device, rank, options.head_width)
            losses = max(abs(a - b) / b for a, b in zip(found[0], wanted[0], strict=True))
            errors = (losses, difference(found[1], wanted[1]), difference(found[2], wanted[2]))
            limits = LIMITS["float8" if compute.get("float8") else dtype]
            row = {
                "method": f"lora {rank}" if rank else "full",
                "variant": name,
                "head_width": options.head_width,
                **dict(zip(("loss", "gradient", "weights"), errors, strict=True)),
                "first_loss": found[0][0],
                "last_loss": found[0][-1],
                "within": all(e <= limit for e, limit in zip(errors, limits, strict=True)),
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "torch": torch.__version__,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.to is not None:
        options.to.write_text(json.dumps(rows, indent=1) + "\n")
    if not all(row["within"] for row in rows):
        raise SystemExit("a variant differs by more than it may")


if __name__ == "__main__":
    main()
