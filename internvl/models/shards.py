"""Weights to a model folder: safetensors files of a bounded size, and their index."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5 * 10**9


def write_weights(
    folder: Path, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None
) -> str:
    """Write safetensors shards of at most `SHARD_BYTES`; returns the name of the last dtype.

    No more than one shard is held in memory beside the model.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0
    kind = torch.float32

    def flush() -> None:
        save_file(pending, folder / f"{len(shards):05d}.partial", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in named:
        kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        kind = kept.dtype
        if pending and size + kept.nbytes > SHARD_BYTES:
            flush()
            size = 0
        # Cloned where it shares its memory: a file holds every tensor on its own.
        pending[name] = kept.contiguous().clone() if kept.data_ptr() == tensor.data_ptr() else kept
        size, total = size + kept.nbytes, total + kept.nbytes
    flush()
    _name_shards(folder, shards, total)
    return str(kind).removeprefix("torch.")


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """One file is model.safetensors; several are numbered and indexed."""
    if len(shards) == 1:
        (folder / "00000.partial").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number:05d}.partial").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
