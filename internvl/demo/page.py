"""Builds the demo's page from its run folders."""

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
    """Seconds of the demo's steps, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str, work: Callable[[], T]) -> T:
        """Calls `work` and records its seconds."""
        # Said before, for some steps take minutes.
        log.get_logger().info("%s …", name)
        started = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - started
        return result


@dataclass(frozen=True)
class Reloaded:
    """Comparison of the export in plain transformers with the trained model."""

    images: int
    largest_difference: float
    """Maximum absolute difference of the logits, float32."""
    same_answers: int


@dataclass(frozen=True)
class FinishedRun:
    """Metrics and sizes of a finished run, read from its folder."""

    recipe: Recipe
    rows: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl, one per step."""
    evaluations: Mapping[int, Mapping[str, float]]
    """Step -> metric -> value."""
    trained: int
    """Number of trained parameters."""
    parameters: int

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without evaluations."""
        return sum(row["step_s"] for row in self.rows)

    @property
    def samples_per_s(self) -> float:
        return sum(row["samples"] for row in self.rows) / self.seconds

    @property
    def last(self) -> int:
        return max(self.evaluations)

    def curve(self, column: str, points: int = 200) -> tuple[int, list[tuple[float, float]]]:
        """Averages a column of the steps: (steps per point, [(step, mean)])."""
        # About `points` of them: more than the page's pixels only make its file larger.
        width = max(1, len(self.rows) // points)
        chunks = [self.rows[i : i + width] for i in range(0, len(self.rows), width)]
        return width, [(p[-1]["step"], sum(r[column] for r in p) / len(p)) for p in chunks]

    def scores(self, metric: str) -> list[tuple[float, float]]:
        """Lists (step, value) of every evaluation with the metric."""
        # Test sets are evaluated at the first and last step, validation sets also between.
        return [
            (step, values[metric]) for step, values in self.evaluations.items() if metric in values
        ]


def read_run(recipe: Recipe) -> FinishedRun:
    """Reads the run folder of `recipe`."""
    # Counted on the loaded run: the recipe does not say how large its model is.
    counted = count_parameters(loading.load(recipe.run).model)
    # Sorted, as glob has no order and curves run by step; names are padded with zeros.
    evaluations = {
        int(path.stem): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((recipe.run / "evals").glob("*.json"))
    }
    return FinishedRun(
        recipe, log.StepLog(recipe.run, "metrics.jsonl").rows(), evaluations, *counted
    )


def make_page(
    chat: FinishedRun,
    data: Path,
    timing: Timing,
    checked: Reloaded,
    searching: Sequence[report.Section],
    commands: Sequence[str],
    served: report.Text,
) -> report.Report:
    """Builds the demo's page.

    Args:
        searching: the sections about retrieval.
        commands: shell commands to continue with.
        served: the section that links its pages.
    """
    # A range over the languages, for a mean would hide the worst of them.
    exact = [chat.evaluations[chat.last][f"test-{lang}/exact"] for lang in LANGUAGES]
    # Most important first: what came out, how it learned, single answers, then how to go on.
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
                    (f"{chat.samples_per_s:,.0f}", "samples per second"),
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
            served,
            report.Text(
                title="What ran, and how to go on",
                paragraphs=[
                    "; ".join(f"{name} {took:.0f} s" for name, took in timing.seconds.items())
                    + ".",
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
    # CIDEr is scaled by 10, so its bar is full at 10.
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


def _curves(chat: FinishedRun) -> report.Charts:
    # Means, for the loss of a single step is too noisy to show a trend.
    width, losses = chat.curve("loss")
    return report.Charts(
        title="How it learned",
        charts=[
            report.Chart(
                title=f"Training loss (mean of {width} step{'s' * (width > 1)})",
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
    # Keyed by image: the languages' files have the same images in the same order.
    answers: dict[str, list[report.Answer]] = {}
    for tag in LANGUAGES:
        # The evaluator's own lines, so that the page shows what the metrics were computed on.
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
        report.Card(images=[report.Drawing(image=Path(path).read_bytes())], answers=of_image)
        for path, of_image in list(answers.items())[:count]
    ]
