"""Trains the demo's second model: a small InternVL-14B for retrieval between images and names.

Its vision tower is the chat model's, frozen; QLLaMA and the heads start fresh. Everything is the
normal path: a folder in the official layout, an ordinary recipe, R@k before, during and after, an
export that is loaded and searched with.
"""

import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sentencepiece
import torch
from torch import Tensor
from transformers import InternVLVisionModel

from internvl import export, report
from internvl.config import Recipe, RetrievalEval, recipes
from internvl.data.pair_files import Pairs, read_pairs
from internvl.data.pairs import clean_caption
from internvl.data.tokenizers import load_tokenizer
from internvl.demo import ranks
from internvl.demo.page import FinishedRun, Timing, read_run
from internvl.errors import UserError
from internvl.inference import load as loading
from internvl.models.dual.configs import DualConfig
from internvl.models.dual.model import DualModel

LANGUAGES = {"en": "English", "zh": "Chinese"}
PIXELS = 64
WIDTH = 128
"""Width of QLLaMA and of the embeddings."""
MODES = ("c", "g")
RECALL_K = (1, 5)

RECIPE = "recipe.yaml"
"""Name of the recipe's file in the folder of the retrieval part."""

T = TypeVar("T")

MUON = {"name": "muon", "schedule": "wsd", "warmup_ratio": 0.05, "betas": [0.9, 0.98]}
"""Optimizer keys of both demo recipes: Muon needs about half of AdamW's samples."""


@dataclass(frozen=True)
class RetrievalSize:
    """Amount of training and evaluation of the retrieval part."""

    steps: int
    eval_limit: int | None = None
    """Held-out images per language; None takes all."""


def run(
    folder: Path, data: Path, chat: Path, size: RetrievalSize, dtype: str, timing: Timing
) -> list[report.Section]:
    """Runs the retrieval part in `folder`; returns its sections of the page. A second call resumes.

    Args:
        chat: folder of the chat model whose vision tower is used.

    Raises:
        UserError: the exported model's features are not those of the trained one.
    """
    start, exported = folder / "start", folder / "model"
    if not (start / "config.json").exists():
        # float32, whatever the chat model was trained in: an official folder holds its weights.
        tower = loading.load(chat, device="cpu", dtype="float32").model.model.vision_tower
        timing.measure(
            "making a small InternVL-14B", lambda: start_model(_names(data), tower, start)
        )
    recipe = make_recipe(data, start, folder / "run", size, dtype)
    file = folder / RECIPE
    file.write_text(recipes.to_yaml(recipe), encoding="utf-8")
    timing.measure("training and evaluating retrieval", lambda: ranks.train_together(file))
    if not exported.exists():
        timing.measure("exporting it", lambda: export.run(recipe.run, exported, "official"))
    loaded = timing.measure("loading it and searching", lambda: compare_loaded(recipe, exported))
    return make_sections(read_run(recipe), loaded)


def start_model(names: Iterable[str], tower: InternVLVisionModel, folder: Path) -> None:
    """Writes a small InternVL-14B in the official layout: a trained tower, everything else fresh.

    Args:
        names: texts that the tokenizer is trained on.
    """
    torch.manual_seed(0)
    # The export copies the tokenizer's file, so it must lie in a folder until then.
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "tokenizer.model").write_bytes(train_sentencepiece(names))
        tokenizer = load_tokenizer(Path(temporary))
        assert tokenizer is not None
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 3 * WIDTH,
            "num_query_tokens": 8,
            "cross_attention_frequency": 2,
            "vision_hidden_size": tower.config.hidden_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": 0,
        }
        config = DualConfig(
            vision_config=tower.config, text_config=text, embed_dim=WIDTH, pool_num_heads=4
        )
        model = DualModel(config)
        model.model.vision_tower.load_state_dict(tower.state_dict())
        export.run(loading.Dual(model.eval(), tokenizer, Path(temporary)), folder, "official")


def _names(data: Path) -> list[str]:
    files = [data / f"train_{language}.json" for language in LANGUAGES]
    trees = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [row["caption"] for tree in trees for row in tree["annotations"]]


