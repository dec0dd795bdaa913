"""What is made of the answers to a data set: rows, result files and summaries of the original."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePath
from typing import Any

from internvl.datasets.tasks import Dataset, Places
from internvl.evals.benchmark.readers import Item
from internvl.evals.benchmark.table import excel, read_columns, result_columns
from internvl.evals.scores import model_file


@dataclass(frozen=True)
class Outcome:
    """A question with its answer."""

    item: Item
    question: str
    """As it was asked, without the mark that a lone image gets before it."""
    answer: str
    parsed: str
    """What the entry's parser makes of the answer."""

    def __getitem__(self, name: str) -> Any:
        return self.item.fields[name]

    def get(self, name: str) -> Any:
        """Returns a field of the item, None if it has none of that name."""
        return self.item.fields.get(name)


@dataclass(frozen=True)
class Scored:
    """Scores of a data set."""

    values: Mapping[str, float]
    """Metric -> value."""
    per_question: Sequence[float | None] = ()
    """Score of every question; None for one that the metric leaves out."""
    fields: Sequence[Mapping[str, Any]] = ()
    """What a score adds to the fields of every question, for the result rows."""
    shown: Any = None
    """What the original prints as the score."""
    details: Any = None
    """A table or file of its own, in the original's form."""


@dataclass(frozen=True)
class Written:
    """Names in the result files."""

    dataset: Dataset
    places: Places
    checkpoint: str
    """The model as it was named."""
    time: datetime = field(default_factory=datetime.now)

    def name(self, template: str, **more: str) -> str:
        """Fills in the name of a result file."""
        path = PurePath(self.checkpoint)
        return template.format(
            dataset=self.dataset.name,
            time=f"{self.time:%y%m%d%H%M%S}",
            subtask=self.dataset.subtask,
            model=self.model,
            base=path.name,
            **more,
        )

    @property
    def model(self) -> str:
        """The checkpoint, as the original's files name it."""
        return model_file(self.checkpoint)


Files = dict[str, str | bytes]
"""Name of a result file -> its content."""


def result_row(outcome: Outcome, written: Written, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the original's row of a question."""
    values = {
        **outcome.item.fields,
        **extra,
        "question": outcome.question,
        "answer": outcome.answer,
        "parsed": outcome.parsed,
        "model": written.model,
        "model_name": written.checkpoint,
    }
    row: dict[str, Any] = {}
    for column, name in written.dataset.row.items():
        # MMMU-Pro, Mantis and MMHal write the row of their data set whole.
        row |= values[name] if column == "*" else {column: values[name]}
    return row


def result_files(
    outcomes: Sequence[Outcome], written: Written, scored: Scored
) -> tuple[list[dict[str, Any]], Files]:
    """Returns the original's rows and the files that its script writes."""
    dataset = written.dataset
    extra = scored.fields or [{}] * len(outcomes)
    rows = [
        result_row(outcome, written, fields)
        for outcome, fields in zip(outcomes, extra, strict=True)
    ]
    layout = dataset.layout or dataset.output.rpartition(".")[2]
    files = LAYOUTS[layout](rows, outcomes, written, scored)
    # main_eval_only.py reads MMMU's answers from this second file.
    if dataset.map_output:
        files[written.name(dataset.map_output)] = _json(_mapped(rows, outcomes, dataset), indent=4)
    return rows, files


def summary_lines(written: Written, scored: Scored) -> dict[str, str]:
    """Returns what the original appends to MODEL.txt, {} where it has no such file."""
    if not written.dataset.summary:
        return {}
    return {f"{written.model}.txt": _summary(written, scored)}


def _json(value: Any, *, indent: int | None = None, ascii_only: bool = True) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ascii_only)


def _json_lines(rows: Sequence[Any], *, ascii_only: bool = True) -> str:
    return "".join(_json(row, ascii_only=ascii_only) + "\n" for row in rows)


def _mapped(rows: Any, outcomes: Sequence[Outcome], dataset: Dataset) -> dict[str, str]:
    key, value = dataset.map_row
    return {
        outcome[key]: outcome.answer if value == "answer" else outcome.parsed
        for outcome in outcomes
    }


def _summary(written: Written, scored: Scored) -> str:
    """Returns the line of a data set, empty if it has none."""
    form = written.dataset.summary
    # ANLS, and keys that a server scores, leave an empty file in the original.
    if form == "empty" or scored.shown is None:
        return ""
    # evaluate_vqa.py writes ChartQA's line without the checkpoint.
    head = [] if form == "nameless" else [written.checkpoint]
    return f"{[*head, written.dataset.name, scored.shown]}\n"


