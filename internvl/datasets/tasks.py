"""Benchmarks of chat models as data: the entries of tasks.yaml, and the files that they need.

Imports nothing heavy: `internvl evaluate --help` lists the keys.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from internvl.errors import ConfigError
from internvl.files import read_yaml

Marks = Literal["one", "numbered", "several", "tiles", "frames", "block", "literal"]
Budget = Literal["shared", "each", "first", "total"]


@dataclass(frozen=True)
class DataFile:
    """A file or folder of a data set."""

    path: str
    """From the working folder of the original, such as data/okvqa/okvqa_val.jsonl."""
    address: str
    """URL to fetch it from, or how to get it."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How a data set is read, asked, parsed, scored and written."""

    name: str
    """The original's name, in its result files."""
    reader: str
    """Reader of its files: a key of evals/benchmark's READERS."""
    files: Mapping[str, DataFile]
    """Role -> file."""
    folders: tuple[DataFile, ...] = ()
    """Folders of images."""
    image_root: str = ""
    """Folder that image names are relative to; empty: they begin at the working folder."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Folder -> the original's misspelt name of it, used where it alone exists."""
    questions: int | None = None
    """Questions of the whole set, on which results are published; None if not known."""
    template: str = ""
    """The question: fields of a row, and `texts` by name, in braces."""
    strip: bool = False
    """Strip the question."""
    prefix: str = ""
    """Name of the text before the question."""
    instructions: Mapping[str, str] = field(default_factory=dict)
    """Type of a question -> its instruction: the name of a text, or one itself."""
    marks: Marks = "one"
    """Where images stand: one before the question; numbered lines "Image-1: <image>" for several
    (`numbered` has <image> for one, `several` nothing); `tiles`: lines if there is more than one
    tile; `frames`: "Frame1: <image>"; `block`: all tiles as one image; `literal`: likewise, and
    <image> in the question is a word."""
    tiles: int = 6
    """Most tiles of an image for models that tile: those of the published score, or the original
    script's default."""
    tiles_of: Mapping[str, int] = field(default_factory=dict)
    """Released model -> its number if that differs."""
    budget: Budget = "shared"
    """How several images share the tiles: `tiles` divided by their count; `each` as many; the
    `first` as many and the others one; `total`: as `each`, at most 64 in all."""
    enlarge_first: bool = False
    """Double the size of the first image where images are tiled; without tiling show it alone."""
    segments: int = 0
    """Frames of a video."""
    max_new_tokens: int
    min_new_tokens: int = 1
    top_k: int = 50
    top_p: float = 1.0
    parse: str = ""
    """What is made of an answer: a key of PARSERS; empty: nothing."""
    row: Mapping[str, str] = field(default_factory=dict)
    """Column of the original's result rows -> a field, `question`, `answer` or `parsed`; "*" takes
    all of a field's own keys."""
    layout: str = ""
    """Form of the result file: a key of LAYOUTS; empty: by the ending of `output`."""
    output: str = "{dataset}_{time}.json"
    """Name of the result file; {model} is the last two parts of the checkpoint's path, {base} the
    last one."""
    map_output: str = ""
    """A second file of {id: answer}."""
    map_row: tuple[str, ...] = ()
    """The two fields of such a file."""
    summary: Literal["", "line", "nameless", "empty"] = ""
    """What the original appends to MODEL.txt: the score's line with or without the checkpoint's
    name, or nothing; "": no such file."""
    drop: tuple[str, ...] = ()
    """Columns that a result table leaves out."""
    insert_at: int = 0
    """Position of the predictions in it."""
    score: str = ""
    """How rows are scored: a key of SCORES; empty: they are only written."""
    judge: str = ""
    """Rubric of the judge: a key of JUDGED; empty: none."""
    submit: str = ""
    """Where the result file is scored."""
    split: str = ""
    config: str = ""
    subtask: str = ""
    ours: bool = False
    """The original names this key but lacks its script."""
    corrected: Mapping[str, Any] = field(default_factory=dict)
    """Fields that mend the original's mistakes."""
    cot: Mapping[str, Any] = field(default_factory=dict)
    """Fields with --cot: reasoning before the answer."""

    def replaced(self, fields: Mapping[str, Any]) -> "Dataset":
        """Returns this entry with other values of some fields."""
        return dataclasses.replace(self, **fields)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A key of `internvl evaluate`."""

    name: str
    about: str
    sets: Mapping[str, Dataset] = field(default_factory=dict)
    """Prefix of its metrics -> data set; the prefix of a lone one is empty."""
    keys: tuple[str, ...] = ()
    """Keys that this one stands for."""
    mean: str = ""
    """Metric whose mean over the sets is given too."""


@cache  # not when imported: only what names a benchmark needs it
def _entries() -> tuple[dict[str, str], dict[str, Task]]:
    """Reads tasks.yaml: (texts, tasks)."""
    tree = read_yaml(Path(__file__).with_suffix(".yaml"))
    sets = {name: _dataset(name, row, tree["addresses"]) for name, row in tree["datasets"].items()}
    tasks = {}
    for name, row in tree["keys"].items():
        names = {"": row["set"]} if "set" in row else row.get("sets", {})
        tasks[name] = Task(
            name=name,
            about=row["about"],
            sets={prefix: sets[dataset] for prefix, dataset in names.items()},
            keys=tuple(row.get("keys", ())),
            mean=row.get("mean", ""),
        )
    return tree["texts"], tasks


def _dataset(name: str, row: Mapping[str, Any], addresses: Mapping[str, str]) -> Dataset:
    def file(entry: list[str]) -> DataFile:
        path, address = entry
        return DataFile(path, address.format_map(addresses))

    # YAML has lists where the fields are tuples.
    values: dict[str, Any]
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
    values["files"] = {role: file(entry) for role, entry in row["files"].items()}
    values["folders"] = tuple(map(file, row.get("folders", ())))
    return Dataset(name=name, **values)


def tasks() -> Mapping[str, Task]:
    """Returns every key by name."""
    return _entries()[1]


def texts() -> Mapping[str, str]:
    """Returns the texts that templates name."""
    return _entries()[0]


def find(name: str) -> Task | None:
    """Returns the task of a key, None if there is none. The original spells one with an em dash."""
    return tasks().get(name.replace("—", "-"))


def fetching(name: str, root: Path) -> str:
    """Returns which command fetches a data set to the `data` folder below `root`."""
    words = ["internvl", "data", "prepare", name, "--download"]
    # The working directory is the default.
    words += [] if root == Path() else ["--root", str(root)]
    return f"`{shlex.join(words)}` fetches what can be fetched"


@dataclass(frozen=True)
class Places:
    """Where the files of a data set are."""

    root: Path
    """Folder of the published sets, usually data."""
    dataset: Dataset = field(repr=False)

    def path(self, name: str) -> Path:
        """Returns the path of a file that is named from the original's working folder."""
        for right, misspelt in self.dataset.renamed.items():
            other = self._resolved(name.replace(right, misspelt, 1))
            # A file that is missing altogether is named as it should be.
            if name.startswith(right) and not self._resolved(name).exists() and other.exists():
                return other
        return self._resolved(name)

    def _resolved(self, name: str) -> Path:
        inside = name.removeprefix("./").removeprefix("data/")
        # A root called otherwise still is what the original calls data.
        is_data = inside != name.removeprefix("./")
        return self.root / inside if is_data else self.root.parent / name.removeprefix("./")

    def file(self, role: str) -> Path:
        """Returns the path of the file with a role."""
        return self.path(self.dataset.files[role].path)

    def image(self, name: str) -> str:
        """Returns the path of an image of the annotations."""
        root = self.dataset.image_root
        return str(self.path(f"{root}/{name}" if root else name))

    def missing(self) -> list[str]:
        """Lists the files that do not exist, each with its address."""
        return [
            f"{self.file(role)}: from {file.address}"
            for role, file in self.dataset.files.items()
            if not self.file(role).exists()
        ]

    def check(self) -> None:
        """Raises ConfigError with every missing file and its address."""
        missing = self.missing()
        if missing:
            noun = "file or folder is" if len(missing) == 1 else "files or folders are"
            head = f"{self.dataset.name}: {len(missing)} {noun} missing"
            # A root called otherwise is none that the command fills.
            if self.root.name == "data":
                head += f"; {fetching('KEY', self.root.parent)}; KEY is the benchmark's name"
            raise ConfigError("\n".join([head, *missing]))
