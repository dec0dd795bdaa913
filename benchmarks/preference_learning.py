"""Does preference optimization learn: a small chat model, and pairs made of its own answers.

    python benchmarks/preference_learning.py photos.zip --to out/preference --device cuda --parallel
    python benchmarks/preference_learning.py photos.zip --to out/preference --tiny
    python benchmarks/preference_learning.py flickr8k_cn_128px.zip --pack photos.zip  # 12 MB of it

For every seed:

    base      a fresh model learns captions of photos, and short questions about some of them: who
              is there, where, which color; the answer is what most captions of a photo name
    pairs     the base's own answers about other photos: `data make-pairs` sets a right short
              answer against a wrong one; of several captions the one with the highest CIDEr against
              the photo's five is set against the one with the lowest
    mpo       the base on these pairs, `objective: mpo` with its defaults
    sft       the base on the chosen answers alone: same samples in the same order, as many steps

Both arms run at every learning rate. The one that counts is chosen on validation photos: the most
held-out pairs whose right answer gained more, where captions are no worse than the base's. All
figures are of test photos: that share (`reward_accuracy`; the base's own is a half by definition),
the share whose right answer is more probable by token (`pair_accuracy`, of questions and of
captions), right greedy answers, CIDEr.

A finished step is not run again; TO/preference_learning.json holds all figures.
"""

import argparse
import io
import json
import math
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import learning
import torch
from PIL import Image
from rows import commit

from internvl import demo, evals, export, log, train
from internvl.config import eval_config, recipes
from internvl.evals import asking, pairing
from internvl.evals.pairing.plans import plan_questions
from internvl.evals.pairing.requests import Asker
from internvl.inference import load as loading
from internvl.inference.chat import Chat

PIXELS = 96
SPLITS = {"validation": "val", "test": "test"}
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
    "tiny": demo.ChatSize(PIXELS, 12, 64, 2, 64, 2),
    "small": demo.ChatSize(PIXELS, 12, 256, 6, 256, 6),
}
"""0.4 and 11 million parameters; the second is for a GPU."""
ARMS = {"mpo": {"name": "mpo"}, "sft": {"name": "sft"}}


@dataclass(frozen=True)
class Plan:
    """Sizes of everything."""

    photos: int | None = None
    """Training photos; None takes all."""
    taught: float = 0.35
    """Share of the photos whose questions the base learns; the others' make the pairs."""
    base_steps: int = 1200
    base_batch: int = 96
    base_lr: float = 1.5e-3
    questions: int = 2500
    """Questions that are asked for pairs."""
    captions: int = 2000
    """Photos that are captioned for pairs."""
    held_out: int = 300
    """Questions, and photos that are captioned, for the pairs of a held-out split."""
    samples: int = 8
    temperature: float = 1.0
    """Of short answers."""
    caption_temperature: float = 0.7
    """A small model's captions at 1 are no sentences."""
    steps: int = 160
    batch: int = 64
    lrs: tuple[float, ...] = (2e-4, 6e-4)


TINY = Plan(40, 0.5, 150, 64, 2e-3, 30, 8, 6, steps=3, batch=32, lrs=(1e-4,))


def answer_of(captions: Sequence[str], classes: Mapping[str, str]) -> str | None:
    """The answer that most captions name; None if too few do, or two as often."""
    votes: Counter[str] = Counter()
    for caption in captions:
        words = set(re.findall("[a-z]+", caption.lower()))
        votes.update(name for name, counted in classes.items() if words & set(counted.split()))
    best = [*votes.most_common(2), ("", 0)][:2]
    return best[0][0] if best[0][1] >= _VOTES and best[0][1] > best[1][1] else None


def pack(archive: Path, to: Path, limit: int = 4600, held_out: int = 300) -> None:
    """A small copy of the archive: photos at the model's side, English captions."""
    with zipfile.ZipFile(archive) as packed, zipfile.ZipFile(to, "w") as small:
        captions = json.loads(packed.read("captions.json"))
        counts: Counter[str] = Counter()
        chosen = {}
        for name, row in sorted(captions.items()):
            counts[row["split"]] += 1
            if counts[row["split"]] > (limit if row["split"] == "train" else held_out):
                continue
            chosen[name] = {"split": row["split"], "en": row["en"]}
            image = Image.open(io.BytesIO(packed.read(name))).convert("RGB")
            image = image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
            file = io.BytesIO()
            image.save(file, "JPEG", quality=60, optimize=True)
            small.writestr(name, file.getvalue())
        text = json.dumps(chosen, ensure_ascii=False)
        small.writestr("captions.json", text, zipfile.ZIP_DEFLATED, 9)


def write_data(archive: Path, folder: Path, plan: Plan) -> None:
    """Photos, captions and questions; done once.

    captions.jsonl, taught.jsonl     what the base learns
    pairs_….jsonl                    questions, and photos to caption, for pairs
    validation_….jsonl, test_….jsonl the same of held-out photos; .json: their captions
    """
    if (folder / "done").exists():
        return
    with zipfile.ZipFile(archive) as packed:
        captions = json.loads(packed.read("captions.json"))
        splits: dict[str, list[str]] = {}
        for name, row in sorted(captions.items()):
            splits.setdefault(row["split"], []).append(name)
        training = splits["train"][: plan.photos]
        held_out = {name: splits[split][: plan.photos] for name, split in SPLITS.items()}
        packed.extractall(folder, [*training, *(n for names in held_out.values() for n in names)])
    texts = {name: row["en"] for name, row in captions.items()}
    end = int(plan.taught * len(training))
    prompt = f"<image>\n{learning.PROMPTS['en']}"
    lines = ((n, caption) for n in training for caption in texts[n])
    _write(folder / "captions.jsonl", [{"image": n} | _turns(prompt, c) for n, c in lines])
    _write(folder / "taught.jsonl", _questions(training[:end], texts))
    sizes = {"pairs": (plan.questions, plan.captions)}
    shown = {"pairs": training[end:], **held_out}
    for name, photos in shown.items():
        questions, captioned = sizes.get(name, (plan.held_out, plan.held_out))
        _write(folder / f"{name}_questions.jsonl", _questions(photos, texts)[:questions])
        # Other photos than the first questions are about, as far as there are enough.
        photos = photos[::-1][:captioned]
        rows = [{"image": n, "answers": texts[n]} | _turns(prompt, texts[n][0]) for n in photos]
        _write(folder / f"{name}_captions.jsonl", rows)
        tree = {
            "images": [{"id": i, "file_name": n} for i, n in enumerate(photos)],
            "annotations": [
                {"image_id": i, "caption": c} for i, n in enumerate(photos) for c in texts[n]
            ],
        }
        (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "done").touch()


def _questions(photos: Sequence[str], texts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {"image": name} | _turns(f"<image>\n{question}", answer)
        for name in photos
        for question, classes in ASKED.items()
        if (answer := answer_of(texts[name], classes)) is not None
    ]


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
            "tiles": {"size": PIXELS, "max": 1, "thumbnail": False},
            "max_tokens": 256,
            "row_tokens": 1024 if device == "cpu" else 4096,
            "max_tiles": 256,
            "share_prefix": share,
            "workers": 0 if device == "cpu" else 4,
        },
        "optim": {"warmup_ratio": 0.05, "betas": [0.9, 0.98], **keys.pop("optim")},
        "checkpoint": {"every": 0, "keep": 1},
        "run": str(run),
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "device": device,
        "threads": 1 if device == "cpu" else None,
        # Written-out scores are fastest on a CPU for a model this small, and compiling it on a GPU
        # would take longer than training it.
        "compute": {"attention": "eager"} if device == "cpu" else learning.DENSE,
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
    model: Path, data: Path, name: str, folder: Path, seed: int, plan: Plan, device: str
) -> dict[str, Any]:
    """Both sorts of pairs of a split, in folder/NAME_….jsonl; how many they are."""
    options = pairing.PairOptions(
        annotations=data / f"{name}_questions.jsonl",
        images=data,
        samples=plan.samples,
        temperature=plan.temperature,
        top_k=0,
        max_new_tokens=6,
        per_question=1,
        seed=seed,
    )
    asked = pairing.run(str(model), folder / f"{name}_questions.jsonl", options, device=device)
    options = replace(
        options,
        annotations=data / f"{name}_captions.jsonl",
        method="correctness",
        rule="exact",
        temperature=plan.caption_temperature,
        max_new_tokens=24,
    )
    rows = rank_captions(model, options, device)
    _write(folder / f"{name}_captions.jsonl", rows)
    return {
        "questions": sum(asked.pairs.values()),
        "captions": len(rows),
        "right": asked.num_right / asked.num_judged,
        "without_pairs": dict(asked.reasons),
    }


