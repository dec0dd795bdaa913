"""A whole project in a folder: images, annotations, a small model and a recipe that trains it."""

import json
import sys
import time
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

from internvl import demo, log
from internvl.config import recipes

COLORS = ("red", "green", "blue", "gray", "purple", "orange", "black", "yellow")
SHAPES = ("circle", "square", "cross")


def make(folder: Path, *, size: demo.ChatSize = demo.CHAT_SIZE, **changes: object) -> Path:
    """Writes everything below `folder` and returns the recipe; `changes` are top-level keys."""
    folder.mkdir(parents=True, exist_ok=True)
    _draw(folder)
    if not (folder / "start").exists():
        demo.start_model(folder, folder / "start", size)
    tree = {
        "model": {
            "id": str(folder / "start"),
            "train": ["vision_tower", "multi_modal_projector", "language_model"],
        },
        "data": {
            "sources": [
                {
                    "name": "shapes",
                    "annotations": str(folder / "train.jsonl"),
                    "images": str(folder),
                }
            ],
            "tiles": {"size": 64, "max": 1, "thumbnail": False},
            "max_tokens": 256,
            "workers": 0,
        },
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


def _draw(folder: Path) -> None:
    """Every colour with every shape, named in two ways, in chat and COCO caption form."""
    lines, images, annotations = [], [], []
    for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
        path = f"{color}-{shape}.png"
        image = Image.new("RGB", (64, 64), "white")
        pen = ImageDraw.Draw(image)
        if shape == "circle":
            pen.ellipse((10, 10, 54, 54), fill=color)
        elif shape == "square":
            pen.rectangle((10, 10, 54, 54), fill=color)
        else:
            pen.line((10, 10, 54, 54), fill=color, width=9)
            pen.line((54, 10, 10, 54), fill=color, width=9)
        image.save(folder / path)
        for question, answer in (
            ("What is this?", f"{color} {shape}"),
            ("Which color?", color),
        ):
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ]
            lines.append(json.dumps({"image": path, "conversations": turns}))
        images.append({"id": number, "file_name": path, "width": 64, "height": 64})
        annotations.append({"id": number, "image_id": number, "caption": f"{color} {shape}"})
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tree = {"images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(tree), encoding="utf-8")


def recipe_of(project, tmp_path, *overrides):
    """The recipe `project`, to be run in `tmp_path`."""
    return recipes.load_recipe(project, [f"run={tmp_path / 'run'}", *overrides])


def command(project, folder, *overrides):
    """Words of the command line that trains in `folder`."""
    return [sys.executable, "-m", "internvl", "train", str(project), f"run={folder}", *overrides]


def losses(folder):
    """Step -> (loss, norm of the gradient) of the run in `folder`."""
    return {
        row["step"]: (row["loss"], row["grad_norm"])
        for row in log.StepLog(folder, "metrics.jsonl").rows()
    }


def wait_for_step(folder, step, process):
    """Returns once metrics.jsonl has reached `step`; a process that ended before is an error."""
    while process.poll() is None:
        if max(losses(folder), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")
