"""Small images, annotation files and recipes for the tests of data."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from chat_folders import add_tokenizer, golden_folder
from PIL import Image

from internvl.config import Recipe, recipes

SHARED = Path(os.environ.get("INTERNVL_SHARED", Path(__file__).parents[2] / "shared"))


def picture(path: Path, size: tuple[int, int] = (120, 80), color: str = "red", **form: Any) -> Path:
    """An image with a gradient, so that no two tiles are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.linear_gradient("L").resize(size)
    Image.merge("RGB", (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image)).save(
        path, **form
    )
    return path


def turns(*texts: str) -> list[dict[str, str]]:
    """Questions and answers in the official form, a question first."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def chat_line(*texts: str, **keys: Any) -> dict[str, Any]:
    return {**keys, "conversations": turns(*texts)}


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSONL; a row that is bytes is written as it is."""
    lines = [
        r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def model_folder(folder: Path, template: str = "internvl2_5", name: str = "qwen2") -> Path:
    """A golden model with its tokenizer, of 84-pixel tiles and 9 visual tokens a tile."""
    golden_folder(f"chat_{name}", "v2.sel-1", folder)
    add_tokenizer(folder, name)
    tree = json.loads((folder / "config.json").read_text()) | {"template": template}
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def recipe(
    model: Path, annotations: Path, images: Path, run: Path, *overrides: str, **data: Any
) -> Recipe:
    """A small recipe of one source; `data` overrides keys of its data section."""
    source = {"name": "chat", "annotations": str(annotations), "images": str(images)}
    tree = {
        "model": {"id": str(model)},
        "data": {
            "sources": [source],
            "tiles": {"size": 84, "max": 6},
            "max_tokens": 512,
            "max_tiles": 16,
            "workers": 0,
            **data,
        },
        "run": str(run),
        "global_batch": 4,
        "epochs": 1,
        "dtype": "float32",
        "device": "cpu",
    }
    return recipes.resolve(tree, overrides)
