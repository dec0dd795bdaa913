"""One rank of many on one GPU, as `internvl check --rehearse`: memory and time beside the plan.

    python benchmarks/rehearse.py --to benchmarks/results/rehearse_h200.json    # all rows, an H200
    python benchmarks/rehearse.py 40b_full_8 40b_full_32                        # some
    python benchmarks/rehearse.py --tiny                      # narrow models on a CPU

Folders hold the released configuration and a tokenizer of words, no weights; samples are drawn: a
tile and texts of 50 to 1,700 tokens for chat models (`balance.one_tile`), captions of COCO's
lengths for InternVL-14B. `tokens_per_s` is of a rank, messages left out; `share` is of needed FLOPs
over the rate of an 8192³ product of the same process.
"""

import argparse
import json
import os
import random
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import balance
import dual
import rows as table
import torch
import workloads

from internvl import zoo
from internvl.check import rehearse
from internvl.config import recipes
from internvl.zoo import gpus

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Row:
    """A recipe as one rank of many."""

    model: str
    recipe: str
    num_gpus: int
    changes: tuple[str, ...] = ()


_V12 = "internvl_chat_v1_2/internvl_chat_v1_2_sft"
_14B = "internvl_14b/internvl_14b"
ROWS = {
    "40b_full_8": Row("InternVL-Chat-V1-2", _V12, 8, ("global_batch=64", "data.row_tokens=16384")),
    "40b_full_32": Row("InternVL-Chat-V1-2", f"{_V12}_32gpus", 32),
    "40b_full_64": Row("InternVL-Chat-V1-2", _V12, 64),
    "76b_lora_8": Row("InternVL2-Llama3-76B", "internvl2/internvl2_llama3_76b_lora", 8),
    "14b_full_32": Row("InternVL-14B-224px", f"{_14B}_full_flickr30k", 32),
    "14b_head_4": Row("InternVL-14B-224px", f"{_14B}_head_flickr30k", 4),
    "14b_lora_4": Row("InternVL-14B-224px", f"{_14B}_lora_flickr30k", 4),
}


def measure(name: str, tiny: bool) -> dict[str, Any]:
    """Rehearses a row."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        keys = {"device": "cpu" if tiny else "cuda", "run": folder / "run", "evals": "{}"}
        is_dual = row.model.startswith("InternVL-14B")
        official = zoo.official_config(zoo.find(row.model))
        if tiny:
            official = (dual.shrunk if is_dual else workloads._shrunk)(official)
            keys |= {"global_batch": 2 * row.num_gpus, "data.tiles.size": 56, "dtype": "float32"}
        text = official["qllama_config" if is_dual else "llm_config"]
        if tiny:
            text |= {"num_key_value_heads": 2}
        words = (dual.tokenizer if is_dual else workloads._tokenizer)(text["vocab_size"])
        words.save_pretrained(folder / "model")
        (folder / "model" / "config.json").write_text(json.dumps(official), encoding="utf-8")
        tree = recipes.load_recipe(RECIPES / f"{row.recipe}.yaml", row.changes)
        count = 2 * row.num_gpus if tiny else tree.batch_samples
        source = dual.write_pairs(folder, count) if is_dual else write_chat(folder, count)
        made = recipes.to_tree(tree)
        parts = ("vision", "language", "projector", "template", "ps_version")
        made["model"] = {k: v for k, v in made["model"].items() if k not in parts}
        made["model"]["id"] = str(folder / "model")
        made["data"]["sources"] = [source]
        made["data"]["template"] = None if is_dual else official["template"]
        recipe = recipes.resolve(made, [f"{key}={value}" for key, value in keys.items()])
        gpu = gpus.find("h200")
        done = rehearse.run(recipe, row.num_gpus, gpu, steps=3 if tiny else 5)
        print(done.render(), flush=True)
    device = torch.device("cpu" if tiny else "cuda")
    ceiling = workloads.matmul_tflops(device)
    assert done.plan is not None
    needed = done.plan.flops.needed / row.num_gpus / done.step_s / 1e12
    return table.rounded(
        {
            "row": name,
            "model": row.model,
            "num_gpus": row.num_gpus,
            "device": done.device,
            "torch": torch.__version__,
            "commit": table.commit(),
            "rows": len(done.batches),
            "tokens": done.tokens,
            "tiles": sum(batch.num_tiles for batch in done.batches),
            "step_s": done.step_s,
            "tokens_per_s": done.tokens / done.step_s,
            "needed_tflops": needed,
            "ceiling_tflops": ceiling,
            "share": needed / ceiling,
            "allocated_gib": done.peak_bytes / 2**30,
            "reserved_gib": done.reserved_bytes / 2**30,
            "planned_gib": done.plan.memory.allocated_gib,
            "planned_step_s": done.plan.step_s,
            "messages_s": sum(message.seconds for message in done.plan.messages),
        }
    )


def write_chat(folder: Path, count: int) -> dict[str, Any]:
    """Samples of a tile and a drawn number of words; the recipe's source."""
    rng, lines = random.Random(0), []
    workloads.picture((448, 448), 0).save(folder / "0.jpg", quality=90)
    for n, (tokens, _, answer) in enumerate(islice(balance.one_tile(0), count), 1):
        os.link(folder / "0.jpg", folder / f"{n}.jpg")  # of one name they would share a prefix
        turns = [tokens - 256 - answer, answer]
        question, reply = (workloads.some_words(rng, max(1, number)) for number in turns)
        talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        lines.append(json.dumps({"image": f"{n}.jpg", "conversations": talk}))
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"name": "drawn", "annotations": str(folder / "chat.jsonl"), "images": str(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget-s", type=float, default=1500)
    parser.add_argument("--to", type=Path)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.tiny)))
        return
    table.run(__file__, options.names or list(ROWS), options)


if __name__ == "__main__":
    main()
