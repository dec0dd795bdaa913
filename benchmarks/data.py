"""The data path, measured: images to tiles, the loader, the fill of rows, shared prefixes.

    python benchmarks/data.py --photos PHOTOS --captions coco.json --reference bench_data.py

PHOTOS is a folder of JPEG photos (COCO's, say); coco.json a COCO caption file, with its images
beside it in `images/`. `--reference` names a script whose functions `p_official` and `p_pil_u8`
take JPEG bytes; they run in turn with ours, image by image, and the best of several rounds
counts, so that a busy machine slows all alike. One thread.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from internvl.config import DataConfig, SftConfig, SourceConfig, TilesConfig
from internvl.data import loader
from internvl.data.chat import ChatEncoder
from internvl.data.images import read_rgb
from internvl.data.packing import best_fit, first_buffer
from internvl.data.sampler import SampleOrder
from internvl.data.sources import open_source
from internvl.data.templates import template
from internvl.data.tiles import tile_images
from internvl.data.tokenizers import load_tokenizer
from internvl.errors import BadSample
from internvl.objectives.sft import Sft

TILES = TilesConfig(size=448, max=6)
TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "label_masks" / "tokenizer_qwen2"

Pipeline = Callable[[bytes], Any]


def ours(resize: str) -> Pipeline:
    """JPEG bytes -> uint8 tiles."""

    def run(data: bytes) -> torch.Tensor:
        tiles = tile_images([read_rgb(data)], TILES, TILES.max, resize=resize)
        assert tiles is not None
        return tiles.pixels

    return run


def reference(script: Path) -> dict[str, Pipeline]:
    """The pipelines of another script."""
    arguments, sys.argv = sys.argv, [str(script), "--no-gpu", "--no-loader"]
    sys.path.insert(0, str(script.parent))
    spec = importlib.util.spec_from_file_location("reference", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = arguments
    return {"reference: official": module.p_official, "reference: pil_u8": module.p_pil_u8}


def time_images(photos: list[bytes], pipelines: dict[str, Pipeline], rounds: int) -> list[dict]:
    """Milliseconds an image of every pipeline, each image at its best of all rounds.

    At least three rounds: a resize is compiled once a process has made a hundred of them.
    """
    best = {name: np.full(len(photos), np.inf) for name in pipelines}
    for _ in range(rounds):
        for number, data in enumerate(photos):
            for name, run in pipelines.items():
                started = time.perf_counter()
                run(data)
                best[name][number] = min(best[name][number], time.perf_counter() - started)
    slow = next(iter(pipelines))
    return [
        {
            "pipeline": name,
            "ms_a_image": 1e3 * times.mean(),
            "images_per_s": 1 / times.mean(),
            f"times_{slow}": best[slow].mean() / times.mean(),
        }
        for name, times in best.items()
    ]


def difference(photos: list[bytes]) -> dict[str, float]:
    """Of our pipelines from one tile at a time through Pillow, in 255ths."""
    found = {}
    for resize in ("pillow", "torch"):
        gaps, most = [], 0
        for data in photos:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            tiles = tile_images([read_rgb(data)], TILES, TILES.max, resize=resize)
            assert tiles is not None
            columns, rows = tiles.grids[0]
            whole = image.resize((448 * columns, 448 * rows))
            each = [
                whole.crop((448 * x, 448 * y, 448 * (x + 1), 448 * (y + 1)))
                for y in range(rows)
                for x in range(columns)
            ]
            each += [image.resize((448, 448))] if columns * rows > 1 else []
            wanted = np.stack([np.asarray(tile) for tile in each]).astype(np.int16)
            gap = abs(tiles.pixels.permute(0, 2, 3, 1).numpy().astype(np.int16) - wanted)
            gaps.append(gap.mean())
            most = max(most, int(gap.max()))
        found[resize] = {"mean": float(np.mean(gaps)), "most": most}
    return found


def caption_data(captions: Path, tile_max: int, **keys: Any) -> tuple[list, DataConfig, Sft]:
    """A COCO caption file as a source, and the objective that encodes it."""
    source = SourceConfig(
        name="coco",
        type="coco-captions",
        annotations=captions,
        images=captions.parent / "images",
        prompt="Provide a one-sentence caption for the provided image.",
    )
    data = DataConfig(sources=(source,), tiles=TilesConfig(size=448, max=tile_max), **keys)
    encoder = ChatEncoder(load_tokenizer(TOKENIZER), template("internlm2-chat"), 256)
    return [open_source(source)], data, Sft(SftConfig(), data, encoder)


def loader_rate(captions: Path, resize: str, workers: int) -> dict[str, float]:
    """Samples and images a second that `workers` processes read, encode and pack."""
    files, data, objective = caption_data(captions, 6, workers=workers, resize=resize)
    order = SampleOrder(files, share_prefix=True, seed=0)
    reader = loader.UnitReader(files, data, objective.encode)
    global_batch, num_steps = 80, len(order) // 80
    steps = loader.steps(
        order,
        reader,
        objective.batches,
        first=0,
        last=num_steps,
        global_batch=global_batch,
        total=len(order),
        workers=data.workers,
    )
    next(steps)
    started = time.perf_counter()
    tiles = sum(row.num_tiles for step in steps for row in step.batches)
    seconds = time.perf_counter() - started
    samples = (num_steps - 1) * global_batch
    return {
        "resize": resize,
        "workers": workers,
        "samples_per_s": samples / seconds,
        "tiles_per_s": tiles / seconds,
    }


def sharing(captions: Path) -> dict[str, float]:
    """What shared prefixes save over an epoch of captions."""
    found: dict[str, float] = {}
    for share in (False, True):
        files, data, objective = caption_data(captions, 6, share_prefix=share)
        order = SampleOrder(files, share_prefix=share, seed=0)
        reader = loader.UnitReader(files, data, objective.encode, pixels=False)
        units = [
            unit for ref in order.step(0, len(order), len(order)) for unit in reader[ref].units
        ]
        assert not any(isinstance(unit, BadSample) for unit in units)
        key = "shared" if share else "separate"
        found[f"{key}_tokens"] = sum(unit.num_tokens for unit in units)
        found[f"{key}_tiles"] = sum(unit.num_tiles for unit in units)
    for what in ("tokens", "tiles"):
        found[f"times_fewer_{what}"] = found[f"separate_{what}"] / found[f"shared_{what}"]
    return found


def mixture(count: int) -> list[tuple[int, int]]:
    """(tokens, tiles) like Chat-V1-2's mixture: text, photos, documents, long dialogues."""
    rng = np.random.default_rng(0)
    sizes = []
    for kind in rng.choice(4, count, p=[0.15, 0.5, 0.25, 0.1]):
        tiles = (0, rng.choice([5, 7]), rng.choice([7, 10, 13]), rng.choice([5, 7]))[kind]
        mean, spread = ((6.3, 0.7), (5.2, 0.6), (5.3, 0.7), (6.8, 0.4))[kind]
        text = int(np.clip(rng.lognormal(mean, spread), 60, 4096 - 256 * tiles))
        sizes.append((text + 256 * int(tiles), int(tiles)))
    return sizes


