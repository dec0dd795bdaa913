"""What a call has measured, and its tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internvl.evals.call.published import incomplete_set_note, published_of
from internvl.evals.scores import Table


@dataclass(frozen=True)
class Measured:
    """Results of `measure`."""

    metrics: dict[str, float]
    """"evaluation/metric" -> value, from 0 to 1 unless its evaluator says otherwise."""
    counts: dict[str, dict[str, int]]
    """Evaluation -> counts of what it measured, such as {"images": 1000, "texts": 5000}."""
    tables: Mapping[str, Table | None]
    """Evaluation -> how its metrics are shown; None for a line each."""
    folder: Path
    """Where the results are written."""
    computed: str = ""
    """Precision, device and attention of this evaluation. If the run computes differently, only the
    differences: "float32; inside the run: bfloat16 autocast"."""
    ranks: int = 1
    """Processes that shared the items."""


def render(
    metrics: Mapping[str, float],
    model: str | Path = "",
    counts: Mapping[str, Mapping[str, int]] | None = None,
    tables: Mapping[str, Table | None] | None = None,
) -> str:
    """Renders the metrics with the published values: a table or lines for each evaluation.

    Args:
        model: the model whose published values are shown; empty for none.
        counts: of `Measured`. A published value is shown only if as many images and texts were
            measured as the published set has; otherwise a note says so.
        tables: of `Measured`; an evaluation without one has a line for every metric.
    """
    width = max(map(len, metrics), default=0)
    # A dict as an ordered set: metrics of one evaluation share their note.
    lines, notes = [], dict[str, None]()
    by_evaluation: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        evaluation, _, metric = name.rpartition("/")
        by_evaluation.setdefault(evaluation, {})[metric] = value
    for evaluation, values in by_evaluation.items():
        references: dict[str, float] = {}
        before: dict[str, float] = {}
        if model and counts is not None:
            references = published_of(model, evaluation, values)
            before = published_of(model, evaluation, values, trained=False)
            note = incomplete_set_note(evaluation, counts[evaluation]) if references else ""
            if note:
                notes[note], references = None, {}
        # A model that was not trained further is the same before.
        before = before if references and before != references else {}
        table = (tables or {}).get(evaluation)
        if table is not None:
            measured = _listed((counts or {}).get(evaluation, {}))
            lines += [f"{evaluation}: {measured}" if measured else f"{evaluation}:"]
            lines += [f"  {line}" for line in table.render(values, references)]
            lines += ["  (in brackets: published)"] if references else []
            continue
        head = f"{'':{width}}  measured  published"
        head += "  published before training" if before else ""
        lines += [head] if references else []
        for metric, value in values.items():
            cells = [f"{f'{evaluation}/{metric}':{width}}", f"{value:8.4f}"]
            cells += [f"{references[metric]:9.4f}"] if metric in references else []
            cells += [f"{before[metric]:25.4f}"] if metric in before else []
            lines.append("  ".join(cells))
    return "\n".join([*lines, *notes])


def closing(measured: Measured) -> str:
    """Renders what was measured, how and by how many processes, and where the results are."""
    # A table's head says already what it was measured on.
    sizes = [
        f"{name}: {_listed(counts)}"
        for name, counts in measured.counts.items()
        if measured.tables.get(name) is None
    ]
    processes = f" by {measured.ranks} processes" if measured.ranks > 1 else ""
    # Nothing was computed of answers that were there.
    how = f"computed in {measured.computed}{processes}; " if measured.computed else ""
    computed = f"{how}written to {measured.folder}, its page is report.html"
    return "; ".join([*sizes, computed])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {noun}" for noun, count in counts.items())


def render_steps(measured: Mapping[int, Measured]) -> str:
    """Renders a table of metrics with a column for each step."""
    names = dict.fromkeys(name for result in measured.values() for name in result.metrics)
    heads = [f"step {step}" for step in measured]
    width, column = max(map(len, names), default=0), max(8, *map(len, heads))
    lines = ["  ".join([" " * width, *(f"{head:>{column}}" for head in heads)])]
    for name in names:
        # A step may lack a metric, such as one of answers that are all empty.
        values = (result.metrics.get(name) for result in measured.values())
        cells = (f"{'' if value is None else f'{value:.4f}':>{column}}" for value in values)
        lines.append("  ".join([f"{name:{width}}", *cells]))
    return "\n".join(lines)
