"""The demo's page, from what the run folders hold."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from internvl import log, report
from internvl.config import Recipe
from internvl.inference import load as loading
from internvl.models.vision import count_parameters

T = TypeVar("T")

LANGUAGES = {"en": "English", "zh": "Chinese", "ko": "Korean"}


@dataclass
class Timing:
    """Seconds of each part, in order."""

    parts: dict[str, float] = field(default_factory=dict)

    def of(self, name: str, work: Callable[[], T]) -> T:
        """Does the work and notes how long it took."""
        log.get_logger().info("%s …", name)
        started = time.perf_counter()
        done = work()
        self.parts[name] = time.perf_counter() - started
        return done


@dataclass(frozen=True)
class Reloaded:
    """What plain transformers made of the exported folder."""

    images: int
    largest_difference: float
    """Of the logits, float32, against ours."""
    same_answers: int


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it."""

    recipe: Recipe
    rows: Sequence[Mapping[str, Any]]
    """One of every step."""
    evaluations: Mapping[int, Mapping[str, float]]
    """Step -> metric -> value."""
    trained: int
    """Parameters that train."""
    parameters: int

    @property
    def seconds(self) -> float:
        """Of all steps, without evaluations."""
        return sum(row["step_s"] for row in self.rows)

    @property
    def samples_per_s(self) -> float:
        return sum(row["samples"] for row in self.rows) / self.seconds

    @property
    def last(self) -> int:
        return max(self.evaluations)

    def curve(self, column: str, points: int = 200) -> tuple[int, list[tuple[float, float]]]:
        """(number of steps a point is the mean of, the points) of a column of the steps."""
        width = max(1, len(self.rows) // points)
        parts = [self.rows[i : i + width] for i in range(0, len(self.rows), width)]
        return width, [(p[-1]["step"], sum(r[column] for r in p) / len(p)) for p in parts]

    def scores(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of every evaluation that has the metric."""
        return [
            (step, found[metric]) for step, found in self.evaluations.items() if metric in found
        ]


def read_run(recipe: Recipe) -> Run:
    """What the run folder of `recipe` holds."""
    counted = count_parameters(loading.load(recipe.run).model)
    evaluations = {
        int(path.stem): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((recipe.run / "evals").glob("*.json"))
    }
    return Run(recipe, log.StepLog(recipe.run, "metrics.jsonl").rows(), evaluations, *counted)


def make_page(
    chat: Run,
    data: Path,
    timing: Timing,
    checked: Reloaded,
    searching: Sequence[report.Section],
    commands: Sequence[str],
) -> report.Report:
    """The page of the demo.

    Args:
        searching: the sections about retrieval.
        commands: how to go on.
    """
    exact = [chat.evaluations[chat.last][f"test-{lang}/exact"] for lang in LANGUAGES]
    return report.Report(
        title="InternVL, from fresh weights to a named image",
        subtitle=(
            f"A {chat.parameters / 1e6:.1f} M-parameter InternVL-Chat learned to name images in "
            f"three languages on a CPU in {chat.seconds / 60:.1f} minutes; then a small "
            "InternVL-14B learned to find them."
        ),
        sections=(
            report.Facts(
                title="At a glance",
                facts=[
                    (f"{min(exact):.0%} – {max(exact):.0%}", "held-out images named exactly"),
                    (f"{len(chat.rows):,}", f"steps of {chat.recipe.global_batch} samples"),
                    (f"{chat.samples_per_s:,.0f}", "samples a second"),
                    (
                        f"{chat.rows[-1]['memory_gib']:.1f} GiB",
                        "peak memory of each process",
                    ),
                    (chat.recipe.dtype, "compute type"),
                ],
                note="Every held-out image is a new combination, such as a known person with "
                "another skin tone. Answers are greedy. Some drawings of OpenMoji equal one "
                "another under different names, so 100 % is out of reach.",
            ),
            report.Scores(
                title="Naming, before and after, on the held-out test split",
                scores=_scores(chat.evaluations[0], chat.evaluations[chat.last]),
                note="Exact: the whole name is right. BLEU-4 and CIDEr as pycocoevalcap computes "
                "them, on words in English and Korean and on characters in Chinese; CIDEr runs "
                "from 0 to 10.",
            ),
            _curves(chat),
            report.Images(
                title="Held-out images and what the model says",
                cards=_cards(chat.recipe, chat.last),
                note="The first test images in the order of their hash; nothing was picked.",
            ),
            *searching,
            report.Text(
                title="What ran, and how to go on",
                paragraphs=[
                    "; ".join(f"{name} {took:.0f} s" for name, took in timing.parts.items()) + ".",
                    f"The exported folder was reloaded with transformers' own classes: "
                    f"{checked.same_answers} of {checked.images} answers equal, logits within "
                    f"{checked.largest_difference:.0e}.",
                ],
                commands=commands,
            ),
            report.Attribution(
                title="Artwork",
                text=(data / "ATTRIBUTION.txt").read_text(encoding="utf-8"),
            ),
        ),
    )


def _scores(before: Mapping[str, float], after: Mapping[str, float]) -> list[report.Score]:
    shown = {"exact": ("exact name", 1.0, ".1%"), "bleu_4": ("BLEU-4", 1.0, ".3f")}
    shown |= {"cider": ("CIDEr", 10.0, ".2f")}
    return [
        report.Score(
            group=language,
            name=name,
            before=before.get(f"test-{tag}/{metric}"),
            after=after.get(f"test-{tag}/{metric}"),
            best=best,
            form=form,
        )
        for tag, language in LANGUAGES.items()
        for metric, (name, best, form) in shown.items()
    ]


def _curves(chat: Run) -> report.Charts:
    width, losses = chat.curve("loss")
    return report.Charts(
        title="How it learned",
        charts=[
            report.Chart(
                title=f"Training loss (mean of {width} steps)",
                x_label="step",
                y_label="nats per token",
                series=[report.Series(name="loss", points=losses)],
                from_zero=True,
            ),
            report.Chart(
                title="Exact names on the validation split",
                x_label="step",
                y_label="share",
                form=".0%",
                from_zero=True,
                series=[
                    report.Series(name=language, points=chat.scores(f"validation-{tag}/exact"))
                    for tag, language in LANGUAGES.items()
                ],
            ),
        ],
    )


def _cards(recipe: Recipe, step: int, count: int = 24) -> list[report.Card]:
    answers: dict[str, list[report.Answer]] = {}
    for tag in LANGUAGES:
        file = recipe.run / "evals" / f"{step:06d}" / f"test-{tag}.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            answers.setdefault(row["image"], []).append(
                report.Answer(
                    language=tag,
                    reference=row["references"][0],
                    answer=row["answer"],
                    right=row["exact"],
                )
            )
    return [
        report.Card(image=Path(path).read_bytes(), answers=given)
        for path, given in list(answers.items())[:count]
    ]