def train_sentencepiece(names: Iterable[str], vocab_size: int = 2000) -> bytes:
    """Trains a `tokenizer.model` like InternVL-14B's: SentencePiece BPE with byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # With the prefix that the encoder adds, which then is a few tokens of every text.
        sentence_iterator=iter([f"summarize:{name}" for name in names]),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        # A small data set may have fewer pieces than asked for.
        hard_vocab_limit=False,
        # Rare characters become byte pieces instead of filling the small vocabulary.
        character_coverage=0.995,
        # Errors only: SentencePiece logs its training to stderr.
        minloglevel=2,
    )
    return model.getvalue()


def make_recipe(
    data: Path, start: Path, run_folder: Path, size: RetrievalSize, dtype: str
) -> Recipe:
    """Builds the recipe: all but the tower trains, on both languages at once."""

    def measured(split: str, language: str, **when: Any) -> dict[str, Any]:
        return {
            "type": "retrieval",
            "annotations": data / f"{split}_{language}.json",
            "images": data,
            "clean": True,
            "modes": MODES,
            "recall_k": RECALL_K,
            "batch_size": 128,
            **when,
        }

    # Tests at the start and the end, validation between: a test takes as long as many steps.
    evals = {
        f"test-{lang}": measured("test", lang, before=True, limit=size.eval_limit)
        for lang in LANGUAGES
    }
    evals |= {
        f"validation-{lang}": measured("validation", lang, every=20, limit=size.eval_limit)
        for lang in LANGUAGES
    }
    # Written as a user would write it, and saved as recipe.yaml for another process to read.
    return recipes.resolve(
        {
            "model": {"id": str(start), "train": ["language_model", "heads"]},
            "data": {
                "sources": [
                    {
                        "name": f"openmoji-{lang}",
                        "type": "coco-captions",
                        "annotations": data / f"train_{lang}.json",
                        "images": data,
                    }
                    for lang in LANGUAGES
                ],
                "tiles": {"size": PIXELS, "max": 1},
                "workers": 1,
            },
            # Matching (itm) would take half of a step's time, and finds nothing by itself.
            "objective": {"name": "retrieval", "weights": {"itm": 0}},
            "optim": MUON | {"lr": 4e-3, "decay_ratio": 0.5},
            "evals": evals,
            "run": run_folder,
            "global_batch": 128,
            "steps": size.steps,
            "dtype": dtype,
            "device": "cpu",
            "threads": 1,
            # Twice as fast: on a CPU most of a step was the backward pass of fused attention.
            "compute": {"attention": "eager"},
        },
        name="the demo's recipe for retrieval",
    )


@dataclass(frozen=True)
class SearchResults:
    """Similarities of the exported model on the test images of a language."""

    language: str
    pairs: Pairs
    scores: Tensor
    """float32 (texts, images); text n belongs to image n."""


def compare_loaded(recipe: Recipe, exported: Path) -> list[SearchResults]:
    """Compares the export's features with the run's; returns its similarities as InternVL-G.

    Raises:
        UserError: features differ.
    """
    handles = [
        loading.load(folder, device="cpu", dtype="float32").as_dual("the comparison")
        for folder in (recipe.run, exported)
    ]
    results = []
    encoded: dict[tuple[Any, ...], list[list[Tensor]]] = {}
    for language in LANGUAGES:
        spec = recipe.evals[f"test-{language}"]
        assert isinstance(spec, RetrievalEval), "the demo's recipe makes it one"
        pairs = read_pairs(spec.annotations, spec.images, clean=clean_caption)
        pairs = pairs.without({*range(spec.limit, len(pairs.images))} if spec.limit else set())
        images = tuple(pairs.images)
        # Both languages name the same images.
        if images not in encoded:
            encoded[images] = [
                [*handle.encode_images_of(images, spec.modes).values()] for handle in handles
            ]
        theirs, ours = (
            [*features, handle.encode_texts(pairs.texts)]
            for features, handle in zip(encoded[images], handles, strict=True)
        )
        worst = max(float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True))
        if worst > 1e-5:
            raise UserError(
                f"{exported}: its features differ by up to {worst:.1e} from the trained model's"
            )
        # Features are L2-normalized, so the product is the cosine similarity.
        results.append(SearchResults(language, pairs, ours[-1] @ ours[spec.modes.index("g")].T))
    return results


def make_sections(run: FinishedRun, results: Sequence[SearchResults]) -> list[report.Section]:
    """Builds the page's sections about retrieval."""
    mean, losses = run.curve("itc")
    # One curve for each language and branch: C embeds by the tower alone, G by QLLaMA too.
    validation = [
        report.Series(
            name=f"{language}, {mode.upper()}",
            points=run.scores(f"validation-{tag}/{mode}_mean_recall"),
        )
        for tag, language in LANGUAGES.items()
        for mode in MODES
    ]
    return [
        report.Scores(
            title="Finding, before and after, on the held-out test split",
            scores=list(_scores(run.evaluations[0], run.evaluations[run.last])),
            note=f"A {run.parameters / 1e6:.1f} M-parameter InternVL-14B. Its vision tower is the "
            f"chat model's and stays as it is; {run.trained / 1e6:.1f} M parameters start fresh. "
            f"{len(run.rows):,} steps of {run.recipe.global_batch} pairs took "
            f"{run.seconds:,.0f} s, {run.samples_per_s:,.0f} pairs per second. R@k: the right one "
            f"of {len(results[0].pairs.images)} is among the first k. InternVL-C embeds what the "
            "tower sees, InternVL-G also what QLLaMA's queries make of it. Images that are drawn "
            "alike under different names keep 100 % out of reach.",
        ),
        report.Charts(
            title="How it learned to find",
            charts=[
                report.Chart(
                    title=f"Contrastive loss (mean of {mean} step{'s' * (mean > 1)})",
                    x_label="step",
                    y_label="nats per pair, both branches",
                    series=[report.Series(name="loss", points=losses)],
                    from_zero=True,
                ),
                report.Chart(
                    title="Mean of R@1 and R@5, both directions, on the validation split",
                    x_label="step",
                    y_label="share",
                    form=".0%",
                    from_zero=True,
                    series=validation,
                ),
            ],
        ),
        report.Searches(
            title="Images found by a name",
            searches=list(_by_turns([_by_name(of_language) for of_language in results])),
            note="The first test names in the order of their hash, and the five images of the "
            "test split that come first for InternVL-G; nothing was picked.",
        ),
        report.Searches(
            title="Names found by an image",
            searches=list(_by_turns([_by_image(of_language) for of_language in results])),
            note="The test images that follow, and the five names that come first.",
        ),
    ]


