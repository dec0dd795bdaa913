"""Writes the recipes of the originals' second fine-tunings from one table.

    python -m internvl.zoo.second_finetunings

A new size is a row of second_finetunings.yaml, not a file written by hand.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "recipes"
_TABLE = Path(__file__).with_suffix(".yaml")
_METHODS = {"full": "projector and language model", "lora": "LoRA of rank 16"}


def render() -> Iterator[tuple[Path, str]]:
    """Yields (path below `FOLDER`, text) of every recipe in the table."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    for family, constants in table["families"].items():
        for model, size in constants["sizes"].items():
            for method in _METHODS:
                # The name of the file is the name on the command line and of the run folder.
                name = f"{model.lower().replace('-', '_')}_{method}"
                text = _recipe(name, model, method, size, constants["max_tokens"])
                yield Path(family) / f"{name}.yaml", text


def _recipe(name: str, model: str, method: str, size: dict[str, Any], max_tokens: int) -> str:
    """Renders one recipe as YAML, with its head of comments."""
    gpus, per_device, accumulated = size[method]
    differs = "recipes/README.md"
    if "shards" in size:
        differs += f"; the original shards ({size['shards']}); no key for that yet"
    # Adapters are trained without drop path in every script.
    adapted = "lora: {rank: 16}" if method == "lora" else f"drop_path: {size['drop_path']}"
    samples = "sample" if per_device == 1 else "samples"
    return f"""\
# {model}, second fine-tuning on your own conversations: {_METHODS[method]}.
# command:  internvl train {name}
# hardware: {gpus} GPUs in the original, {per_device} {samples} a device x {accumulated} accumulated
# original: {size["script"]}_dynamic_res_2nd_finetune_{method}.sh
# differs:  {differs}
model: {{id: OpenGVLab/{model}, {adapted}}}
data:
  sources:
    - {{name: custom, annotations: data/custom.jsonl, images: data/custom, insert_image_mark: true}}
  tiles: {{size: 448, min: 1, max: 6, thumbnail: true}}
  max_tokens: {max_tokens}
optim: {{lr: {_float(size["lr"])}, weight_decay: {size["weight_decay"]}, decay_vectors: true}}
run: runs/{name}
global_batch: {math.prod(size[method])}
epochs: 1
"""


def _float(value: float) -> str:
    # YAML reads `4e-05` as a text; a float needs its point.
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def write(folder: Path = FOLDER) -> None:
    """Writes every recipe of the table below `folder`."""
    for path, text in render():
        (folder / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
