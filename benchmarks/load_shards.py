"""What a rank needs to load its shard of a large released model: host memory and time.

    python benchmarks/load_shards.py InternVL2-26B --out benchmarks/results/load_shards_cpu.json

Writes the model's folder with true headers and holes for the data, so that 51 GB take no disk, then
loads one rank's shard in a fresh process on the CPU, in a process group whose other ranks are not
there. Peaks are of resident memory, mapped files included. A disk adds the time of reading a rank's
share of the folder. `--tiny` shrinks the model.
"""

import argparse
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loading import official_config, resident_gib

FILE_BYTES = 5 * 10**9


def write_holes(folder: Path, config: dict[str, Any], layout: str) -> float:
    """Writes the folder of a model without its data; returns its size, GiB."""
    from internvl.models import configs, keys
    from internvl.models.chat import model as chat_model

    ours = configs.from_official(config, image_token_id=92546)
    state = chat_model.empty_model(ours).state_dict()
    rename = keys.ours_to_official if layout == "official" else keys.model_to_hf
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, tensor in rename(ours, state):
        if files[-1] and size + 2 * tensor.numel() > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = tuple(tensor.shape)
        size += 2 * tensor.numel()
    if layout == "hf":
        config = ours.to_dict() | {"internvl": configs.chat_settings(ours)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # All that is asked of a tokenizer without text.
    (folder / "added_tokens.json").write_text('{"<IMG_CONTEXT>": 92546}', encoding="utf-8")
    weight_map = {}
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_header(folder / file, shapes)
        weight_map |= dict.fromkeys(shapes, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30


def _write_header(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * _product(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        # A file may be longer than what was written of it; the rest reads as zeros.
        opened.truncate(8 + len(text) + end)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def load_rank(folder: Path, rank: int, ranks: int, train: str) -> dict[str, Any]:
    """Loads one rank's shard in this process; returns its memory and time."""
    import torch
    from torch import distributed
    from torch.distributed.tensor import DTensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from internvl.config import recipes
    from internvl.inference import load as loading
    from internvl.inference.opened import open_model
    from internvl.parallel import mesh, shard

    distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    parts = ["vision_tower", "multi_modal_projector", "language_model"]
    model: dict[str, Any] = {"id": str(folder), "train": parts}
    if train == "lora":
        lora = {"rank": 128, "on": ["language_model"]}
        model |= {"train": ["multi_modal_projector"], "lora": lora}
    tree = {
        "model": model,
        "data": {"sources": [{"name": "none", "annotations": "none.jsonl"}], "max_tokens": 2048},
        "parallel": {"shard": "zero3"},
        "run": "none",
        "global_batch": 8,
        "steps": 1,
        "device": "cpu",
    }
    recipe = recipes.resolve(tree)
    cpu = torch.device("cpu")
    grid = mesh.build(recipe.parallel, cpu)
    assert grid is not None
    start = open_model(folder)
    sizes = [_product(t.shape) * t.dtype.itemsize for t in start.files.tensors.values()]

    def cut(model: Any) -> None:
        shard.shard(model, recipe.parallel, grid, torch.bfloat16)

    before = resident_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started, cpu_started = time.perf_counter(), time.process_time()
    loaded = loading.for_training(recipe, start, cut).model
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    here = (p.to_local() if isinstance(p, DTensor) else p for p in loaded.parameters())
    shard_gib = sum(tensor.nbytes for tensor in here) / 2**30
    rise = resident_gib("VmHWM") - before
    return {
        "shard_gib": shard_gib,
        "host_rise_gib": rise,
        "above_shard_gib": rise - shard_gib,
        "largest_tensor_gib": max(sizes) / 2**30,
        "load_s": seconds,
        "cpu_s": cpu_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["InternVL2-26B"])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", default=["official", "hf"])
    parser.add_argument("--train", nargs="+", default=["lora"], choices=["lora", "full"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(load_rank(options.folder, options.rank, options.ranks, *options.train)))
        return
    rows = []
    for name in options.models:
        for layout in options.layouts:
            with tempfile.TemporaryDirectory() as folder:
                config = official_config(name, tiny=options.tiny)
                size = write_holes(Path(folder), config, layout)
                for train in options.train:
                    words = [sys.executable, "-W", "ignore", __file__, "--folder", folder]
                    words += ["--rank", str(options.rank), "--ranks", str(options.ranks)]
                    done = subprocess.run(
                        [*words, "--train", train], check=True, stdout=subprocess.PIPE, text=True
                    )
                    row = {"model": name, "layout": layout, "train": train, "folder_gib": size}
                    row |= {"ranks": options.ranks, "rank": options.rank}
                    rows.append(row | json.loads(done.stdout.splitlines()[-1]))
                    print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        system = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        text = json.dumps({"system": system, "rows": rows}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
