"""Does it learn to retrieve, and as well as open_clip: small models on real photos, from scratch.

    python benchmarks/retrieval_learning.py flickr8k_cn_128px.zip --to out/retrieval --minutes 7
    python benchmarks/retrieval_learning.py flickr8k_cn_128px.zip --to out/retrieval --tiny   # CPU

    ours        InternVL-14B's architecture by `internvl.train.run`, English and Chinese captions
    open_clip   its CLIP of about as many parameters: ClipLoss, AdamW, cosine, bfloat16 autocast
    english     as ours, English captions alone
    chinese     `english`, exported and fine-tuned on Chinese captions

`ours` and `open_clip` see the same batches of cut photos and token ids, in the same order. Recall
is over the 1,000 test photos with five captions each, a language at a time. Three seeds of `ours`
and `open_clip`, one of the others. A finished arm and seed is not run again, so calls of a few
minutes add up; TO/retrieval_learning.json holds the curves of all that are finished. `--join`
puts those of several folders, whose runs were trained side by side, into one.
"""

import argparse
import importlib.util
import io
import json
import math
import statistics
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows as table
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internvl import demo, export, log, train
from internvl.compute import feeding, placement
from internvl.config import Recipe, recipes
from internvl.data import loader
from internvl.data.images import STATISTICS, open_rgb
from internvl.data.pair_files import Pairs, read_pairs
from internvl.data.pairs import MAX_TOKENS, clean_caption, pad_right, square
from internvl.data.records import PairBatch
from internvl.data.sampler import SampleOrder
from internvl.data.sources import open_source
from internvl.data.tokenizers import load_tokenizer
from internvl.evals.features import ranks_both_ways
from internvl.evals.retrieval import recalls
from internvl.inference import dual
from internvl.inference import load as loading
from internvl.models.dual import configs as dual_configs
from internvl.models.dual.model import DualModel
from internvl.models.vision import normalize_tiles
from internvl.objectives.retrieval import RetrievalObjective

LANGUAGES = ("en", "zh")
ARMS = {"ours": LANGUAGES, "open_clip": LANGUAGES, "english": ("en",), "chinese": ("zh",)}
PIXELS, PATCH = 128, 16
KS = (1, 5, 10)


@dataclass(frozen=True)
class Shape:
    """Width and blocks of either model's towers."""

    width: int
    vision_blocks: int
    text_blocks: int
    clip_text_blocks: int
    """So many that both models have about as many parameters."""
    queries: int = 16
    vocabulary: int = 6000


SHAPES = {"tiny": Shape(64, 2, 2, 2, 4, 1500), "small": Shape(256, 6, 6, 8)}


@dataclass(frozen=True)
class Plan:
    """What every arm does."""

    steps: int
    batch: int
    points: int
    """Evaluations, equally far apart."""
    lr: float
    clip_lr: float
    test_photos: int | None = None
    """None takes all, in training too."""
    train_photos: int | None = None
    weight_decay: float = 0.1
    warmup: float = 0.1


TINY = Plan(12, 16, 1, lr=1e-3, clip_lr=1e-3, test_photos=24, train_photos=40)


# Data and the fresh model


def unpack(archive: Path, folder: Path, plan: Plan) -> None:
    """Photos and, by split and language, `photo#number<TAB>caption` lines; done once."""
    if (folder / "done").exists():
        return
    with zipfile.ZipFile(archive) as packed:
        captions = json.loads(packed.read("captions.json"))
        for split, most in (("train", plan.train_photos), ("test", plan.test_photos)):
            names = sorted(name for name, row in captions.items() if row["split"] == split)[:most]
            packed.extractall(folder, names)
            for language in LANGUAGES:
                lines = [
                    f"{name}#{number}\t{caption}\n"
                    for name in names
                    for number, caption in enumerate(captions[name][language])
                    if clean_caption(caption).strip()
                ]
                file = folder / f"{split}_{language}.txt"
                file.write_text("".join(lines), encoding="utf-8")
    (folder / "done").touch()


def start_model(data: Path, folder: Path, shape: Shape, seed: int) -> None:
    """A fresh model in the official layout; its tokenizer is made of the training captions."""
    if (folder / "config.json").exists():
        return
    made = io.BytesIO()
    texts = [
        clean_caption(line.partition("\t")[2])
        for language in LANGUAGES
        for line in (data / f"train_{language}.txt").read_text(encoding="utf-8").splitlines()
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "summarize:"]),
        model_writer=made,
        vocab_size=shape.vocabulary,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer_folder = folder.parent / f"{folder.name}-tokenizer"
    tokenizer_folder.mkdir(parents=True, exist_ok=True)
    (tokenizer_folder / "tokenizer.model").write_bytes(made.getvalue())
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer is not None
    torch.manual_seed(seed)
    model = DualModel(dual_configs.from_official(official_config(shape, len(tokenizer))))
    # transformers starts the position table at zero, which a trained tower overwrites anyway.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.02)
    export.run(dual.Dual(model.eval(), tokenizer, tokenizer_folder), folder, "official")


