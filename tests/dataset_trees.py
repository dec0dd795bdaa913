"""Files of data sets as small as they can be, and what a preparation of them lacks."""

import json
from pathlib import Path
from typing import Any

from internvl.datasets import prepare


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        write(root / name, "")


def chat(image: str | None) -> str:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    row = {"id": 0, "conversations": turns} | ({"image": image} if image else {})
    return json.dumps(row) + "\n"


def missing(prepared: prepare.Prepared) -> list[str]:
    return [path.path.name for path in prepared.missing]
