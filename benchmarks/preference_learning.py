"""Does preference optimization learn: a small chat model, and pairs made of its own answers.

    python benchmarks/preference_learning.py flickr8k_cn_128px.zip --to out/preference
    python benchmarks/preference_learning.py flickr8k_cn_128px.zip --to out/preference --tiny

For every seed:

    base      a fresh model learns captions of photos, and short questions about the first of them:
              who is there, where, which color; the answer is what most captions of a photo name
    pairs     `data make-pairs` samples the base's answers about other photos, right against wrong,
              and continues captions without their photo; about validation photos for what is
              held out, right against wrong alone
    mpo       the base on these pairs, `objective: mpo` with its defaults
    sft       the base on the chosen answers alone: same samples in the same order, steps and rate

Measured on validation photos: the share of held-out pairs whose right answer has the higher
log-probability, and of those whose reward is higher (relative to the base); right greedy answers;
CIDEr. A finished run is not run again; TO/preference_learning.json holds all figures. Seeds may run
side by side, in a folder each; `--join` puts them into one file:

    python benchmarks/preference_learning.py --to out/preference --join seed0 seed1 seed2
"""

import argparse
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learning
import torch
from rows import commit

from internvl import demo, evals, export, log, train
from internvl.config import eval_config, recipes
from internvl.evals import pairing
from internvl.inference import load as loading
from internvl.inference.chat import Chat

ASKED: dict[str, dict[str, str]] = {
    "Who is in the photo?": {
        "dog": "dog dogs puppy",
        "man": "man men guy",
        "woman": "woman women lady",
        "boy": "boy boys",
        "girl": "girl girls",
        "child": "child children kid kids baby toddler",
        "people": "people group crowd",
    },
    "Where is it?": {
        "water": "water ocean lake pool river wave waves sea swimming",
        "snow": "snow snowy ski skier snowboarder snowboard",
        "grass": "grass grassy field lawn",
        "street": "street road sidewalk city",
        "beach": "beach sand sandy",
        "mountain": "mountain mountains rock rocks cliff hill",
    },
    "Which color is there?": {
        color: color for color in ("red", "blue", "green", "black", "white", "brown", "yellow")
    },
}
"""Question -> answer -> the words in captions that count for it."""
_VOTES = 3
"""Captions, of five, that must name an answer."""
SHAPES = {
    "tiny": demo.ChatSize(learning.PIXELS, 16, 64, 2, 64, 2),
    "small": demo.ChatSize(learning.PIXELS, 16, 256, 6, 256, 6),
}
"""0.4 and 11 million parameters; the second is for a GPU."""


@dataclass(frozen=True)
class Plan:
    """Sizes of everything."""

    photos: int | None = None
    """Training photos; None takes all."""
    taught: float = 0.35
    """Share of the photos whose questions the base learns; the others' make the pairs."""
    base_steps: int = 400
    base_batch: int = 64
    base_lr: float = 2e-3
    questions: int = 800
    """Most questions that are asked for pairs; a third of them for the held-out ones."""
    captions: int = 300
    """Photos whose first caption is continued without them."""
    samples: int = 8
    temperature: float = 1.0
    steps: int = 80
    batch: int = 32
    lr: float = 1e-3
    captioned: int = 200
    """Validation photos whose captions are scored."""


TINY = Plan(40, 0.5, base_steps=150, questions=30, captions=4, steps=3, captioned=4)


def answer_of(captions: Sequence[str], classes: Mapping[str, str]) -> str | None:
    """The answer that most captions name; None if too few do, or two as often."""
    votes: Counter[str] = Counter()
    for caption in captions:
        words = set(re.findall("[a-z]+", caption.lower()))
        votes.update(name for name, counted in classes.items() if words & set(counted.split()))
    best = [*votes.most_common(2), ("", 0)][:2]
    return best[0][0] if best[0][1] >= _VOTES and best[0][1] > best[1][1] else None


