"""One rank of many on one GPU, as `internvl check --rehearse`: memory and time beside the plan.

    python benchmarks/rehearse.py --to benchmarks/results/rehearse_h200.json    # all rows, an H200
    python benchmarks/rehearse.py --gpus 0,1                  # rows side by side on two GPUs
    python benchmarks/rehearse.py 40b_full_8 40b_full_32      # some
    python benchmarks/rehearse.py --tiny                      # narrow models on a CPU

Folders hold the released configurations and tokenizers of words, no weights: InternVL-Chat-V1-2 is
put together from its parts. Its samples have one tile and 2,048, 1,000 or 700 tokens, as many as
fill a row of a rank; three fifths of the text are supervised. 76B draws `workloads.mixture`,
InternVL-14B captions of COCO's lengths.

`tokens_per_s` is of a rank, messages left out; `share` is of needed FLOPs over the rate of an 8192³
product of the same process. `hours` are those of the 1,267,819 samples of the mixture at this
length, if all messages hide behind the computation; `hours_waiting` if none does, at the plan's
rates. `graphs` are those compiled until then: a few, however many blocks there are.

A row that is cut off prints its phases and their seconds; the one after the last took too long.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import dual
import rows as table
import torch
import workloads
from torch._dynamo.utils import counters

from internvl import log, zoo
from internvl.check import rehearse
from internvl.config import Recipe, recipes
from internvl.data.tokenizers import SPECIAL_TOKENS
from internvl.inference import load as loading
from internvl.inference.families import FAMILIES
from internvl.inference.opened import open_start
from internvl.zoo import gpus

RECIPES = Path(__file__).parent.parent / "recipes"
SAMPLES = 1_267_819
"""Of the mixture of InternVL-Chat-V1-2."""
SUPERVISED = 0.6


@dataclass(frozen=True)
class Row:
    """A recipe as one rank of many."""

    model: str
    recipe: str
    num_gpus: int
    row_tokens: int = 0
    """Of samples of one length, a row a rank."""


_V12 = "internvl_chat_v1_2/internvl_chat_v1_2_sft"
_14B = "internvl_14b/internvl_14b"
ROWS = {
    "40b_full_8": Row("InternVL-Chat-V1-2", f"{_V12}_32gpus", 8, row_tokens=16384),
    "40b_full_32": Row("InternVL-Chat-V1-2", f"{_V12}_32gpus", 32, row_tokens=16384),
    "14b_full_32": Row("InternVL-14B-224px", f"{_14B}_full_flickr30k", 32),
    "14b_head_4": Row("InternVL-14B-224px", f"{_14B}_head_flickr30k", 4),
    "14b_lora_4": Row("InternVL-14B-224px", f"{_14B}_lora_flickr30k", 4),
    "76b_lora_8": Row("InternVL2-Llama3-76B", "internvl2/internvl2_llama3_76b_lora", 8),
    # As the recipe has it, for samples of some 1,000 tokens; with a rank's eight longest in a row.
    "40b_full_64": Row("InternVL-Chat-V1-2", _V12, 64, row_tokens=8192),
    "40b_full_64_long": Row("InternVL-Chat-V1-2", _V12, 64, row_tokens=16384),
}
LENGTHS = (2048, 1000, 700)


def measure(name: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rehearses a row; yields its figures, those of one length more each time."""
    row, device = ROWS[name], torch.device("cpu" if tiny else "cuda")
    log.setup()
    ceiling = workloads.matmul_tflops(device)
    log.get_logger().info("%s: products reach %.4g TFLOP/s", name, ceiling)
    figures: dict[str, Any] = {
        "row": name,
        "model": row.model,
        "recipe": row.recipe,
        "num_gpus": row.num_gpus,
        "device": "CPU" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": table.commit(),
        "ceiling_tflops": ceiling,
    }
    rank = None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for recipe, length in cases(row, Path(folder), tiny):
            if length:
                log.get_logger().info("%s: samples of %d tokens", name, length)
            num_steps = 2
            if rank is None:
                # A step of 40B takes 8 s: the sooner there are figures of the first length.
                num_steps = 3 if row.row_tokens else 4
                # Cut and compiled once: rows of all lengths run the same code.
                rank = stack.enter_context(rehearse.standing_in(recipe, row.num_gpus))
            done = rank.rehearse(recipe, gpus.find("h200"), steps=num_steps)
            taken = report(done, ceiling, length)
            taken["graphs"] = counters["stats"]["unique_graphs"]
            figures |= {str(length): taken} if length else taken
            print(done.render(), file=sys.stderr, flush=True)
            yield table.rounded(figures)


def report(done: rehearse.Rehearsal, ceiling: float, length: int) -> dict[str, Any]:
    """What a rank took, for samples of `length` tokens or of any (0)."""
    assert done.plan is not None
    tflops = done.needed_flops / done.step_s / 1e12
    messages_s = sum(message.seconds for message in done.plan.messages)
    planned, allocated = done.plan.memory.allocated_gib, done.peak_bytes / 2**30
    samples = sum(batch.num_samples for batch in done.batches)
    figures = {
        "samples": samples,
        "rows": len(done.batches),
        "tokens": done.tokens,
        "tiles": sum(batch.num_tiles for batch in done.batches),
        "first_step_s": done.first_step_s,
        "step_s": done.step_s,
        "planned_step_s": done.plan.step_s,
        "messages_s": messages_s,
        "tokens_per_s": done.tokens / done.step_s,
        "samples_per_s": samples / done.step_s,
        "needed_tflops": tflops,
        "share": tflops / ceiling,
        "allocated_gib": allocated,
        "reserved_gib": done.reserved_bytes / 2**30,
        "planned_gib": planned,
        "plan_error": planned / allocated - 1,
    }
    if length:
        hours = SAMPLES / samples / done.num_gpus / 3600
        figures["hours"] = hours * done.step_s
        figures["hours_waiting"] = hours * (done.step_s + messages_s)
    return figures