def official_config(shape: Shape, vocabulary: int) -> dict[str, Any]:
    """InternVL-14B's configuration at another size."""
    width = shape.width
    return {
        "vision_config": {
            "hidden_size": width,
            "num_hidden_layers": shape.vision_blocks,
            "num_attention_heads": 4,
            "intermediate_size": 4 * width,
            "image_size": PIXELS,
            "patch_size": PATCH,
            "qkv_bias": False,
            "qk_normalization": True,
            "norm_type": "rms_norm",
            # The released 0.1 suits a trained tower; a fresh small one learns faster with 1.
            "initializer_factor": 1.0,
        },
        "qllama_config": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 8 * width // 3 // 16 * 16,
            "num_hidden_layers": shape.text_blocks,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
        "clip_embed_dim": width,
        "attn_pool_num_heads": 4,
        "num_query_token": shape.queries,
    }


def recipe(arm: str, seed: int, to: Path, plan: Plan, options: argparse.Namespace) -> Recipe:
    """What `internvl train` would be given."""
    data, on_cpu = to / "data", options.device == "cpu"
    fine_tunes = arm == "chinese"
    steps = plan.steps // 2 if fine_tunes else plan.steps
    evals = {
        language: {
            "type": "retrieval",
            "annotations": data / f"test_{language}.txt",
            "images": data,
            "form": "token",
            "clean": True,
            "recall_k": KS,
            "batch_size": 250,
            "every": max(1, steps // plan.points),
            "before": fine_tunes,
        }
        for language in LANGUAGES
    }
    sources = [
        {
            "name": language,
            "type": "captions",
            "annotations": data / f"train_{language}.txt",
            "images": data,
        }
        for language in ARMS[arm]
    ]
    start = f"english-{seed}-model" if fine_tunes else f"start-{options.size}-{seed}"
    tree: dict[str, Any] = {
        "model": {
            "id": str(to / start),
            "train": ["vision_tower", "language_model", "heads"],
        },
        "data": {
            "sources": sources,
            "tiles": {"size": PIXELS, "max": 1, "thumbnail": False},
            "workers": 1 if on_cpu else options.workers,
        },
        "objective": {"name": "retrieval"},
        "optim": {
            "lr": plan.lr / 4 if fine_tunes else plan.lr,
            "weight_decay": plan.weight_decay,
            "warmup_ratio": plan.warmup,
            "betas": [0.9, 0.98],
        },
        "evals": evals,
        "run": to / "runs" / f"{arm}-{seed}",
        "global_batch": plan.batch,
        "steps": steps,
        "dtype": demo.cpu_dtype() if on_cpu else "bfloat16",
        "device": options.device,
        "threads": 1 if on_cpu else None,
        "seed": seed,
    }
    return recipes.resolve(tree, name=f"arm {arm}")


# Ours


def ours(made: Recipe) -> dict[str, Any]:
    """Trains the recipe; its curves."""
    train.run(made)
    metrics = log.StepLog(made.run, "metrics.jsonl").rows()
    curve = []
    for file in sorted((made.run / "evals").glob("*.json")):
        scores = json.loads(file.read_text())
        found = {k.replace("/", "_"): round(v, 4) for k, v in scores.items() if _is_recall(k)}
        curve.append({"step": int(file.stem), **found})
    model = loading.for_training(made).model
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - model.lm_head.weight.numel(),
        "curve": curve,
        **speed(made, [row["loss"] for row in metrics], [row["step_s"] for row in metrics]),
    }


def _is_recall(name: str) -> bool:
    return "recall" in name and "itm" not in name


