"""Rates of answering: the engine of `evaluate` and `chat.answer`, on random weights.

    python benchmarks/answers.py                     # the rows of the table, on a GPU; 8 minutes
    python benchmarks/answers.py captions --profile  # one row, and where its time goes
    python benchmarks/answers.py captions_14b        # InternVL-14B's captions by five beams
    python benchmarks/answers.py --tiny              # the same path on a CPU, in seconds

Images are JPEG files that processes decode and tile while the GPU answers. Weights are random and
no token ends an answer, so every request generates as many as it may. A row's JSON goes to `--to`:
requests a second from the first one that is read to the last token, after a warm-up of the same
shapes; FLOPs forward as internvl/plan/flops.py counts them. `alone` answers one request after the
other, each read when the one before is answered. `--minutes` leaves out rows at the end. Beside
`captions_14b` stands a plain search in the same call, with images that are ready in batches of 64:
a row for each beam, whose keys are copied when the order of beams changes.
"""

import argparse
import io
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import workloads
from dual import random_dual
from PIL import Image
from rows import commit, keep, kernels, print_kernels

from internvl.compute import placement
from internvl.data.images import STATISTICS, read_rgb
from internvl.data.pairs import square
from internvl.inference import engine, requests
from internvl.inference.engine.scheduler import Job, Scheduler
from internvl.inference.requests import Prompt, Request
from internvl.inference.settings import Settings
from internvl.models import configs
from internvl.models.vision import normalize_tiles
from internvl.plan import flops
from internvl.plan.work import Sequences, Work

NEVER = -1
"""A token that no model generates, so that nothing ends an answer."""

SIZES = {1: (448, 448), 3: (900, 450), 5: (900, 900), 7: (1350, 900), 13: (1800, 1350)}
"""Tiles, the thumbnail included -> an image's width and height that become as many."""


@dataclass(frozen=True)
class Asked:
    """A request: tiles of each image, and tokens to generate."""

    tiles: tuple[int, ...]
    new: int


def captions(rng: random.Random) -> Asked:
    """As COCO's captions: 7 tiles, 30 tokens."""
    return Asked((7,), 30)


def mixed(rng: random.Random) -> Asked:
    """1 to 13 tiles, and 5 to 256 tokens, some 30 on average."""
    return Asked((rng.choice(list(SIZES)),), min(256, max(5, round(rng.lognormvariate(3.1, 0.75)))))


def short(rng: random.Random) -> Asked:
    """As visual questions: 7 tiles, 10 tokens."""
    return Asked((7,), 10)


def four_images(rng: random.Random) -> Asked:
    """Four images of three tiles, 30 tokens."""
    return Asked((3, 3, 3, 3), 30)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    draw: Callable[[random.Random], Asked]
    count: int
    slots: int | None = None
    refill: bool = True
    compiled: bool = True
    float8: bool = False
    alone: bool = False
    model: str = "InternVL2-2B"
    beams: int = 1


ROWS = {
    "captions": Row(captions, 512),
    "mixed": Row(mixed, 1000),
    "mixed_no_refill": Row(mixed, 1000, refill=False),
    "one": Row(captions, 12, slots=1, alone=True),
    "four_images": Row(four_images, 256),
    "short": Row(short, 512),
    "captions_float8": Row(captions, 512, float8=True),
    "captions_14b": Row(captions, 512, beams=5, compiled=False, model="InternVL-14B"),
    "captions_14b_compiled": Row(captions, 512, beams=5, model="InternVL-14B"),
    "captions_14b_64": Row(captions, 512, 64, beams=5, compiled=False, model="InternVL-14B"),
    "captions_eager": Row(captions, 256, compiled=False),
    "captions_64": Row(captions, 512, slots=64),
    "one_eager": Row(captions, 12, slots=1, alone=True, compiled=False),
}

TABLE = tuple(ROWS)[:7]
"""The default, most wanted first: `--minutes` may leave out the last ones."""

LEAST_S = 45
"""Seconds left for which a row is begun."""


