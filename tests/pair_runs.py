"""A small retrieval project: images, captions, an InternVL-14B and a recipe that trains it."""

import io
from pathlib import Path

import sentencepiece
import yaml
from dual_folders import dual_folder
from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "gray", "purple", "orange")
SHAPES = ("circle", "square", "cross", "bar")
TEMPLATES = ("A {} {}.", "this image shows a {} {}")


def captions_of(color: str, shape: str) -> list[str]:
    return [template.format(color, shape) for template in TEMPLATES]


def model_folder(to: Path) -> Path:
    """The golden model with a tokenizer of the words above."""
    folder = dual_folder(to)
    words = [text for c in COLORS for s in SHAPES for text in captions_of(c, s)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*words, "summarize: English caption:"] * 4),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def draw(folder: Path) -> None:
    """Every colour with every shape, and `captions.txt` with two captions of each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,caption"]
    for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
        image = Image.new("RGB", (120, 100), "white")
        pen = ImageDraw.Draw(image)
        if shape == "circle":
            pen.ellipse((20, 10, 100, 90), fill=color)
        elif shape == "square":
            pen.rectangle((20, 10, 100, 90), fill=color)
        elif shape == "cross":
            pen.line((20, 10, 100, 90), fill=color, width=18)
            pen.line((100, 10, 20, 90), fill=color, width=18)
        else:
            pen.rectangle((10, 40, 110, 60), fill=color)
        image.save(folder / f"{number:04d}.jpg")
        lines += [f"{number:04d}.jpg,{text}" for text in captions_of(color, shape)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(folder: Path, **changes: object) -> Path:
    """Writes everything below `folder` and returns the recipe; `changes` are top-level keys."""
    draw(folder)
    if not (folder / "start").exists():
        model_folder(folder / "start")
    source = {
        "name": "shapes",
        "type": "captions",
        "annotations": str(folder / "captions.txt"),
        "images": str(folder),
    }
    tree = {
        "model": {
            "id": str(folder / "start"),
            "train": ["vision_tower", "language_model", "heads"],
        },
        "data": {"sources": [source], "tiles": {"size": 84, "max": 1}, "workers": 0},
        "objective": {"name": "retrieval"},
        "optim": {"lr": 1e-3},
        "checkpoint": {"every": 5, "keep": 2},
        "run": str(folder / "run"),
        "global_batch": 8,
        "steps": 12,
        "dtype": "float32",
        "device": "cpu",
        **changes,
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe
