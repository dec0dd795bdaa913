"""Result folders: what an evaluation leaves behind, read again for its page and for comparisons.

A result folder holds result.json (metrics), settings.json, and result/NAME.jsonl (a row for every
item) of `internvl evaluate`; a run has the same of every step below evals/. Imports no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvl.errors import ConfigError, UserError
from internvl.files import read_numbers, read_object, write_json
from internvl.report.results.items import Item, read_items

SETTINGS = "settings.json"
_AGAIN = "evaluate again"


@dataclass(frozen=True)
class Results:
    """Metrics and rows of evaluations, on disk."""

    metrics_file: Path
    metrics: Mapping[str, Mapping[str, float]]
    """Evaluation -> metric -> value."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What settings.json holds; empty for a run's own evaluations."""

    @property
    def model(self) -> str:
        """The model as it was named, or the run and step."""
        return str(self.settings.get("model") or self.metrics_file.with_suffix(""))

    @property
    def folder(self) -> Path:
        return self.metrics_file.parent

    def settings_of(self, name: str) -> dict[str, Any]:
        """Returns the settings of an evaluation, {} if none were saved."""
        return dict(self.settings.get("evaluations", {}).get(name, {}))

    def rows_file(self, name: str) -> Path:
        """Returns the path of the rows of an evaluation."""
        return self.metrics_file.with_suffix("") / f"{name}.jsonl"

    def items(self, name: str) -> list[Item]:
        """Reads the items of an evaluation.

        Raises:
            UserError: the file is missing or damaged.
        """
        return read_items(self.rows_file(name))

    def task_of(self, name: str) -> str:
        """Returns the key of a benchmark, which a recipe may call otherwise."""
        return str(self.settings_of(name).get("settings", {}).get("task", name))

    def benchmark_settings(self, name: str) -> dict[str, Any]:
        """Returns how each set of a benchmark was asked, {} for other evaluations."""
        file = self.metrics_file.with_suffix("") / f"{self.task_of(name)}_settings.json"
        return read_object(file) if file.is_file() else {}


def read(name: str | Path) -> Results:
    """Reads a result folder, a run's newest evaluations, or a file of metrics.

    Raises:
        ConfigError: there are no results, or several and the folder does not say which.
    """
    file = _metrics_file(Path(name))
    metrics: dict[str, dict[str, float]] = {}
    values = read_numbers(file, _AGAIN, text_suffix="/computed")
    for full_name, value in values.items():
        # From the right: an evaluation's name may have a slash, a metric's has none.
        evaluation, _, metric = full_name.rpartition("/")
        if metric not in ("computed", "left_out"):
            metrics.setdefault(evaluation, {})[metric] = value
    # A run's own evaluations have none: its recipe says how they were made.
    settings = file.with_name(SETTINGS)
    return Results(file, metrics, read_object(settings) if settings.is_file() else {})


def _metrics_file(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "result.json").is_file():
        return path / "result.json"
    # Names are padded with zeros: the last one is the newest step.
    steps = sorted((path / "evals").glob("*.json"))
    if steps:
        return steps[-1]
    # The folder of a model holds one for every call.
    inner = sorted(path.glob("*/result.json"))
    if len(inner) == 1:
        return inner[0]
    if inner:
        names = ", ".join(str(file.parent) for file in inner)
        raise ConfigError(f"{path} holds several results: {names}; name one")
    raise ConfigError(
        f"{path} holds no results: there is neither result.json of `internvl evaluate` nor "
        "evals/STEP.json of a run"
    )


def write_settings(
    folder: Path, model: str, facts: Mapping[str, Any], evaluations: Mapping[str, Any]
) -> None:
    """Writes settings.json beside the metrics; evaluations of earlier calls stay."""
    file = folder / SETTINGS
    earlier: dict[str, Any] = {}
    if file.is_file():
        try:
            earlier = json.loads(file.read_text(encoding="utf-8")).get("evaluations", {})
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); remove it") from None
    # The same folder may be measured key by key.
    merged = {**earlier, **evaluations}
    write_json(file, {"model": model, **facts, "evaluations": merged}, indent=1)