def measure_beams(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """InternVL-14B: captions of 30 tokens, from JPEG files of COCO's size."""
    device = torch.device("cpu" if options.tiny else "cuda")
    torch.manual_seed(0)
    dual = random_dual(224, device, None, tiny=options.tiny)
    if options.tiny:
        dual.model.float()  # so that both searches choose alike
    count, new = (4, 5) if options.tiny else (row.count, 30)
    # As long as they may be: no search ends before.
    settings = Settings(new, new, row.beams)
    files = [_jpeg((640, 480), seed) for seed in range(min(count, 16))]
    # "English caption:" has five tokens.
    prompt = [1, 5, 6, 7, 8]
    ids = np.array([0] * dual.model.num_queries + prompt)

    def read(index: int) -> Prompt:
        image = Image.fromarray(read_rgb(files[index % len(files)]))
        return Prompt(ids, square(image, dual.image_size)[None])

    def job(index: int, prompt: Prompt) -> Job:
        return Job(index, prompt, settings)

    slots = row.slots or (3 if options.tiny else engine.SLOTS)
    compiled = row.compiled and not options.tiny
    scheduler = engine.captions(dual.model, slots, compiled=compiled, num_beams=row.beams)
    answer = partial(_answer, scheduler, read, job, threads=options.threads)
    answer(range(min(count, 2 * slots)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    jobs, runs = [], []
    for _ in range(options.rounds):
        jobs, seconds = answer(range(count))
        runs.append(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
    if options.profile and device.type == "cuda":
        _profile(lambda: answer(range(count)))
    allocated = scheduler.decoder.cache
    assert allocated is not None
    batch = min(count, 64)
    tiles = [read(index).tiles for index in range(batch)]
    pixels = normalize_tiles(torch.cat([t for t in tiles if t is not None]), dual.dtype).to(device)
    plain, plain_s = [], []
    for _ in range(1 + options.rounds):
        placement.synchronize(device)
        started = time.perf_counter()
        plain = plain_search(dual.model, pixels, torch.tensor(prompt), row.beams, new)
        placement.synchronize(device)
        plain_s.append(time.perf_counter() - started)
    texts = {job.key: job.generated for job in jobs}
    rate, beside = count / min(runs), batch / min(plain_s[1:])
    return {
        "model": row.model,
        "beams": row.beams,
        "requests": count,
        "requests_per_s": round(rate, 2),
        "plain_batch": batch,
        "plain_requests_per_s": round(beside, 2),
        "of_plain": round(rate / beside, 3),
        # Of random weights many beams are about as good: in 16 bits texts may differ.
        "equal_texts": sum(texts[index] == text for index, text in enumerate(plain)),
        "new_tokens": new,
        "seconds": [round(s, 3) for s in runs],
        "plain_seconds": [round(s, 3) for s in plain_s[1:]],
        "read_ms": round(1e3 * _read_s(read, count), 1),
        "slots": allocated.slots,
        "slot_tokens": allocated.length,
        "peak_gib": round(peak, 2),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "commit": commit(),
    }


class Grown:
    """A layer's cache of a plain search, (rows, heads, T, head size)."""

    states: tuple[torch.Tensor, ...] = ()

    def update(self, *states: Any) -> tuple[torch.Tensor, ...]:
        pairs = zip(self.states or (), states, strict=False)
        self.states = tuple(torch.cat(p, dim=2) for p in pairs) if self.states else states[:2]
        return self.states

    def reorder(self, rows: torch.Tensor) -> None:
        self.states = tuple(tensor.index_select(0, rows) for tensor in self.states)


@torch.no_grad()
def plain_search(
    model: Any, pixels: torch.Tensor, prompt: torch.Tensor, beams: int, new: int
) -> list[list[int]]:
    """Texts of `new` tokens, none of which may end, as `transformers` searches for them."""
    device, count = pixels.device, len(pixels)
    language_model = model.model.language_model
    caches = [Grown() for _ in language_model.layers]
    ids = prompt.to(device).expand(count, -1)
    mask = model.joint_mask("itg", torch.ones_like(ids[:1]))
    cross = model.encode_kv(model.vision_tokens(pixels))
    _, states = model.joint_states(cross, ids, mask, caches)
    del cross
    first = torch.arange(count, device=device).repeat_interleave(beams)
    for cache in caches:
        cache.reorder(first)
    scores = torch.zeros(count, 1, device=device)
    texts = torch.zeros(count, 1, 0, dtype=torch.long, device=device)
    states, length = states[:, -1:], model.num_queries + ids.shape[1]
    for step in range(new):
        likely = model.lm_head(states[:, -1]).float().log_softmax(-1)
        likely[:, model.config.text_config.eos_token_id] = -torch.inf
        total = scores[..., None] + likely.unflatten(0, (count, -1))
        scores, flat = total.flatten(1).topk(beams)
        parents, tokens = flat // likely.shape[-1], flat % likely.shape[-1]
        kept = texts.gather(1, parents[..., None].expand(-1, -1, step))
        texts = torch.cat([kept, tokens[..., None]], dim=2)
        if step + 1 == new:
            break
        if step:
            rows = torch.arange(count, device=device)[:, None] * beams + parents
            for cache in caches:
                cache.reorder(rows.flatten())
        embeds = model.get_input_embeddings()(tokens.flatten()[:, None])
        position = torch.tensor([[length + step]], device=device)
        states = language_model(embeds, None, past_key_values=caches, position_ids=position)
    return texts[:, 0].tolist()


def measure(row: Row, options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    device = torch.device("cpu" if options.tiny else "cuda")
    chat = _chat(row.model, row.compiled and not options.tiny, row.float8, device)
    model = chat.model
    count = min(row.count, 6) if options.tiny else row.count
    rng = random.Random(0)
    asked = [row.draw(rng) for _ in range(count)]
    photos = {tiles: _jpeg(SIZES[tiles], tiles) for one in asked for tiles in one.tiles}
    config = configs.chat_settings(model.config)

    def read(index: int) -> Prompt:
        one = asked[index]
        images = [photos[tiles] for tiles in one.tiles]
        question = "w1 " * 40
        request = Request([{"role": "user", "content": question}], images, max_tiles=12)
        image_settings = {key: config[key] for key in ("exif", "normalize")}
        return requests.encode(request, chat.encoder, chat.tiles, **image_settings)

    def job(index: int, prompt: Prompt) -> Job:
        return Job(index, prompt, Settings(max_new_tokens=asked[index].new))

    slots = row.slots or (3 if options.tiny else engine.SLOTS)
    scheduler = Scheduler(
        model,
        end_id=NEVER,
        statistics=STATISTICS[config["normalize"]],
        slots=slots,
        dtype=torch.bfloat16,
        compiled=row.compiled and not options.tiny,
        refill=row.refill,
        row_tokens=options.row_tokens,
        tiles_at_once=options.tiles,
    )
    warm = min(count, 2 * slots)
    started = time.perf_counter()
    answer = partial(_answer, scheduler, read, job, threads=options.threads)
    answer(range(warm))
    first_s = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for _ in range(options.rounds):
        jobs, seconds = answer(range(count))
        runs.append(seconds)
    if options.profile and device.type == "cuda":
        _profile(lambda: answer(range(count)))
    latencies = _latencies(scheduler, read, job, count) if row.alone else {}
    seconds = min(runs)
    needed = _forward(model, jobs, sum(sum(one.tiles) for one in asked))
    tokens = sum(len(job.generated) for job in jobs)
    return {
        "model": row.model,
        "requests": count,
        "requests_per_s": round(count / seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        **latencies,
        "seconds": [round(s, 3) for s in runs],
        "first_s": round(first_s, 1),
        "read_ms": round(1e3 * _read_s(read, count), 1),
        "slots": scheduler.decoder.cache.slots,
        "slot_tokens": scheduler.decoder.cache.length,
        "new_tokens": round(tokens / count, 1),
        "prompt_tokens": round(sum(len(job.prompt_ids) for job in jobs) / count),
        "tflop": round(needed / count / 1e12, 3),
        "ceiling_share": round(needed / seconds / 1e12 / ceiling, 4),
        "ceiling_tflops": round(ceiling, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if not options.tiny else 0,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


@lru_cache(maxsize=1)
def _chat(name: str, compiled: bool, float8: bool, device: torch.device) -> Any:
    """The model of a row; the next row's if it is the same, so that nothing is compiled twice."""
    chat = workloads.random_chat(name, device, rank=None, tiny=device.type == "cpu")
    chat.model.eval().requires_grad_(False)
    if compiled:
        engine.accelerate(chat.model, float8=float8)
    return chat


def _read_s(read: Callable[[int], Prompt], count: int) -> float:
    """Seconds that one thread reads a request for, on average, while nothing else runs."""
    started = time.perf_counter()
    for index in range(min(count, 16)):
        read(index)
    return (time.perf_counter() - started) / min(count, 16)


def _latencies(
    scheduler: Scheduler,
    read: Callable[[int], Prompt],
    make: Callable[[int, Prompt], Job],
    count: int,
) -> dict[str, float]:
    """Median milliseconds to the first token and to the last, one request at a time."""
    first, last = [], []
    for index in range(count):
        started = time.perf_counter()
        for job in scheduler.run(engine.Ready([make(index, read(index))])):
            if len(job.generated) == 1:
                first.append(time.perf_counter() - started)
        last.append(time.perf_counter() - started)
    return {
        "first_token_ms": round(1e3 * statistics.median(first), 1),
        "latency_ms": round(1e3 * statistics.median(last), 1),
    }


class _Begun:
    """A source whose first request is read."""

    def __init__(self, prompts: engine.Prompts) -> None:
        self.prompts = prompts
        self.first = prompts.take(wait=True)

    def take(self, *, wait: bool) -> Job | None:
        job, self.first = self.first, None
        return self.prompts.take(wait=wait) if job is None else job


def _answer(
    scheduler: Scheduler,
    read: Callable[[int], Prompt],
    make: Callable[[int, Prompt], Job],
    order: range,
    *,
    threads: bool,
) -> tuple[list[Job], float]:
    """The answered jobs, and seconds from the first request that is read to the last token."""
    on_gpu = scheduler.model.device.type == "cuda"
    processes = engine.processes_for(len(order)) if on_gpu and not threads else 0
    ahead = scheduler.most_slots // 2 + 8
    settings = {"ahead": ahead, "most": 10**9, "pin": on_gpu, "processes": processes}
    with engine.Prompts(read, make, order, **settings) as prompts:
        begun = _Begun(prompts)
        placement.synchronize(scheduler.model.device)
        started = time.perf_counter()
        jobs = [job for job in scheduler.run(begun) if job.ended]
        placement.synchronize(scheduler.model.device)
        return jobs, time.perf_counter() - started


def _jpeg(size: tuple[int, int], seed: int) -> bytes:
    file = io.BytesIO()
    workloads.picture(size, seed).save(file, "JPEG", quality=90)
    return file.getvalue()


def _forward(model: Any, jobs: list[Job], tiles: int) -> float:
    """FLOPs of answers: tiles, prompts and tokens run forward, logits of the tokens alone."""
    new = sum(len(job.generated) for job in jobs)
    totals = [len(job.prompt_ids) + len(job.generated) - 1 for job in jobs]
    pairs = sum(total * (total + 1) // 2 for total in totals)
    counted = flops.count(model, Work(1, tiles, new, Sequences(len(jobs), sum(totals), pairs)))
    # Nothing trains, so what is needed is what runs forward.
    return counted.needed


def _start(event: Any) -> float:
    return float(event.time_range.start)


def _profile(run: Callable[[], Any]) -> None:
    """Prints what a GPU did in a run, and how long it did nothing between first and last kernel."""
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    started = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as found:
        run()
        torch.cuda.synchronize()
    wall = time.perf_counter() - started
    on_device = torch.autograd.DeviceType.CUDA
    events, busy = kernels(found)
    spans = sorted((e for e in found.events() if e.device_type == on_device), key=_start)
    gaps: list[tuple[float, float, str, str]] = []
    last = spans[0]
    for span in spans:
        if span.time_range.start > last.time_range.end:
            ms = (span.time_range.start - last.time_range.end) / 1e3
            at = (last.time_range.end - spans[0].time_range.start) / 1e6
            gaps.append((ms, at, last.name, span.name))
        if span.time_range.end > last.time_range.end:
            last = span
    idle = sum(ms for ms, *_ in gaps) / 1e3
    print(f"profile: {wall:.2f} s, kernels {busy:.2f} s, idle {idle:.2f} s")
    for least, most in ((0, 0.02), (0.02, 0.1), (0.1, 1), (1, 5), (5, 20), (20, 1e9)):
        some = [ms for ms, *_ in gaps if least <= ms < most]
        print(f"gaps of {least} to {most:g} ms: {len(some)}, {sum(some) / 1e3:.3f} s")
    for ms, at, before, after in sorted(gaps, reverse=True)[:12]:
        print(f"gap {ms:7.2f} ms at {at:6.2f} s: {before[:45]} | {after[:45]}")
    print_kernels(events[:30], busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(TABLE), help=", ".join(ROWS))
    parser.add_argument("--minutes", type=float, default=60, help="in which rows are begun")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--row-tokens", type=int, default=16384)
    parser.add_argument("--tiles", type=int, default=64, help="in the vision tower at a time")
    parser.add_argument("--to", type=Path, default=None, help="folder for one JSON a row")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--threads", action="store_true", help="read in threads, not processes")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    ceiling = workloads.matmul_tflops(torch.device("cpu" if options.tiny else "cuda"))
    began, share = time.perf_counter(), {}
    for name in options.rows:
        started = time.perf_counter()
        left_s = 60 * options.minutes - (started - began)
        if left_s < LEAST_S:
            reason = f"{left_s:.0f} s left of {options.minutes:g} minutes, a row needs {LEAST_S}"
            print(json.dumps({"row": name, "left_out": reason}), flush=True)
            continue
        row = ROWS[name]
        figures = {
            "row": name,
            **(measure(row, options, ceiling) if row.beams == 1 else measure_beams(row, options)),
        }
        share[name] = figures.get("ceiling_share", 0.0)
        if name.startswith("mixed") and "captions" in share:
            figures["of_uniform"] = round(share[name] / share["captions"], 3)
        if not options.tiny:
            torch.cuda.empty_cache()
        figures["wall_s"] = round(time.perf_counter() - started, 1)
        keep(figures, options.to and options.to / f"answers_{name}.json")


if __name__ == "__main__":
    main()