def rank_captions(model: Path, options: Any, device: str) -> list[dict[str, Any]]:
    """Pairs of a photo's sampled captions: that of the highest CIDEr and that of the lowest."""
    planned = plan_questions(options)
    asks = [(plan, sample) for plan in planned.plans for sample in range(options.samples)]
    chat = loading.load(str(model), device=device)
    assert isinstance(chat, Chat)
    answers = asking.ask(
        chat,
        len(asks),
        Asker(chat, options, asks).question,
        options.settings(),
        batch_size=1024 if device == "cuda" else 64,
        fills_device=True,
        cache=None,
    )
    sampled: dict[str, list[str]] = {}
    for (plan, _), answer in zip(asks, answers, strict=True):
        sampled.setdefault(plan.question.name, []).append(answer["answer"])
    cider = Cider([plan.question.reference.texts for plan in planned.plans])
    rows = []
    for plan in planned.plans:
        truth = plan.question.reference.texts
        scored = sorted({(cider.score(t, truth), t) for t in sampled[plan.question.name] if t})
        (least, rejected), (most, chosen) = scored[0], scored[-1]
        if most > least:
            row = {**plan.question.media, "question": plan.question.text}
            rows.append(row | {"chosen": chosen, "rejected": rejected})
    return rows


class Cider:
    """CIDEr-D of a caption, 0 to 10, as pycocoevalcap's; words are runs of letters and digits.

    Vedantam, Zitnick and Parikh 2015, arXiv:1411.5726.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self.seen_in: Counter[tuple[str, ...]] = Counter()
        for texts in references:
            self.seen_in.update({gram for text in texts for gram in _grams(text)})
        self.log_documents = math.log(len(references))

    def score(self, caption: str, references: Sequence[str]) -> float:
        """The mean over references and lengths of n-grams."""
        hypothesis = self._vectors(caption)
        scores = [_likeness(hypothesis, self._vectors(text)) for text in references]
        return 10 * statistics.fmean(scores)

    def _vectors(self, text: str) -> tuple[list[dict[tuple[str, ...], float]], int]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(4)]
        for gram, count in _grams(text).items():
            rarity = self.log_documents - math.log(max(1, self.seen_in[gram]))
            vectors[len(gram) - 1][gram] = count * rarity
        return vectors, len(_words(text))


def _likeness(one: tuple[list[Any], int], other: tuple[list[Any], int]) -> float:
    (vectors, length), (others, other_length) = one, other
    cosines = []
    for vector, reference in zip(vectors, others, strict=True):
        product = sum(
            min(v, reference.get(g, 0.0)) * reference.get(g, 0.0) for g, v in vector.items()
        )
        norms = math.hypot(*vector.values()) * math.hypot(*reference.values())
        cosines.append(product / norms if norms else 0.0)
    # As published: longer and shorter captions than the reference lose.
    return statistics.fmean(cosines) * math.exp(-((length - other_length) ** 2) / 72)


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = _words(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def measure(model: Path, data: Path, pairs: Path, split: str, device: str) -> dict[str, Any]:
    """Figures of a model folder on a held-out split, and log-probabilities of all its pairs.

    A pair is right if a token of its chosen answer is more probable on average: captions differ in
    length, and the sum of a longer one is nearly always lower.
    """
    sections: dict[str, dict[str, Any]] = {
        sort: {"type": "preference", "annotations": pairs / f"{split}_{sort}.jsonl", "beta": 0.1}
        for sort in ("questions", "captions")
    }
    sections["greedy"] = {
        "type": "qa",
        "annotations": data / f"{split}_questions.jsonl",
        "max_new_tokens": 6,
        "metric": "exact",
    }
    sections["captioned"] = {
        "type": "caption",
        "annotations": data / f"{split}.json",
        "prompt": learning.PROMPTS["en"],
        "metrics": "exact",
        "max_new_tokens": 30,
        "batch_size": 100,
    }
    chat = loading.load(str(model), device=device)
    assert isinstance(chat, Chat)
    configs = {name: eval_config(images=data, **keys) for name, keys in sections.items()}
    evaluators = evals.build(configs)
    scores = {name: evaluator.run(chat, None) for name, evaluator in evaluators.items()}
    logps, right = {}, {}
    for sort in ("questions", "captions"):
        lengths = lengths_of(chat, pairs / f"{split}_{sort}.jsonl")
        for row in scores[sort].rows:
            line = int(row["sample"].rpartition(" ")[2]) - 1
            both = row["logp_chosen"], row["logp_rejected"]
            logps[f"{sort}/{line}"] = both
            chosen, rejected = (x / n for x, n in zip(both, lengths[line], strict=True))
            right.setdefault(sort, []).append(chosen > rejected)
    references: dict[Any, list[str]] = evaluators["captioned"].references
    cider = Cider([*references.values()])
    answers = {row["image_id"]: row["answer"] for row in scores["captioned"].rows}
    return {
        "pair_accuracy": statistics.fmean(right["questions"] + right["captions"]),
        "question_pairs": statistics.fmean(right["questions"]),
        "caption_pairs": statistics.fmean(right["captions"]),
        "right_answers": scores["greedy"].values["score"],
        "cider": statistics.fmean(cider.score(t, references[i]) for i, t in answers.items()),
        "caption_words": statistics.fmean(len(_words(text)) for text in answers.values()),
        "logps": logps,
    }


def lengths_of(chat: Chat, pairs: Path) -> list[tuple[int, int]]:
    """Tokens of both answers of every line, their ends included."""
    rows = map(json.loads, pairs.read_text(encoding="utf-8").splitlines())

    def tokens(text: str) -> int:
        return len(chat.tokenizer(text, add_special_tokens=False).input_ids) + 1

    return [(tokens(row["chosen"]), tokens(row["rejected"])) for row in rows]


def gains(
    logps: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Shares of the held-out pairs whose right answer gained more than the wrong one."""
    right: dict[str, list[bool]] = {"questions": [], "captions": []}
    for name, before in base.items():
        chosen, rejected = (a - b for a, b in zip(logps[name], before, strict=True))
        right[name.partition("/")[0]].append(chosen > rejected)
    return {
        "reward_accuracy": statistics.fmean(right["questions"] + right["captions"]),
        "question_rewards": statistics.fmean(right["questions"]),
        "caption_rewards": statistics.fmean(right["captions"]),
    }