_QUERIES, _HITS = 6, 5  # searches of a direction and language, and results of a search


def _scores(before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[report.Score]:
    directions = {"image": "name → image", "text": "image → name"}
    for tag, language in LANGUAGES.items():
        for mode in MODES:
            for direction, shown in directions.items():
                for k in RECALL_K:
                    metric = f"test-{tag}/{mode}_{direction}_retrieval_recall@{k}"
                    yield report.Score(
                        group=f"{language}, InternVL-{mode.upper()}",
                        name=f"{shown}, R@{k}",
                        before=before.get(metric),
                        after=after.get(metric),
                        form=".1%",
                    )


def _by_name(results: SearchResults) -> list[report.Search]:
    images = [Path(str(path)).read_bytes() for path in results.pairs.images]
    return [
        report.Search(
            language=results.language,
            text=results.pairs.texts[query],
            rank=rank,
            # Text n belongs to image n, so the right image has the query's index.
            hits=[report.Hit(right=n == query, image=images[n]) for n in first],
        )
        for query, rank, first in _ranked(results.scores, range(_QUERIES))
    ]


def _by_image(results: SearchResults) -> list[report.Search]:
    # Other images than those above, so that a reader sees more of the test split.
    return [
        report.Search(
            language=results.language,
            image=Path(str(results.pairs.images[query])).read_bytes(),
            rank=rank,
            hits=[report.Hit(right=n == query, text=results.pairs.texts[n]) for n in first],
        )
        for query, rank, first in _ranked(results.scores.T, range(_QUERIES, 2 * _QUERIES))
    ]


def _ranked(scores: Tensor, queries: range) -> Iterator[tuple[int, int, list[int]]]:
    """Yields (query, rank of the right candidate from 1, the first candidates)."""
    for query in queries:
        # Stable, so that the page is the same on every machine if scores are equal.
        order = scores[query].sort(descending=True, stable=True)[1].tolist()
        yield query, order.index(query) + 1, order[:_HITS]


def _by_turns(lists: Sequence[Sequence[T]]) -> Iterator[T]:
    # The languages take turns, so that the first searches of the page show them all.
    for entries in zip(*lists, strict=True):
        yield from entries