Layout = Callable[[list[dict[str, Any]], Sequence[Outcome], Written, Scored], Files]


def _as_json(rows: Any, outcomes: Any, written: Written, scored: Scored) -> Files:
    return {written.name(written.dataset.output): _json(rows)}


def _as_lines(rows: Any, outcomes: Any, written: Written, scored: Scored) -> Files:
    return {written.name(written.dataset.output): _json_lines(rows)}


def _as_rows(rows: Any, outcomes: Any, written: Written, scored: Scored) -> Files:
    """All of a row's own columns; MMMU-Pro's in the letters of the text."""
    name = written.name(written.dataset.output)
    # Mantis and MMMU-Pro write lines and leave Chinese as it is; MMHal escapes it.
    if name.endswith(".jsonl"):
        return {name: _json_lines(rows, ascii_only=False)}
    return {name: _json(rows)}


def _as_map(rows: Any, outcomes: Sequence[Outcome], written: Written, scored: Scored) -> Files:
    name = written.name(written.dataset.output)
    return {name: _json(_mapped(rows, outcomes, written.dataset))}


def _as_outputs(rows: Any, outcomes: Any, written: Written, scored: Scored) -> Files:
    content: dict[str, Any] = {"outputs": rows}
    # Its scorer writes the results into the same file.
    if scored.details is not None:
        content = {"results": scored.details, **content}
    return {written.name(written.dataset.output): _json(content, indent=4)}


def _as_remote(rows: Any, outcomes: Any, written: Written, scored: Scored) -> Files:
    name = written.name(written.dataset.output)
    # score.py and caculate.py write into the file that they read.
    content = rows if scored.details is None else {**scored.details, "outputs": rows}
    return {name: _json(content, indent=4)}


def _as_table(rows: Any, outcomes: Sequence[Outcome], written: Written, scored: Scored) -> Files:
    dataset = written.dataset
    columns = read_columns(written.places.file("questions"))
    # By index, not by order: rows that could not be asked stay empty.
    predictions = {outcome["index"]: outcome.parsed for outcome in outcomes}
    table = result_columns(columns, predictions, dataset.drop, dataset.insert_at)
    return {written.name(dataset.output): excel(table)}


def _as_mme(rows: Any, outcomes: Sequence[Outcome], written: Written, scored: Scored) -> Files:
    lines: dict[str, str] = {}
    for outcome in outcomes:
        name = written.name(written.dataset.output, task=outcome["task"])
        # calculation.py splits at tabs and skips any other number of columns.
        columns = (outcome["image_name"], outcome.question, outcome["expected"], outcome.parsed)
        lines[name] = lines.get(name, "") + "\t".join(columns) + "\n"
    return {**lines}


def _as_mathvista(
    rows: Any, outcomes: Sequence[Outcome], written: Written, scored: Scored
) -> Files:
    name = written.name(written.dataset.output)
    extra = scored.fields or [{}] * len(outcomes)
    problems = {
        outcome["row"]["pid"]: {**outcome["row"], "response": outcome.answer, **fields}
        for outcome, fields in zip(outcomes, extra, strict=True)
    }
    files: Files = {name: _json(problems, indent=4)}
    if scored.details is not None:
        # calculate_score.py names its file after that of the answers.
        files[name.replace(".json", "_score.json")] = _json(scored.details, indent=4)
    return files


def _as_gqa(rows: Any, outcomes: Any, written: Written, scored: Scored) -> Files:
    # The form that GQA's own script reads.
    predictions = {"testdev_balanced_predictions.json": _json(scored.details)}
    return {written.name(written.dataset.output): _json(rows), **predictions}


def _as_mvbench(rows: Any, outcomes: Any, written: Written, scored: Scored) -> Files:
    name = written.name(written.dataset.output)
    return {
        name: _json(rows),
        name.replace(".json", "_result_final.json"): _json(scored.details),
    }


LAYOUTS: dict[str, Layout] = {
    "json": _as_json,
    "jsonl": _as_lines,
    "rows": _as_rows,
    "map": _as_map,
    "outputs": _as_outputs,
    "remote": _as_remote,
    "table": _as_table,
    "gqa": _as_gqa,
    "mvbench": _as_mvbench,
    "mme": _as_mme,
    "mathvista": _as_mathvista,
}
"""Form of a result file -> what writes it."""
