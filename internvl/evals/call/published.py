"""Published values of what was measured, where the model and the set are theirs."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from internvl import zoo
from internvl.datasets import labelled
from internvl.datasets import published as published_sets
from internvl.datasets import tasks as benchmarks
from internvl.errors import UnknownModel
from internvl.inference.opened import find_run

_IN_POINTS = ("average_length", "perception", "cognition", "overall", "score")
"""Metrics that are no shares of 1."""
_DIRECTIONS = {"image_retrieval": "t2i", "text_retrieval": "i2t"}
"""CLIP_benchmark's name of a retrieval direction -> the papers' name."""


def published(model: str | Path, name: str, *, trained: bool = True) -> float | None:
    """Returns the published value of metric `name` of `run`, on the same scale, or None.

    Only for an unchanged released model (its hub id, or a folder of the same name), and for a run
    folder with the name of a published training.

    Args:
        trained: False returns that of the released model before such a training.
    """
    run = find_run(model)
    training = (str(model), "") if run is None else zoo.training(run.folder.resolve().name)
    if training is None:
        return None
    base, recipe = training if trained else (training[0], "")
    try:
        released = zoo.find(base)
    except UnknownModel:
        return None
    evaluation, _, metric = name.partition("/")
    task, language = _task_of(evaluation)
    # zoo/ has the numbers as printed: percent but for chat captions, which are fractions.
    percent = released.family == "dual" or benchmarks.find(task) is not None
    mode = "g" if released.family == "dual" else "chat"
    # Scores after re-ranking (ITM) are not published.
    if metric[:2] in ("c_", "g_") and "_itm_" not in metric:
        mode, metric = metric[0], metric[2:]
        for benchmark_name, paper_name in _DIRECTIONS.items():
            metric = metric.replace(benchmark_name, paper_name)
    for score in zoo.scores(released.name):
        # A score with a recipe is of the model after fine-tuning.
        if (score.task, score.metric, score.mode) != (task, metric, mode) or score.recipe != recipe:
            continue
        if score.language == language:
            return score.value / 100 if percent and metric not in _IN_POINTS else score.value
    return None


def published_of(
    model: str | Path, evaluation: str, metrics: Iterable[str], *, trained: bool = True
) -> dict[str, float]:
    """Returns metric -> `published`, of those that have it."""
    pairs = ((m, published(model, f"{evaluation}/{m}", trained=trained)) for m in metrics)
    return {metric: value for metric, value in pairs if value is not None}


def _task_of(evaluation: str) -> tuple[str, str]:
    """Returns (task, language) of an evaluation, as zoo/ names them."""
    # CLIP_benchmark, whose names we keep, writes Chinese "cn", and XTD "zh".
    for name in ("retrieval-flickr30k", "retrieval-coco"):
        if evaluation == f"{name}-cn":
            return name, "zh"
    if evaluation.startswith("retrieval-xtd-"):
        return "retrieval-xtd", evaluation.removeprefix("retrieval-xtd-")
    classification = labelled.find_evaluation(evaluation)
    if classification is not None:
        entry, language = classification
        return entry.name, "zh" if language == "cn" else language
    return evaluation, "en"


def incomplete_set_note(evaluation: str, counts: Mapping[str, int]) -> str:
    """Returns a note if the measured set is not the whole published one, else an empty text."""
    benchmark = benchmarks.find(evaluation)
    if benchmark is not None:
        sizes = [dataset.questions for dataset in benchmark.sets.values()]
        questions = sum(size for size in sizes if size is not None)
        if None in sizes or questions == counts.get("questions"):
            return ""
        return (
            f"{evaluation}: published values are for {questions:,} questions; this set has "
            f"{counts.get('questions', 0):,}"
        )
    classification = labelled.find_evaluation(evaluation)
    if classification is not None:
        images, classes = classification[0].images, classification[0].classes
        if (counts.get("images"), counts.get("classes")) == (images, classes):
            return ""
        shown = ", ".join(f"{count:,} {noun}" for noun, count in counts.items())
        return (
            f"{evaluation}: published values are for {images:,} images of {classes:,} classes; "
            f"this set has {shown}"
        )
    task = published_sets.published_set(evaluation)
    if task is None:
        return ""
    whole = f"{task.num_images:,} images and {task.num_texts:,} texts"
    measured = " and ".join(f"{count:,} {noun}" for noun, count in counts.items())
    if measured == whole:
        return ""
    return f"{evaluation}: published values are for {whole}; this set has {measured}"
