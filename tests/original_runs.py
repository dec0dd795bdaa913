"""Runs of the original's scripts, and a model that answers as theirs and records its questions."""

import json
import shutil
import tarfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from internvl.config import TilesConfig
from internvl.data.images import STATISTICS
from internvl.inference.chat import Chat
from internvl.models.vision import normalize_tiles

ARCHIVES = Path(__file__).parent / "golden"
SCRIPT_TILES = {
    "vqa-mpdocvqa-val": 18,
    "vqa-mpdocvqa-test": 18,
    "mmiu": 12,
    "drivelm": 12,
    "mvbench": 1,
}
"""Key -> the most tiles of its script with --dynamic alone; 6 for others."""
HUB = {
    "MMMU/MMMU": "data/MMMU",
    "MMMU/MMMU_Pro": "data/MMMU_Pro",
    "AI4Math/MathVista": "data/MathVista",
    "TIGER-Lab/Mantis-Eval": "data/mantis_eval",
}
"""Data set of the hub -> where its files are for us."""
MMMU_ANSWERS = {
    "validation_Accounting_1": ("multiple-choice", "B"),
    "validation_Accounting_2": ("multiple-choice", "C"),
    "validation_Art_1": ("multiple-choice", "C"),
    "validation_Clinical_Medicine_1": ("multiple-choice", "A"),
    "validation_Psychology_1": ("multiple-choice", "A"),
}
"""Five lines of the official key."""


@cache
def unpacked(name: str) -> Path:
    """A golden archive, unpacked once a process."""
    folder = Path(mkdtemp(prefix="golden-"))
    with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def keys() -> list[str]:
    return sorted(path.parent.name for path in unpacked("eval_prompts").glob("*/expected.json"))


def expected(key: str) -> dict[str, Any]:
    return json.loads((unpacked("eval_prompts") / key / "expected.json").read_text("utf-8"))


def lay_out(key: str, folder: Path) -> Path:
    """Copies a key's files as the original's working folder; returns its folder data."""
    shutil.copytree(unpacked("eval_prompts") / key, folder, dirs_exist_ok=True)
    for name, target in HUB.items():
        source = folder / "hub" / name
        for file in source.rglob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            new = folder / target / file.relative_to(source)
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_text("".join(json.dumps(_with_paths(r, folder)) + "\n" for r in rows))
    if key.startswith("mmmu-val"):
        answers = {i: {"question_type": t, "ground_truth": a} for i, (t, a) in MMMU_ANSWERS.items()}
        file = folder / "eval/mmmu/answer_dict_val.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(answers))
    return folder / "data"


def _with_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        if "__image__" in value:
            return str(folder / value["__image__"])
        return {k: _with_paths(v, folder) for k, v in value.items()}
    return [_with_paths(v, folder) for v in value] if isinstance(value, list) else value


@dataclass
class Call:
    """A question as a model got it."""

    text: str
    blocks: list[torch.Tensor]
    settings: dict[str, Any]

    @property
    def means(self) -> list[float]:
        if not self.blocks:
            return []
        tiles = normalize_tiles(torch.cat(self.blocks), torch.float32, *STATISTICS["imagenet"])
        return tiles.mean(dim=(1, 2, 3)).tolist()


@dataclass(frozen=True, repr=False)
class Recorder(Chat):
    """A chat model that gives canned answers."""

    answers: tuple[str, ...] = ()
    calls: list[Call] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def answer(self, requests, *, batch_size=16, **settings):
        start = len(self.calls)
        for request in requests:
            last = request.messages[-1]
            text = last["content"] if isinstance(last, dict) else last.content
            self.calls.append(Call(text, list(request.images), settings))
            self.requests.append(request)
        return [self.answers[start + n] for n in range(len(requests))]


def recorder(chat: Chat, model: dict[str, Any], answers: list[str]) -> Recorder:
    """A model of a run: its tile size and thumbnail, and the answers that it gave."""
    size = model.get("force_image_size") or model.get("vision_config", {}).get("image_size")
    thumbnail = model.get("use_thumbnail", True)
    tiles = TilesConfig(size=size or model["image_size"], min=1, max=12, thumbnail=thumbnail)
    folder = Path(model["checkpoint_argument"])
    return Recorder(chat.model, chat.tokenizer, chat.template, tiles, None, folder, tuple(answers))


def tiles_of(key: str, flags: list[str]) -> str | int:
    if "--dynamic" not in flags:
        return "one"
    return int(flag(flags, "--max-num", str(SCRIPT_TILES.get(key, 6))))


def flag(flags: list[str], name: str, default: str) -> str:
    return flags[flags.index(name) + 1] if name in flags else default
