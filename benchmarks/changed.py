"""How many greedy answers change: by float8, or by what else is in flight.

    python benchmarks/learning.py flickr8k_cn_128px.zip --to out/learning --arms packed --seeds 0
    python benchmarks/changed.py out/learning/runs/packed-0 \
        --annotations out/learning/data/validation_en.json --images out/learning/data

A trained chat model captions images twice, in bfloat16 and by the same engine: as it is, and with
float8, or with `--beside slots` one request at a time in the opposite order. For each changed
answer the logits of the first token that differs are taken in bfloat16: how much likelier the first
one's token was, beside the rounding of such a logit.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from internvl.inference import engine, requests
from internvl.inference import load as loading
from internvl.inference.requests import Prompt, Request
from internvl.inference.settings import Settings
from internvl.models import configs
from internvl.models.vision import normalize_tiles


def answers(
    chat: Any, model: Any, prompts: list[Prompt], new: int, *, alone: bool = False
) -> list[list[int]]:
    """Greedy tokens of every prompt; `alone`: one at a time, the last one first."""
    jobs = [engine.Job(n, prompt, Settings(max_new_tokens=new)) for n, prompt in enumerate(prompts)]
    source = engine.Ready(reversed(jobs) if alone else jobs)
    done = list(engine.scheduler(model, chat.encoder, 1 if alone else None).run(source))
    return [job.generated for job in sorted({id(j): j for j in done}.values(), key=lambda j: j.key)]


@torch.no_grad()
def gap(chat: Any, prompt: Prompt, shared: list[int], pair: tuple[int, int]) -> tuple[float, float]:
    """By how much bfloat16's logit of the first token of `pair` exceeds the second's, and the
    distance of bfloat16 numbers there."""
    device = chat.model.device
    ids = torch.tensor([*prompt.input_ids.tolist(), *shared], device=device)[None]
    statistics_ = engine.STATISTICS[configs.chat_settings(chat.model.config)["normalize"]]
    pixels = None
    if prompt.tiles is not None:
        pixels = normalize_tiles(prompt.tiles.to(device), torch.float32, *statistics_)
    logits = chat.model(input_ids=ids, pixel_values=pixels).logits[0, -1].float()
    chosen = logits[list(pair)]
    step = 2.0 ** (torch.frexp(chosen.abs().max()).exponent.item() - 8)
    return float(chosen[0] - chosen[1]), step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model or run folder")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO captions")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--prompt", default="Describe the photo.")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--new", type=int, default=40, help="most tokens of an answer")
    parser.add_argument("--beside", choices=("float8", "slots"), default="float8")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    chat: Any = loading.load(options.model, device=options.device, dtype="bfloat16")
    config = configs.chat_settings(chat.model.config)
    names = [row["file_name"] for row in json.loads(options.annotations.read_text())["images"]]
    prompts = []
    for name in names[: options.count]:
        request = Request([{"role": "user", "content": options.prompt}], [options.images / name])
        image_settings = {key: config[key] for key in ("exif", "normalize")}
        prompts.append(requests.encode(request, chat.encoder, chat.tiles, name, **image_settings))
    chat.model.eval().requires_grad_(False)
    other, alone = chat.model, options.beside == "slots"
    if not alone:
        other = copy.deepcopy(chat.model)
        engine.accelerate(other, float8=True)
    plain = answers(chat, chat.model, prompts, options.new)
    changed = answers(chat, other, prompts, options.new, alone=alone)
    gaps = []
    for prompt, a, b in zip(prompts, plain, changed, strict=True):
        if a != b:
            # An end token is part of an answer, so neither is the other's beginning.
            first = next(n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
            gaps.append(gap(chat, prompt, a[:first], (a[first], b[first])))
    figures: dict[str, Any] = {"beside": options.beside, "answers": len(plain)}
    figures["changed"] = len(gaps)
    if gaps:
        figures["logit_gap_median"] = round(statistics.median(g for g, _ in gaps), 4)
        figures["logit_gap_most"] = round(max(g for g, _ in gaps), 4)
        figures["within_one_rounding"] = sum(abs(g) <= step for g, step in gaps)
    figures["tokens"] = sum(map(len, plain))
    figures["different_answers_of_model"] = len({tuple(a) for a in plain})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
