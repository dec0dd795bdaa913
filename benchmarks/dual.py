"""InternVL-14B at its full size, with random weights, on one GPU: training, encoding, captions.

    python benchmarks/dual.py                            # every row, about 9 minutes on an H200
    python benchmarks/dual.py lora_224 lora_224_once     # some
    python benchmarks/dual.py --tiny                     # the same path on a CPU, in a minute

Weights are made on the GPU in bfloat16; every row has a process of its own:

    encode_224        images as C and G, texts: as loaded, and with compiled blocks
    head_224          the head recipe: all 128 pairs at once
    caption_224       beam 5, 30 tokens, batch 1, 16 and 64
    lora_224          the LoRA recipe as it is: 4 micro-batches of 32, checkpointing
    lora_224_once     all 128 pairs at once, no gradient caching, checkpointing
    lora_224_kept     in micro-batches of 32, nothing computed again
    lora_224_kept_16  in micro-batches of 16, of which four keep their graph from the first pass
    lora_364          LoRA at 364 px, global batch 1,024 in micro-batches of 24, nothing again
    full_364          all weights: says what one GPU lacks for it

Training rows are steps of `internvl train` on a recipe of recipes/internvl_14b, with JPEG files of
COCO's sizes, captions of COCO's lengths, and the loader's workers; shares are needed FLOPs
(plan/flops.py of the package) over the rate of an 8192³ bfloat16 product of the same process.
`hours` are those of the recipe's steps. Of a row that measures its first step, `first_wait_s` is
left out: a later step's pairs are read during the one before. Those that the budget cuts off are
measured by a second call that names them.
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows as table
import torch
import transformers
import workloads
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from internvl import train, zoo
from internvl.compute import compilation, feeding, kernels, memory, placement
from internvl.config import ComputeConfig, Recipe, recipes
from internvl.data.records import PairBatch
from internvl.inference import engine
from internvl.inference.dual import Dual
from internvl.models.adapters import lora
from internvl.models.dual import configs as dual_configs
from internvl.models.dual.model import DualModel
from internvl.objectives.retrieval import RetrievalObjective
from internvl.plan import flops
from internvl.plan.work import Sequences, Work, work_of

RECIPES = Path(__file__).parent.parent / "recipes" / "internvl_14b"
BYTES_FULL = 16
"""Of a weight that trains: float32 weight, gradient, and two moments of AdamW."""


@dataclass(frozen=True)
class Training:
    """A training row."""

    recipe: str
    changes: tuple[str, ...] = ()
    """As on the command line."""
    pixels: int | None = None
    global_batch: int | None = None
    warmup: int = 1
    """Whole steps before those that count, after a step of two micro-batches."""
    steps: int = 4


_KEPT = "compute.checkpointing=none"
_LORA = "lora_flickr30k"
ROWS: dict[str, Training | str] = {
    "lora_224_kept": Training(_LORA, (_KEPT, "objective.micro_batch=32"), steps=3),
    "encode_224": "encode",
    "head_224": Training("head_flickr30k", steps=6),
    "caption_224": "caption",
    "lora_364": Training(
        _LORA,
        (_KEPT, "objective.micro_batch=24"),
        pixels=364,
        global_batch=1024,
        warmup=0,
        steps=1,
    ),
    "full_364": "full",
    "lora_224": Training(_LORA, steps=3),
    "lora_224_once": Training(_LORA, ("objective.micro_batch=null",), steps=3),
    "lora_224_kept_16": Training(
        _LORA,
        (_KEPT, "objective.micro_batch=16", "objective.kept_micro_batches=4"),
        steps=3,
    ),
}


# Models


def random_dual(pixels: int, device: torch.device, recipe: Recipe | None, *, tiny: bool) -> Dual:
    """The released model with random weights made on the device, and a tokenizer of words.

    Args:
        pixels: side of an image.
        recipe: whose choice of what trains is made; None freezes everything.
        tiny: two narrow layers of each part instead of the real sizes.
    """
    official = zoo.official_config(zoo.find("InternVL-14B-224px")) | {"force_image_size": pixels}
    if tiny:
        official = shrunk(official)
    with torch.device(device):
        model = DualModel._from_config(
            dual_configs.from_official(official),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        )
    if recipe is None:
        model.requires_grad_(False).eval()
    else:
        lora.select_trainable(model, recipe.model.parts)
        if recipe.model.lora is not None:
            lora.attach(model, recipe.model.lora)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zeros would run faster than trained factors
                    torch.nn.init.normal_(parameter, std=0.01)
    return Dual(model, tokenizer(model.config.text_config.vocab_size), Path("random"))


def shrunk(official: dict[str, Any]) -> dict[str, Any]:
    """The official configuration with two narrow layers of each part, at 56 px."""
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"intermediate_size": 128, "image_size": 56}
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"intermediate_size": 128, "vocab_size": 5000, "num_query_token": 8}
    return official | {
        "vision_config": official["vision_config"] | vision,
        "qllama_config": official["qllama_config"] | text,
        "clip_embed_dim": 32,
        "attn_pool_num_heads": 4,
        "force_image_size": 56,
    }


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A token for each word `w0` …; 0 is padding, as for InternVL-14B."""
    special = ("<pad>", "<s>", "</s>", "summarize:", "<unk>")
    vocabulary = {word: number for number, word in enumerate(special)}
    words = min(workloads.WORDS, vocab_size - len(special))
    vocabulary |= {f"w{n}": n + len(special) for n in range(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("summarize:", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


# Training


class Counting(RetrievalObjective):
    """The objective, and what every step held."""

    steps: list[Work]

    def batches(self, units: Any) -> list[PairBatch]:
        made = super().batches(units)
        self.steps.append(sum((work_of(batch, self.weights) for batch in made), start=Work()))
        return made


def build(row: Training, folder: Path, device: torch.device, *, tiny: bool) -> train.TrainState:
    """The run of a row: files on disk, a random model, all else as `train.build` makes it."""
    file = RECIPES / f"internvl_14b_{row.recipe}.yaml"
    recipe = recipes.load_recipe(file, row.changes)
    batch = 8 if tiny else row.global_batch or recipe.global_batch
    pixels = 56 if tiny else row.pixels or recipe.data.tiles.size
    source = write_pairs(folder, 4 * batch if tiny else max(512, 2 * batch))
    here = [
        f"data.sources={json.dumps([source])}",
        f"data.tiles.size={pixels}",
        f"data.workers={0 if tiny else 12}",
        f"run={folder / 'run'}",
        f"global_batch={batch}",
        f"steps={1 + row.warmup + row.steps}",
        "epochs=null",
        "evals={}",
        f"device={device.type}",
    ]
    if tiny and recipe.objective.micro_batch:
        here.append("objective.micro_batch=4")
    recipe = recipes.load_recipe(file, [*row.changes, *here])
    now = train.build(recipe, random_dual(pixels, device, recipe, tiny=tiny))
    now.objective = Counting(now.recipe.objective, now.recipe.data, now.chat.encoder)
    now.objective.steps = []
    return now


def write_pairs(folder: Path, pairs: int) -> dict[str, Any]:
    """JPEG files of COCO's sizes with one caption a pair; the recipe's source."""
    rng, lines = random.Random(0), ["image,caption"]
    for number, drawn in enumerate(itertools.islice(workloads.coco(0), pairs)):
        name = f"{number % 64:03d}.jpg"  # decoding a file again is the same work
        if number < 64:
            workloads.picture(drawn.size, number).save(folder / name, quality=90)
        # Under names of their own, or captions of other images would be right answers too.
        link = folder / f"{number:05d}.jpg"
        os.link(folder / name, link)
        lines.append(f"{link.name},{workloads.some_words(rng, max(1, drawn.answer - 1))}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "name": "drawn",
        "type": "flickr_format",
        "annotations": str(folder / "captions.csv"),
        "images": str(folder),
    }


def training(row: Training, device: torch.device, ceiling: float, tiny: bool) -> dict[str, Any]:
    """Trains for a few steps; the row's figures."""
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        now = build(row, Path(place), device, tiny=tiny)
        built_s = time.perf_counter() - started
        warm(now)
        warm_s = time.perf_counter() - started - built_s
        rows, ends = [], [time.perf_counter()]
        for numbers in train.updates(now):
            rows.append(numbers)
            ends.append(time.perf_counter())
            if len(rows) == row.warmup and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
    seconds = [b - a for a, b in itertools.pairwise(ends)][row.warmup :]
    # A step's pairs are read during the one before; where there is none, it waits for them.
    first_wait_s = 0.0 if row.warmup else rows[0]["data_wait_s"]
    seconds[0] -= first_wait_s
    work = Work()
    for step in now.objective.steps[1 + row.warmup :][: row.steps]:
        work += step
    needed = flops.count(now.model, work).needed
    total_steps = recipe_steps(now.recipe)
    return {
        "recipe": f"internvl_14b_{row.recipe}",
        "pixels": now.recipe.data.tiles.size,
        "global_batch": now.recipe.global_batch,
        "micro_batch": now.recipe.objective.micro_batch or now.recipe.global_batch,
        "checkpointing": now.recipe.compute.checkpointing,
        "step_s": statistics.median(seconds),
        "pairs_per_s": now.recipe.global_batch / statistics.median(seconds),
        "data_wait_s": statistics.mean(numbers["data_wait_s"] for numbers in rows[row.warmup :]),
        "first_wait_s": first_wait_s,
        "ceiling_share": needed / sum(seconds) / 1e12 / ceiling,
        "tflop_per_pair": needed / work.samples / 1e12,
        "text_tokens_per_pair": work.texts.tokens / work.samples,
        "peak_gib": rows[-1]["memory_gib"],
        "trained": sum(p.numel() for p in now.model.parameters() if p.requires_grad),
        "recipe_steps": total_steps,
        "hours": total_steps * statistics.median(seconds) / 3600,
        "loss": [round(numbers["loss"], 4) for numbers in rows],
        "steps": len(seconds),
        "built_s": built_s,
        "warm_s": warm_s,
    }


def warm(now: train.TrainState) -> None:
    """A step of two micro-batches: what is compiled is so afterwards, both passes included."""
    size = now.recipe.objective.micro_batch or now.recipe.global_batch
    refs = now.order.step(0, now.recipe.global_batch, now.total_samples)
    units = [unit for ref in refs[: 2 * size] for unit in now.reader[ref].units]
    batches: list[Any] = now.objective.batches(units)
    if now.device.type == "cuda":
        batches = [feeding.pin(batch) for batch in batches]
    train.train_step(now, batches)


def recipe_steps(recipe: Recipe) -> int:
    """Steps of ten epochs of Flickr30K's 145,000 training captions."""
    return math.ceil(10 * 145_000 / recipe.global_batch)


def full(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Why there is no such row on one GPU."""
    with torch.device("meta"):
        official = zoo.official_config(zoo.find("InternVL-14B-224px"))
        model = DualModel(dual_configs.from_official(official | {"force_image_size": 364}))
    weights = sum(p.numel() for p in model.parameters())
    have = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {
        "skipped": "weights, gradients and moments do not fit on one GPU",
        "parameters": weights,
        "states_gib": weights * BYTES_FULL / 2**30,
        "gpu_gib": have and have / 2**30,
    }


# In use


def encode(device: torch.device, ceiling: float, tiny: bool) -> dict[str, Any]:
    """Images and texts a second: as loaded, and with the blocks compiled."""
    handle = random_dual(224, device, None, tiny=tiny)
    size, count, batch = handle.image_size, *((8, 4) if tiny else (1024, 128))
    pixels = torch.randn(count, 3, size, size, device=device, dtype=torch.bfloat16)
    length = 24
    ids = torch.randint(5, 5000, (4 * count, length))
    queries = handle.model.num_queries
    images = Work(tiles=count)
    causal = len(ids) * length * (length + 1) // 2
    texts = Work(texts=Sequences(len(ids), ids.numel(), causal))
    kinds: dict[str, tuple[Callable[[], Tensor], int, Work]] = {
        "images_c": (lambda: handle.encode_images(pixels, "c", batch_size=batch), count, images),
        "images_g": (
            lambda: handle.encode_images(pixels, "g", batch_size=batch),
            count,
            Work(tiles=count, queried=count),
        ),
        "texts": (lambda: handle.encode_texts(input_ids=ids, batch_size=256), len(ids), texts),
    }
    found: dict[str, Any] = {"batch": batch, "text_tokens": length, "queries": queries}
    for form in ("loaded", "compiled"):
        if form == "compiled":
            kernels.apply_compute(handle.model, device, ComputeConfig(compile=not tiny))
        for name, (work, number, held) in kinds.items():
            with compilation.tracing():
                seconds = timed(work, device, 1 if tiny else 3)
            needed = flops.count(handle.model, held).needed
            share = needed / seconds / 1e12 / ceiling
            found[f"{name}_{form}"] = {"per_s": number / seconds, "ceiling_share": share}
    with tempfile.TemporaryDirectory() as place:
        write_pairs(Path(place), count)
        paths = sorted(map(str, Path(place).glob("?????.jpg")))
        seconds = timed(lambda: handle.encode_images(paths, "c", batch_size=batch), device, 1)
    found["images_c_from_files"] = {"per_s": len(paths) / seconds}
    return found | {"peak_gib": memory.peak_memory_gib(device)}


def caption(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Captions a second by beam search, as the original's evaluation and in batches."""
    handle = random_dual(224, device, None, tiny=tiny)
    size = handle.image_size
    found: dict[str, Any] = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8}
    for batch, count in ((1, 2), (4, 4)) if tiny else ((1, 4), (16, 32), (64, 64)):
        pixels = torch.randn(count, 3, size, size, device=device, dtype=torch.bfloat16)

        def work(pixels: Tensor = pixels, batch: int = batch) -> list[str]:
            return handle.caption(pixels, "w1 w2 w3 w4", batch_size=batch)

        # As an evaluation does: the first call captures the graphs, the timed one has them.
        with engine.one_engine(handle.model, count):
            seconds = timed(work, device, 1)
        found[f"batch_{batch}"] = {"images_per_s": count / seconds}
    return found | {"peak_gib": memory.peak_memory_gib(device)}


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds, the median of some calls after one."""
    found = []
    for _ in range(1 + repeats):
        placement.synchronize(device)
        started = time.perf_counter()
        work()
        placement.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def measure(name: str, *, tiny: bool) -> dict[str, Any]:
    """A row's JSON."""
    device = torch.device("cpu" if tiny else "cuda")
    ceiling = workloads.matmul_tflops(device)
    row = ROWS[name]
    if isinstance(row, Training):
        found = training(row, device, ceiling, tiny)
    elif row == "encode":
        found = encode(device, ceiling, tiny)
    else:
        found = {"caption": caption, "full": full}[row](device, tiny)
    return {
        "row": name,
        **table.rounded(found),
        "ceiling_tflops": round(ceiling, 1),
        "hardware": f"1 x {torch.cuda.get_device_name()}" if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": table.commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--budget-s", type=float, default=540, help="start nothing after these")
    parser.add_argument("--to", type=Path, default=None, help="JSON file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, tiny=options.tiny)))
        return
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]}; rows are {', '.join(ROWS)}")
    table.run(__file__, options.rows, options)


if __name__ == "__main__":
    main()
