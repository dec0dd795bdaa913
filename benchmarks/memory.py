"""The memory table: what training steps take, measured, beside what `check --plan` predicts.

    python benchmarks/memory.py --to benchmarks/results/memory.json    # on a GPU, under 8 minutes
    python benchmarks/memory.py 2b_lora_12gib --budget-s 100
    python benchmarks/memory.py --tiny                                 # the same path on a CPU

Random weights of the released shapes are made on the device and take three steps of the real loop
on COCO-like images. Each row is a process of its own; `cap` is a hard limit on what it may
allocate. Predicted and measured are for the same rows: the largest is padded to `data.row_tokens`.
On a CPU only weights, gradients and optimizer states are compared.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rows
import torch
import workloads
from torch import nn

from internvl import plan, train
from internvl.config import Recipe, recipes
from internvl.data.records import PackedBatch
from internvl.inference.chat import Chat
from internvl.plan.work import FirstStep, Work, work_of
from internvl.zoo import gpus

STEPS = 3
STATES = (
    *("frozen weights", "quantized weights", "trained weights"),
    *("gradients", "optimizer states"),
)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 128, "dropout": 0.0}},
    "qlora": {"lora": {"rank": 128, "dropout": 0.0}, "quantize": "4bit"},
    "full": {},
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    method: str
    cap: float | None = None
    """GiB that the process may allocate."""
    row_tokens: int = 8192
    compute: dict[str, Any] = field(default_factory=dict)


_FULL = {"checkpointing": "full"}
ROWS = {
    "2b_lora": Row("InternVL2-2B", "lora"),
    "8b_qlora_24gib": Row("InternVL2-8B", "qlora", cap=24, compute=_FULL),
    "2b_lora_12gib": Row("InternVL2-2B", "lora", cap=12, compute=_FULL),
    "26b_lora": Row("InternVL2-26B", "lora", compute=_FULL),
    "8b_lora": Row("InternVL2-8B", "lora"),
    "2b_full": Row("InternVL2-2B", "full"),
    "1b_lora": Row("InternVL2-1B", "lora"),
    "2b_lora_selective": Row("InternVL2-2B", "lora", compute={"checkpointing": "selective"}),
    "8b_full": Row("InternVL2-8B", "full", compute=_FULL),
    "8b_qlora": Row("InternVL2-8B", "qlora"),
    "2b_qlora": Row("InternVL2-2B", "qlora"),
    "1b_full": Row("InternVL2-1B", "full"),
    "1b_qlora": Row("InternVL2-1B", "qlora"),
    "2b_lora_eager": Row("InternVL2-2B", "lora", compute={"compile": False}),
}
"""The rows that the bars are about come first: a budget cuts the end off."""


def measure(name: str, row: Row, *, tiny: bool) -> dict[str, Any]:
    """Three steps of a row; its JSON."""
    device = torch.device("cpu" if tiny else "cuda")
    if row.cap is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(row.cap / total)
    with tempfile.TemporaryDirectory() as folder:
        chat = random_chat(row, device, tiny=tiny)
        recipe = recipe_of(row, chat, Path(folder), device, tiny=tiny)
        now = train.build(recipe, chat)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what drawing random weights took; files take no such detour
        now.row_lengths = now.row_lengths[-1:]  # one shape: less to compile
        batches: list[PackedBatch] = []
        made = now.objective.batches

        def batches_of(units: Any) -> list[PackedBatch]:
            rows = made(units)
            batches.extend(rows)
            return rows

        now.objective.batches = batches_of
        seconds = []
        for numbers in train.updates(now):
            seconds.append(round(numbers["step_s"], 3))
            if device.type == "cuda" and now.step == 1:
                torch.cuda.reset_peak_memory_stats()  # optimizer states are there from now on
        return report(name, row, now, batches, seconds)


def random_chat(row: Row, device: torch.device, *, tiny: bool) -> Chat:
    """The model with random weights, in 4 bits where the row says so."""
    rank = METHODS[row.method].get("lora", {}).get("rank")
    prepare = pack if row.method == "qlora" else None
    return workloads.random_chat(row.model, device, rank=rank, tiny=tiny, prepare=prepare)


def pack(model: nn.Module) -> None:
    """Linear layers of the blocks in 4 bits, as `transformers` loads them."""
    import bitsandbytes as bnb

    kept = ("lm_head", "model.multi_modal_projector")
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(kept)
    ]
    for name, module in linears:
        packed = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        packed.weight = weight.to(module.weight.device)  # packs
        packed.bias = module.bias
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layers


def recipe_of(row: Row, chat: Chat, folder: Path, device: torch.device, *, tiny: bool) -> Recipe:
    """Every step has rows enough for a few full ones."""
    tokens = 2048 if tiny else row.row_tokens
    batch = 8 if tiny else 4 * row.row_tokens // 1700
    samples = list(itertools.islice(workloads.coco(0), batch))
    return recipes.resolve(
        {
            "model": {"id": row.model, **METHODS[row.method]},
            "data": {
                "sources": workloads.write(folder, samples, chat.encoder),
                "tiles": {"size": chat.tiles.size, "max": 6},
                "max_tokens": tokens if tiny else 4096,
                "row_tokens": tokens,
                "max_tiles": 96,
                "share_prefix": False,
                "workers": 0 if tiny else 8,
            },
            "compute": row.compute,
            "run": str(folder / "run"),
            "global_batch": batch,
            "steps": STEPS,
            "device": device.type,
        }
    )


def report(
    name: str, row: Row, now: train.TrainState, batches: list[PackedBatch], seconds: list[float]
) -> dict[str, Any]:
    """Measured beside predicted."""
    works = [work_of(batch) for batch in batches]
    work = sum(works, start=Work()) * (1 / STEPS)
    last_step = tuple(works[-max(1, len(works) // STEPS) :])
    step = FirstStep(last_step, work, now.recipe.global_batch)
    made = plan.make(now.recipe, gpus.find("H200"), step, shape=now.model.config)
    measured: dict[str, Any] = {"states_gib": states_gib(now)}
    predicted: dict[str, Any] = {
        "states_gib": sum(made.memory.components.get(part, 0.0) for part in STATES) / 2**30,
        "allocated_gib": made.memory.allocated_gib,
        "total_gib": made.memory.total_gib,
        "step_s": made.step_s,
        "parts_gib": {k: round(v / 2**30, 3) for k, v in made.memory.components.items()},
    }
    error = {"states": predicted["states_gib"] / measured["states_gib"] - 1}
    if now.device.type == "cuda":
        free, all_ = torch.cuda.mem_get_info()
        measured["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        measured["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        measured["used_gib"] = (all_ - free) / 2**30
        measured["step_s"] = min(seconds[1:])
        error["allocated"] = predicted["allocated_gib"] / measured["allocated_gib"] - 1
        error["total"] = predicted["total_gib"] / measured["used_gib"] - 1
        error["step"] = predicted["step_s"] / measured["step_s"] - 1
    return {
        "row": name,
        "model": row.model,
        "method": row.method,
        "cap_gib": row.cap,
        "row_tokens": now.recipe.data.row_tokens,
        "compute": row.compute,
        "largest_tokens": max(len(batch.document) for batch in batches),
        "most_tiles": max(batch.num_tiles for batch in batches),
        "measured": rows.rounded(measured),
        "predicted": rows.rounded(predicted),
        "error": rows.rounded(error),
        "step_s": seconds,
        "hardware": torch.cuda.get_device_name() if now.device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "commit": rows.commit(),
    }


def states_gib(now: train.TrainState) -> float:
    """Weights, gradients (they are dropped after a step, so the trained weights again), states."""
    held = {}  # adapters share a buffer with their weights
    for tensor in (*now.model.parameters(), *now.model.buffers()):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    total = sum(held.values())
    for parameter in now.model.parameters():
        total += parameter.nbytes if parameter.requires_grad else 0
        state = getattr(parameter, "quant_state", None)
        total += 0 if state is None else state.absmax.nbytes
    for state in now.optimizer.state.values():
        total += sum(value.nbytes for value in state.values() if value.ndim)
    return total / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--budget-s", type=float, default=460, help="start nothing after these")
    parser.add_argument("--to", type=Path, default=None, help="JSON file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, ROWS[options.one], tiny=options.tiny)))
        return
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]}; rows are {', '.join(ROWS)}")
    rows.run(__file__, options.rows, options)


if __name__ == "__main__":
    main()