def fill(num_samples: int = 20480) -> list[dict[str, float]]:
    """Share of row tokens that are used, by row length and samples a step."""
    sizes = mixture(num_samples)
    found = []
    for max_tokens, max_tiles in ((4096, 16), (8192, 48), (16384, 64)):
        for global_batch in (128, 512, 2048):
            rows = {"best-fit": 0, "official": 0}
            for start in range(0, num_samples, global_batch):
                step = sizes[start : start + global_batch]
                rows["best-fit"] += len(best_fit(step, max_tokens, max_tiles))
                rows["official"] += len(first_buffer(step, max_tokens, max_tiles, 20))
            used = sum(tokens for tokens, _ in sizes)
            entry = {"max_tokens": max_tokens, "max_tiles": max_tiles, "global_batch": global_batch}
            shares = {name: used / (max_tokens * count) for name, count in rows.items()}
            found.append({**entry, **shares})
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=40, help="photos")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    photos = [file.read_bytes() for file in sorted(arguments.photos.rglob("*.jpg"))]
    photos = photos[: arguments.count]
    pipelines = reference(arguments.reference) if arguments.reference else {}
    pipelines |= {"ours: pillow": ours("pillow"), "ours: torch": ours("torch")}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        result = {
            "benchmark": "data",
            "hardware": f"{os.cpu_count()} x {platform.machine()} cores",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "numba": _version("numba"),
            "simplejpeg": _version("simplejpeg"),
            "commit": commit.stdout.strip(),
            "photos": len(photos),
            "images_one_core": time_images(photos, pipelines, arguments.rounds),
            "difference_of_255": difference(photos),
            "loader": [loader_rate(arguments.captions, how, 2) for how in ("pillow", "torch")],
            "sharing": sharing(arguments.captions),
            "fill": fill(),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