def run_seed(seed: int, plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """All of a seed; its figures."""
    data, folder, device = options.to / "data", options.to / f"seed{seed}", options.device
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    captions = {
        "name": "captions",
        "annotations": str(data / "captions.jsonl"),
        "images": str(data),
    }
    taught = captions | {"name": "taught", "annotations": str(data / "taught.jsonl")}
    base = trained(
        recipe(
            options.to / f"start-{options.size}",
            [captions | {"weight": 0.6}, taught | {"weight": 0.4}],
            folder / "runs/base",
            device=device,
            optim={"lr": plan.base_lr},
            global_batch=plan.base_batch,
            steps=plan.base_steps,
            seed=seed,
        ),
        folder / "base",
    )
    lap("base")
    made = {
        name: make_pairs(base, data, name, folder, seed, plan, device)
        for name in ("pairs", *SPLITS)
    }
    lap("pairs")
    sources = [
        {
            "name": sort,
            "type": "preference",
            "annotations": str(folder / f"pairs_{sort}.jsonl"),
            "images": str(data),
        }
        for sort in ("questions", "captions")
    ]
    models: dict[str, dict[float, Path]] = {
        name: {
            lr: trained(
                recipe(
                    base,
                    sources,
                    folder / f"runs/{name}-{lr:g}",
                    device=device,
                    objective=objective,
                    optim={"lr": lr},
                    global_batch=plan.batch,
                    steps=plan.steps,
                    seed=seed,
                ),
                folder / f"{name}-{lr:g}",
            )
            for lr in plan.lrs
        }
        for name, objective in ARMS.items()
    }
    lap("arms")
    tried = {"base": measure(base, data, folder, "validation", device)}
    figures = {"base": measure(base, data, folder, "test", device)}
    for name, by_lr in models.items():
        measured = {lr: measure(m, data, folder, "validation", device) for lr, m in by_lr.items()}
        for lr, row in measured.items():
            row |= gains(row["logps"], tried["base"]["logps"])
            tried[f"{name} {lr:g}"] = row
        lr = chosen_lr(measured, tried["base"]["cider"])
        figures[name] = {"lr": lr, **measure(by_lr[lr], data, folder, "test", device)}
        figures[name] |= gains(figures[name]["logps"], figures["base"]["logps"])
    lap("measured")
    for row in (*figures.values(), *tried.values()):
        row.pop("logps", None)
    return {"made": made, **figures, "validation": tried, "seconds": seconds}


def chosen_lr(measured: Mapping[float, Mapping[str, float]], cider: float) -> float:
    """The rate with the best pairs among those that keep the captions, else with the best ones."""
    keeps = [lr for lr, row in measured.items() if row["cider"] >= cider]
    if keeps:
        return max(keeps, key=lambda lr: measured[lr]["reward_accuracy"])
    return max(measured, key=lambda lr: measured[lr]["cider"])


def table(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and spread over the seeds, and of the differences to others seed by seed."""
    arms: dict[str, Any] = {}
    rows = [*seeds.values()]
    for name in ("base", *ARMS):
        arms[name] = {key: _mean([row[name][key] for row in rows]) for key in rows[0][name]}
        for other in {"base": (), "sft": ("base",), "mpo": ("base", "sft")}[name]:
            for key in rows[0][name].keys() & rows[0][other].keys() - {"lr"}:
                differences = [row[name][key] - row[other][key] for row in rows]
                arms[name][f"{key}_minus_{other}"] = _mean(differences)
    return arms


def _mean(values: Sequence[float]) -> dict[str, float]:
    spread = round(max(values) - min(values), 4)
    return {"mean": round(statistics.fmean(values), 4), "spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("archive", type=Path, help="zip with captions.json and the photos it names")
    parser.add_argument("--to", type=Path, default=Path("out/preference_learning"))
    parser.add_argument("--pack", type=Path, help="write a small copy of the zip, nothing else")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", action="store_true", help="all seeds side by side")
    parser.add_argument("--size", choices=SHAPES, default=None)
    for name in ("base-steps", "base-batch", "questions", "captions", "held-out", "steps", "batch"):
        parser.add_argument(f"--{name}", type=int, default=None)
    parser.add_argument("--lrs", type=float, nargs="+", default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.pack:
        pack(options.archive, options.pack)
        return
    options.size = options.size or ("tiny" if options.device == "cpu" else "small")
    changes = {key: getattr(options, key) for key in vars(Plan()) if getattr(options, key, None)}
    plan = replace(TINY if options.tiny else Plan(), **changes)
    log.setup()
    write_data(options.archive, options.to / "data", plan)
    start_model(options.to / "data", options.to / f"start-{options.size}", options.size)
    if options.parallel and len(options.seeds) > 1:
        run_side_by_side(options)
    file = options.to / "preference_learning.json"
    seeds: dict[str, Any] = {}
    for seed in options.seeds:
        kept = options.to / f"seed{seed}" / "figures.json"
        if not kept.exists():
            figures = run_seed(seed, plan, options)
            kept.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print(json.dumps({"seed": seed, **figures}), flush=True)
        seeds[str(seed)] = json.loads(kept.read_text(encoding="utf-8"))
        setting = {
            "size": options.size,
            **vars(plan),
            "device": "CPU" if options.device == "cpu" else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        tree = {"seeds": seeds, "arms": table(seeds), "setting": setting}
        file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(table(seeds)))


def run_side_by_side(options: argparse.Namespace) -> None:
    """A process for each seed; one that fails is run once more, alone, by the caller."""
    words = [word for word in sys.argv if word != "--parallel"]
    running = []
    for seed in options.seeds:
        with (options.to / f"seed{seed}.log").open("w") as file:
            command = [sys.executable, *words, "--seeds", str(seed)]
            running.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
    for process in running:
        process.wait()


if __name__ == "__main__":
    main()
