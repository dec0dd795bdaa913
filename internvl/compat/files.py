"""Every shell file of the original by its path there, and what this package answers to it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from internvl.compat import benchmark, scripts
from internvl.compat.translation import Translation
from internvl.config import released
from internvl.errors import ConfigError
from internvl.files import read_yaml

EVALUATIONS = ("internvl_chat/evaluate.sh", "internvl_g/evaluate.sh")
_BENCHMARKS = "clip_benchmark"
_UNPUBLISHED = "/habitat_2b_finetune/"
"""Folder of a script that a guide names and nobody has published."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What becomes of a shell file of the original."""

    path: str
    """Below the original."""
    outcome: Literal["works", "translated", "refused"]
    """translated: with differences, which its recipe's head and `internvl compat` name."""
    text: str
    """The command here, or the reason."""


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = read_yaml(Path(__file__).with_suffix(".yaml"))
    return table


@cache
def refused() -> dict[str, str]:
    """Returns the files without a counterpart: path below the original -> reason."""
    return {
        f"{file}.sh": group["reason"] for group in _table()["refused"] for file in group["files"]
    }


@cache
def paths() -> tuple[str, ...]:
    """Returns all shell files of the original, sorted."""
    trained = (path for path in scripts.paths() if _UNPUBLISHED not in path)
    return tuple(sorted({*trained, *EVALUATIONS, *benchmarks(), *refused()}))


def benchmarks() -> tuple[str, ...]:
    """Returns the files that run CLIP_benchmark."""
    return tuple(f"{_BENCHMARKS}/{name}.sh" for name in _table()["benchmarks"]["files"])


def locate(script: str, folder: Path) -> str | None:
    """Returns the path below the original of one of `paths`, as `scripts.locate` does."""
    # Training scripts first, the unpublished one included.
    return scripts.locate(script, folder, (*scripts.paths(), *paths()))


def lines(path: str) -> Iterator[list[str]]:
    """Yields the words after `clip_benchmark` of each line of a file of `benchmarks`."""
    file = _table()["benchmarks"]["files"][Path(path).stem]
    for language, dataset, root, *more in file["lines"]:
        # A file of two trainings names them line by line.
        model, pretrained = more or (file["model"].format(file["task"]), file["pretrained"])
        yield [
            *("eval", "--model_type", "internvl", "--language", language),
            *("--task", f"zeroshot_{file['task']}", "--dataset", dataset),
            *("--dataset_root", f"./data/{root}", "--model", model),
            *("--pretrained", pretrained, "--output", file["output"]),
        ]


def translate(path: str, environment: Mapping[str, str]) -> Translation:
    """Translates a file of `benchmarks`, one command after the other.

    Raises:
        ConfigError: as `benchmark.translate`; another file that has no counterpart.
    """
    if path in refused():
        raise ConfigError(f"{path}: {refused()[path]}")
    translations = [benchmark.translate(words, environment) for words in lines(path)]
    # There each line is a job of its own on the authors' cluster.
    return Translation(
        commands=tuple(command for line in translations for command in line.commands),
        notes=tuple(dict.fromkeys(note for line in translations for note in line.notes)),
    )


def answer(path: str) -> Answer:
    """Returns what this package answers to a file of `paths`."""
    # First: a training script whose model does not train is refused too.
    if path in refused():
        return Answer(path=path, outcome="refused", text=refused()[path])
    # The checkpoint decides whether it is a chat model or InternVL-14B.
    if path in EVALUATIONS:
        return Answer(path=path, outcome="works", text="internvl compat evaluate.sh CHECKPOINT KEY")
    if path in benchmarks():
        return Answer(path=path, outcome="works", text=f"internvl compat shell {path}")
    recipe = released.scripts()[Path(path).stem]
    return Answer(path=path, outcome="translated", text=f"internvl train {recipe}")