def speed(made: Recipe, losses: Sequence[float], seconds: Sequence[float]) -> dict[str, Any]:
    """The losses, forty points of them, and the rate after the first tenth of the steps."""
    width, first = max(1, len(losses) // 40), len(seconds) // 10
    means = [statistics.mean(losses[i : i + width]) for i in range(0, len(losses), width)]
    settled = seconds[first:]
    return {
        "train_loss": [round(mean, 4) for mean in means],
        "pairs_per_s": round(len(settled) * made.global_batch / sum(settled), 1),
        "training_s": round(sum(seconds), 1),
    }


# open_clip


def open_clip_arm(made: Recipe, plan: Plan, shape: Shape) -> dict[str, Any]:
    """Its model, loss and schedule on the batches that our recipe has."""
    import open_clip

    device = torch.device(made.device or "cpu")
    tokenizer = load_tokenizer(Path(made.model.id))
    assert tokenizer is not None
    torch.manual_seed(made.seed)
    model = open_clip.model.CLIP(
        embed_dim=shape.width,
        vision_cfg={
            "layers": shape.vision_blocks,
            "width": shape.width,
            "head_width": shape.width // 4,
            "patch_size": PATCH,
            "image_size": PIXELS,
        },
        text_cfg={
            "context_length": MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "width": shape.width,
            "heads": 4,
            "layers": shape.clip_text_blocks,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
        },
    ).to(device)
    loss_of = open_clip.ClipLoss()
    optimizer = clip_optimizer(model, plan)
    every = max(1, made.steps // plan.points) if made.steps else 1
    losses, seconds, curve = [], [], []
    started = time.perf_counter()
    for step, batch in enumerate(clip_batches(made, device)):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = plan.clip_lr * cosine(step, plan.steps, plan.warmup)
        with placement.autocast(device, made.dtype):
            images, texts, scale = model(*clip_inputs(batch))
            loss = loss_of(images, texts, scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - started)
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            curve.append({"step": step + 1, **clip_recalls(model, made, device)})
        started = time.perf_counter()
    parameters = sum(p.numel() for p in model.parameters())
    about = {"parameters": parameters, "version": open_clip.__version__, "curve": curve}
    return about | speed(made, losses, seconds)


def clip_optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """As its training script: vectors and scalars do not decay."""
    decays = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decays, "weight_decay": plan.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.clip_lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def cosine(step: int, steps: int, warmup: float) -> float:
    """Share of the highest rate: up in a line, then down in half a cosine."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def clip_batches(made: Recipe, device: torch.device) -> Iterator[PairBatch]:
    """The batches that `train.run` would train on."""
    tokenizer = load_tokenizer(Path(made.model.id))
    assert tokenizer is not None
    files = [open_source(source) for source in made.data.sources]
    order = SampleOrder(files, share_prefix=made.shares_prefix, seed=made.seed)
    objective = RetrievalObjective(made.objective, made.data, dual.CaptionEncoder(tokenizer))
    steps = loader.steps(
        order,
        objective.reader(files, made.seed),
        objective.batches,
        first=0,
        last=made.num_steps(len(order)),
        global_batch=made.global_batch,
        total=made.num_samples(len(order)),
        workers=made.data.workers,
    )
    for step, _ in feeding.prefetch(steps):
        yield from (batch.to(device) for batch in step.batches)


def clip_inputs(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Photos, and their own captions as they stand beside them, without "summarize:"."""
    ids = batch.match_ids[-len(batch.pixel_values) :]
    padded = F.pad(ids, (0, MAX_TOKENS - ids.shape[1]))
    return normalize_tiles(batch.pixel_values, torch.float32, *STATISTICS["imagenet"]), padded


@torch.no_grad()
def clip_recalls(model: Any, made: Recipe, device: torch.device) -> dict[str, float]:
    """Recall in both directions and languages."""
    model.eval()
    tokenizer = load_tokenizer(Path(made.model.id))
    assert tokenizer is not None
    encoder = dual.CaptionEncoder(tokenizer)
    found: dict[str, float] = {}
    images: Tensor | None = None
    for language in LANGUAGES:
        held_out = test_pairs(made, language)
        with placement.autocast(device, made.dtype):
            if images is None:
                pixels = torch.stack([square(open_rgb(path), PIXELS) for path in held_out.images])
                photos = (
                    normalize_tiles(part.to(device), torch.float32, *STATISTICS["imagenet"])
                    for part in pixels.split(250)
                )
                images = torch.cat([model.encode_image(part).float() for part in photos])
            rows = [encoder.matching(text) for text in held_out.texts]
            ids = pad_right(rows, MAX_TOKENS).to(device)
            texts = torch.cat([model.encode_text(part).float() for part in ids.split(500)])
        of_text = torch.tensor(held_out.image_of_text)
        ranks = ranks_both_ways(F.normalize(texts, dim=-1), F.normalize(images, dim=-1), of_text)
        values = recalls(*ranks, KS)
        values["mean_recall"] = statistics.mean(values.values())
        found |= {f"{language}_{name}": round(value, 4) for name, value in values.items()}
    return found


def test_pairs(made: Recipe, language: str) -> Pairs:
    """The test photos and captions, cleaned as in training."""
    spec = made.evals[language]
    return read_pairs(spec.annotations, spec.images, spec.form, clean=clean_caption)


# All arms


def measure(
    arm: str, seed: int, plan: Plan, shape: Shape, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains an arm with a seed; its figures."""
    to = options.to
    begun = time.perf_counter()
    start_model(to / "data", to / f"start-{options.size}-{seed}", shape, seed)
    made = recipe(arm, seed, to, plan, options)
    if arm == "open_clip":
        figures = open_clip_arm(made, plan, shape)
    else:
        figures = ours(made)
    if arm == "english":
        export.run(made.run, to / f"english-{seed}-model", "official")
    return figures | {"wall_s": round(time.perf_counter() - begun, 1)}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of every arm the mean and spread over its seeds of the last figures; what fine-tuning won."""
    arms: dict[str, list[dict[str, float]]] = {}
    for name, result in results.items():
        arms.setdefault(name.rpartition("-")[0], []).append(result["curve"][-1])
    found: dict[str, Any] = {}
    for arm, last in arms.items():
        keys = [key for key in last[0] if key != "step"]
        found[arm] = {"seeds": len(last)} | {
            key: [
                round(statistics.mean(row[key] for row in last), 4),
                round(statistics.stdev(row[key] for row in last), 4) if len(last) > 1 else None,
            ]
            for key in keys
        }
    tuned = [r["curve"] for name, r in results.items() if name.startswith("chinese-")]
    if tuned:
        found["gain_of_fine_tuning"] = {
            key: round(statistics.mean(c[-1][key] - c[0][key] for c in tuned), 4)
            for key in tuned[0][0]
            if key.endswith("mean_recall")
        }
    return found


def join(folders: Sequence[Path], to: Path) -> None:
    """One TO/retrieval_learning.json of several folders' results."""
    trees = [json.loads((folder / "retrieval_learning.json").read_text()) for folder in folders]
    results = {name: figures for tree in trees for name, figures in tree["results"].items()}
    joined = {"results": results, "arms": summary(results), "setting": trees[0]["setting"]}
    to.mkdir(parents=True, exist_ok=True)
    file = to / "retrieval_learning.json"
    file.write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(joined["arms"]))


def runs(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """One seed of every arm first: whatever is cut off, the arms can be compared."""
    known = importlib.util.find_spec("open_clip") is not None
    if "open_clip" in options.arms and not known:
        log.get_logger().warning(
            "the arm open_clip is left out: pip install open_clip_torch, in a folder of its own "
            "where torch must stay as it is"
        )
    for seed in options.seeds:
        for arm in options.arms:
            # One seed shows the gain; the others go to the comparison.
            if (arm != "open_clip" or known) and (
                seed == options.seeds[0] or arm in ("ours", "open_clip")
            ):
                yield arm, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "photos", type=Path, nargs="?", help="zip with captions.json and the photos it names"
    )
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--join", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=1000, help="of every arm and seed")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--points", type=int, default=2, help="evaluations of every run")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--clip-lr", type=float, default=1e-3)
    parser.add_argument("--train-photos", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=None, help="start nothing after these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.join:
        join(options.join, options.to)
        return
    if options.photos is None:
        parser.error("name the zip of photos")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(
        options.steps,
        options.batch,
        options.points,
        options.lr,
        options.clip_lr,
        train_photos=options.train_photos,
    )
    if options.tiny:
        plan, options.size, options.seeds = TINY, "tiny", options.seeds[:1]
    started = time.perf_counter()
    log.setup()
    unpack(options.photos, options.to / "data", plan)
    file = options.to / "retrieval_learning.json"
    tree = json.loads(file.read_text()) if file.exists() else {"results": {}}
    for arm, seed in runs(options):
        late = options.minutes and time.perf_counter() - started > 60 * options.minutes
        if f"{arm}-{seed}" in tree["results"] or late:
            continue
        figures = measure(arm, seed, plan, SHAPES[options.size], options)
        tree["results"][f"{arm}-{seed}"] = figures
        tree["arms"] = summary(tree["results"])
        tree["setting"] = {
            "size": options.size,
            **vars(plan),
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
            "torch": torch.__version__,
            "commit": table.commit(),
        }
        file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        shown = {key: figures[key] for key in ("parameters", "pairs_per_s", "wall_s")}
        print(json.dumps({"run": f"{arm}-{seed}", **shown, **figures["curve"][-1]}), flush=True)
    print(json.dumps(tree.get("arms", {})))


if __name__ == "__main__":
    main()