def cases(row: Row, folder: Path, tiny: bool) -> Iterator[tuple[Recipe, int]]:
    """Recipes of a row, each with data of its own, and the tokens of their samples (0: any)."""
    keys: dict[str, Any] = {"device": "cpu" if tiny else "cuda", "run": str(folder / "run")}
    keys |= {"evals": {}, "data.workers": 0}
    batch = 2 * row.num_gpus
    if tiny:
        keys |= {"data.tiles.size": 56, "dtype": "float32", "global_batch": batch}
    if row.row_tokens:
        keys |= {"data.row_tokens": 256 if tiny else row.row_tokens}
        keys |= {"data.max_tokens": 128} if tiny else {}
    keys |= write_model(row, folder, tiny)
    file = RECIPES / f"{row.recipe}.yaml"

    def load(**more: Any) -> Recipe:
        changes = [f"{key}={json.dumps(value)}" for key, value in {**keys, **more}.items()]
        return recipes.load_recipe(file, changes)

    recipe = load()
    batch = recipe.batch_samples
    if row.model.startswith("InternVL-14B"):
        yield load(**{"data.sources": [dual.write_pairs(folder, batch)]}), 0
        return
    start = open_start(recipe)
    encoder = FAMILIES[start.files.family].encoder(start, loading.complete(recipe, start).recipe)
    if not row.row_tokens:
        drawn = list(islice(workloads.mixture(0, recipe.data.max_tokens), batch))
        yield load(**{"data.sources": workloads.write(folder, drawn, encoder)}), 0
        return
    for length in (96, 48) if tiny else LENGTHS:
        count = row.num_gpus * (recipe.data.row_tokens // length)
        source = write_chat(folder, count, length, encoder)
        yield load(**{"data.sources": [source], "global_batch": count}), length


def write_model(row: Row, folder: Path, tiny: bool) -> dict[str, str]:
    """Configuration and tokenizer of a released model, or of its parts; the recipe's keys."""
    official = zoo.official_config(zoo.find(row.model))
    is_dual = row.model.startswith("InternVL-14B")
    if tiny:
        official = dual.shrunk(official) if is_dual else workloads._shrunk(official, 16)
    text = official["qllama_config" if is_dual else "llm_config"]
    if tiny:
        text |= {"num_key_value_heads": 2}
    if not row.row_tokens:
        words = (dual.tokenizer if is_dual else workloads._tokenizer)(text["vocab_size"])
        write_folder(folder / "model", official)
        words.save_pretrained(folder / "model")
        return {"model.id": str(folder / "model")}
    write_folder(folder / "vision", official["vision_config"])
    write_folder(folder / "language", text)
    # Parts have an embedding for each token of the tokenizer, no more, and three marks are there.
    vocabulary = text["vocab_size"] - len(SPECIAL_TOKENS) + 3
    workloads._tokenizer(vocabulary, vocabulary - 5).save_pretrained(folder / "language")
    (folder / "projector.pth").touch()
    names = {"vision": "vision", "language": "language", "projector": "projector.pth"}
    return {f"model.{key}": str(folder / name) for key, name in names.items()}


def write_folder(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_chat(folder: Path, count: int, length: int, encoder: Any) -> dict[str, Any]:
    """Samples of a tile and text, `length` tokens each; the recipe's source."""
    images, rng, lines = folder / f"of_{length}", random.Random(0), []
    images.mkdir()
    workloads.picture((448, 448), 0).save(images / "0.jpg", quality=90)
    fixed = workloads._fixed_tokens(encoder) + encoder.tokens_per_tile
    answer = int(SUPERVISED * (length - fixed))
    for index in range(1, count + 1):
        os.link(images / "0.jpg", images / f"{index}.jpg")  # of one name they would share a prefix
        turns = [length - fixed - answer, answer - 1]
        question, reply = (workloads.some_words(rng, max(1, words)) for words in turns)
        talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        lines.append(json.dumps({"image": f"{index}.jpg", "conversations": talk}))
    (images / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"name": "drawn", "annotations": str(images / "chat.jsonl"), "images": str(images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--gpus", default="", help="indices of those that take rows, as 0,1")
    parser.add_argument("--row-s", type=float, default=200, help="limit of a row")
    parser.add_argument("--budget-s", type=float, default=480)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.one is not None:
        for figures in measure(options.one, options.tiny):
            print(json.dumps(figures), flush=True)
        return
    names = options.names or list(ROWS)
    table.run(
        __file__,
        names,
        options,
        limit_s=options.row_s,
        gpus=options.gpus.split(",") if options.gpus else (),
    )


if __name__ == "__main__":
    main()
