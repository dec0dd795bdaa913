"""What a call leaves beside its metrics: its settings, and the page of its results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl import dist
from internvl.evals.call.jobs import Job
from internvl.evals.call.published import incomplete_set_note, published_of
from internvl.evals.scores import version
from internvl.report import results
from internvl.report.results import pages

_PACKAGES = ("internvl", "torch", "transformers")


def write(
    folder: Path,
    jobs: Mapping[str, Job],
    counts: Mapping[str, Mapping[str, int]],
    *,
    label: str,
    model: str | Path,
    computed: str,
) -> None:
    """Writes settings.json and report.html of a result folder.

    Args:
        label: of the model, for readers.
        model: whose published values stand beside the measured ones; empty for none.
    """
    metrics = results.read(folder).metrics
    evaluations = {
        name: _described(name, job, list(metrics[name]), counts[name], model)
        for name, job in jobs.items()
    }
    facts = {"computed": computed, "processes": dist.world_size()}
    facts |= {package: version(package) for package in _PACKAGES}
    results.write_settings(folder, label, facts, evaluations)
    pages.write_evaluation(results.read(folder), folder / "report.html")


def _described(
    name: str, job: Job, metrics: Sequence[str], counts: Mapping[str, int], model: str | Path
) -> dict[str, Any]:
    # Published values are of whole sets.
    model = "" if incomplete_set_note(name, counts) else model
    published = published_of(model, name, metrics) if model else {}
    before = published_of(model, name, metrics, trained=False) if model else {}
    # Not when a run measures this: here it was measured once.
    settings = {k: v for k, v in vars(job.config).items() if k not in job.config.in_training}
    return {
        "dataset": job.dataset,
        "language": job.language,
        # Paths as text, tuples as lists: as they are read again.
        "settings": json.loads(json.dumps(settings, default=str)),
        "counts": dict(counts),
        "published": published,
        "published_before": before if before != published else {},
    }