def write_data(archive: Path, folder: Path, plan: Plan) -> None:
    """Photos, captions and questions; done once. What `learning.py` unpacks, and

    captions.jsonl, taught.jsonl   what the base learns
    asked.jsonl, held_out.jsonl    questions for pairs, of other photos and of validation photos;
                                   the first also asks for captions
    """
    learning.unpack(archive, folder, plan.photos)
    if (folder / "held_out.jsonl").exists():
        return
    import zipfile

    with zipfile.ZipFile(archive) as packed:
        captions = json.loads(packed.read("captions.json"))
    names: dict[str, list[str]] = {}
    for name, row in sorted(captions.items()):
        names.setdefault(row["split"], []).append(name)
    training, validation = names["train"][: plan.photos], names["val"][: plan.photos]
    end = int(plan.taught * len(training))
    prompt = f"<image>\n{learning.PROMPTS['en']}"
    _write(
        folder / "captions.jsonl",
        [
            {"image": name} | _turns(prompt, caption)
            for name in training
            for caption in captions[name]["en"]
        ],
    )
    for file, shown, limit in (
        ("taught.jsonl", training[:end], None),
        ("asked.jsonl", training[end:], plan.questions),
        ("held_out.jsonl", validation, plan.questions // 3),
    ):
        rows = [
            {"image": name} | _turns(f"<image>\n{question}", answer)
            for name in shown
            for question, classes in ASKED.items()
            if (answer := answer_of(captions[name]["en"], classes)) is not None
        ]
        rows = rows[:limit]
        if file == "asked.jsonl":
            rows += [
                {"image": name, "answers": captions[name]["en"]}
                | _turns(prompt, captions[name]["en"][0])
                for name in reversed(shown[-plan.captions :])
            ]
        _write(folder / file, rows)


def _turns(question: str, answer: str) -> dict[str, Any]:
    turns = [("human", question), ("gpt", answer)]
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def start_model(data: Path, folder: Path, size: str) -> None:
    """The fresh model of every seed."""
    if (folder / "config.json").exists():
        return
    lines = (data / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["conversations"][-1]["value"] for line in lines]
    answers = [name for classes in ASKED.values() for name in classes]
    prompts = [learning.PROMPTS["en"], *ASKED, *answers]
    tokenizer = demo.train_tokenizer(texts, prompts, vocab_size=2000)
    demo.create_model(folder, tokenizer, SHAPES[size])


def recipe(
    model: Path,
    sources: Sequence[dict[str, Any]],
    run: Path,
    *,
    device: str,
    share: bool = False,
    **keys: Any,
) -> Any:
    """What `internvl train` would be given."""
    tree: dict[str, Any] = {
        "model": {
            "id": str(model),
            "train": ["vision_tower", "multi_modal_projector", "language_model"],
        },
        "data": {
            "sources": list(sources),
            "tiles": {"size": learning.PIXELS, "max": 1, "thumbnail": False},
            "max_tokens": 256,
            "row_tokens": 1024 if device == "cpu" else 8192,
            "max_tiles": 256,
            "share_prefix": share,
            "workers": 0 if device == "cpu" else 8,
        },
        "optim": {"warmup_ratio": 0.05, "betas": [0.9, 0.98], **keys.pop("optim")},
        "checkpoint": {"every": 0, "keep": 1},
        "run": str(run),
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "device": device,
        "threads": 1 if device == "cpu" else None,
        # Written-out scores are fastest on a CPU for a model this small.
        "compute": {"attention": "eager"} if device == "cpu" else {},
        **keys,
    }
    return recipes.resolve(tree, name=run.name)


def trained(made: Any, folder: Path) -> Path:
    """The model folder of a run, which is run first if it has not been."""
    if not folder.exists():
        train.run(made)
        export.run(made.run, folder)
    return folder


def make_pairs(
    model: Path, data: Path, name: str, to: Path, seed: int, plan: Plan, device: str
) -> Any:
    options = pairing.PairOptions(
        annotations=data / f"{name}.jsonl",
        images=data,
        samples=plan.samples,
        temperature=plan.temperature,
        top_k=0,
        max_new_tokens=24,
        per_question=2,
        seed=seed,
    )
    return pairing.run(str(model), to, options, device=device)


def measure(model: Path, data: Path, pairs: Path, plan: Plan, device: str) -> dict[str, Any]:
    """Figures of a model folder, and the log-probabilities of every held-out pair."""
    sections = {
        "pairs": {"type": "preference", "annotations": pairs, "beta": 0.1},
        "questions": {
            "type": "qa",
            "annotations": data / "held_out.jsonl",
            "max_new_tokens": 6,
            "metric": "exact",
        },
        "captions": {
            "type": "caption",
            "annotations": data / "validation_en.json",
            "prompt": learning.PROMPTS["en"],
            "metrics": "all" if learning._scores_here() else "exact",
            "limit": plan.captioned,
            "max_new_tokens": 30,
            "batch_size": 100,
        },
    }
    chat = loading.load(str(model), device=device)
    assert isinstance(chat, Chat)
    configs = {name: eval_config(images=data, **keys) for name, keys in sections.items()}
    scores = {name: evaluator.run(chat, None) for name, evaluator in evals.build(configs).items()}
    logps = {
        row["sample"]: (row["logp_chosen"], row["logp_rejected"]) for row in scores["pairs"].rows
    }
    captions = scores["captions"].values
    return {
        "pair_accuracy": scores["pairs"].values["accuracy"],
        "right_answers": scores["questions"].values["score"],
        "cider": captions.get("cider", captions["exact"]),
        "caption_words": captions["average_length"],
        "logps": logps,
    }


def reward_accuracy(logps: Mapping[str, Sequence[float]], base: Mapping[str, Any]) -> float:
    """The share of pairs whose right answer gained more than the wrong one."""
    gains = [[a - b for a, b in zip(logps[name], base[name], strict=True)] for name in base]
    return statistics.fmean(chosen > rejected for chosen, rejected in gains)


def run_seed(seed: int, plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """All of a seed; its figures."""
    data, folder = options.to / "data", options.to / f"seed{seed}"
    started = time.process_time()
    captions = {
        "name": "captions",
        "annotations": str(data / "captions.jsonl"),
        "images": str(data),
    }
    taught = captions | {"name": "taught", "annotations": str(data / "taught.jsonl")}
    base_seed = 0 if options.one_base else seed
    base = trained(
        recipe(
            options.to / f"start-{options.size}",
            [captions | {"weight": 0.5}, taught | {"weight": 0.5}],
            options.to / f"runs/base-{base_seed}",
            device=options.device,
            share=True,
            optim={"lr": plan.base_lr},
            global_batch=plan.base_batch,
            steps=plan.base_steps,
            seed=base_seed,
        ),
        options.to / f"base-{base_seed}",
    )
    pairs, held_out = folder / "pairs.jsonl", folder / "held_out.jsonl"
    result = make_pairs(base, data, "asked", pairs, seed, plan, options.device)
    held = make_pairs(base, data, "held_out", held_out, seed, plan, options.device)
    source = {
        "name": "pairs",
        "type": "preference",
        "annotations": str(pairs),
        "images": str(data),
    }
    models = {"base": base}
    for name, objective in (("mpo", {"name": "mpo"}), ("sft", {"name": "sft"})):
        models[name] = trained(
            recipe(
                base,
                [source],
                folder / f"runs/{name}",
                device=options.device,
                objective=objective,
                optim={"lr": plan.lr},
                global_batch=plan.batch,
                steps=plan.steps,
                seed=seed,
            ),
            folder / name,
        )
    figures = {
        name: measure(model, data, held_out, plan, options.device) for name, model in models.items()
    }
    logps = {name: row.pop("logps") for name, row in figures.items()}
    for name in ("mpo", "sft"):
        figures[name]["reward_accuracy"] = reward_accuracy(logps[name], logps["base"])
    return {
        "pairs": dict(result.pairs),
        "held_out_pairs": sum(held.pairs.values()),
        "sampled_right": result.num_right / result.num_judged,
        "without_pairs": dict(result.reasons),
        **figures,
        "cpu_s": time.process_time() - started,
    }


def table(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and spread over the seeds, and of the differences to the base seed by seed."""
    arms: dict[str, Any] = {}
    for name in ("base", "mpo", "sft"):
        arms[name] = {}
        for key in next(iter(seeds.values()))[name]:
            values = [row[name][key] for row in seeds.values()]
            arms[name][key] = _mean(values)
            if name != "base" and key in row_keys(seeds):
                gains = [row[name][key] - row["base"][key] for row in seeds.values()]
                arms[name][f"{key}_minus_base"] = _mean(gains)
    return arms


def row_keys(seeds: Mapping[str, Any]) -> set[str]:
    return set(next(iter(seeds.values()))["base"])


def _mean(values: Sequence[float]) -> dict[str, float]:
    spread = round(max(values) - min(values), 4)
    return {"mean": round(statistics.fmean(values), 4), "spread": spread}


def join(folders: Sequence[Path], to: Path) -> None:
    """Writes the seeds of several folders into one file."""
    trees = [json.loads((folder / "preference_learning.json").read_text()) for folder in folders]
    seeds = {seed: row for tree in trees for seed, row in tree["seeds"].items()}
    joined = {"seeds": seeds, "arms": table(seeds), "setting": trees[0]["setting"]}
    to.mkdir(parents=True, exist_ok=True)
    text = json.dumps(joined, indent=1) + "\n"
    (to / "preference_learning.json").write_text(text, encoding="utf-8")
    print(json.dumps(joined["arms"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "photos", type=Path, nargs="?", help="zip with captions.json and the photos it names"
    )
    parser.add_argument("--join", type=Path, nargs="+", help="folders of finished seeds")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--size", choices=SHAPES, default=None)
    parser.add_argument("--base-steps", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--one-base", action="store_true", help="train the base once, of seed 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.join:
        join(options.join, options.to)
        return
    if options.photos is None:
        parser.error("name the zip of photos")
    options.size = options.size or ("tiny" if options.device == "cpu" else "small")
    changes = {key: getattr(options, key) for key in ("base_steps", "steps", "lr")}
    plan = Plan(
        **{**vars(TINY if options.tiny else Plan()), **{k: v for k, v in changes.items() if v}}
    )
    log.setup()
    write_data(options.photos, options.to / "data", plan)
    start_model(options.to / "data", options.to / f"start-{options.size}", options.size)
    file = options.to / "preference_learning.json"
    tree: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"seeds": {}}
    for seed in map(str, options.seeds):
        if seed in tree["seeds"]:
            continue
        tree["seeds"][seed] = run_seed(int(seed), plan, options)
        tree["arms"] = table(tree["seeds"])
        tree["setting"] = {
            "size": options.size,
            **vars(plan),
            "one_base": options.one_base,
            "device": "CPU" if options.device == "cpu" else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({"seed": int(seed), **tree["seeds"][seed]}), flush=True)
    print(json.dumps(tree.get("arms", {})))


if __name__ == "__main__":
    main()
