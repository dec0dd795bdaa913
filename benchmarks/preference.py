"""Rates and memory of preference optimization, beside two plain models and beside TRL.

    python benchmarks/preference.py --to out/preference_h200.json   # one GPU, about 9 minutes
    python benchmarks/preference.py 2b_lora                         # one model and method
    python benchmarks/preference.py --tiny                          # on a CPU, a minute

Released shapes with random weights; pairs of one photo of 7 tiles and two answers of 200 tokens.
For every model and method, in a process each and one after the other:

    ours     the loop of `internvl train`, `objective: mpo` as published, then a few more steps with
             `delta: lagged`. Images are files, decoded and tiled by the loader's workers
    loop     transformers' model twice, policy and reference, a padded batch [chosen; rejected] in
             each as the original has it, so four answers and four towers a pair; whole-vocabulary
             logits in float32, an answer at a time; its pairs lie ready on the GPU, and it takes
             the best of several batches, with gradient checkpointing if none fits without
    trl      TRL's DPOTrainer with the same three losses on the same batches, where it is installed

`pairs_per_s` is a median over steps after the first ones. Full training has its reference computed
once before the first step: `pairs_per_s_with_reference` spreads that over one epoch. The last line
of the output divides ours by the others.
"""

import argparse
import copy
import gc
import importlib.util
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import rows as table
import torch
import torch.nn.functional as F
import transformers
import workloads
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from internvl import train
from internvl.compute import placement
from internvl.config import DataConfig, MpoConfig, SourceConfig, recipes
from internvl.data.images import STATISTICS
from internvl.data.loader import UnitReader
from internvl.data.records import Unit
from internvl.data.sampler import UnitRef
from internvl.data.sources import open_source
from internvl.models.adapters import lora
from internvl.models.vision import normalize_tiles
from internvl.objectives.mpo import Mpo
from internvl.training.run import building

ANSWER = 200
"""Tokens of an answer, its end included."""
SIZE = (1344, 896)
"""Of the photos, in px: six tiles and a thumbnail."""
WARMUP, STEPS, LAGGED = 2, 4, 3
BETA = 0.1
EVERYTHING = ("vision_tower", "multi_modal_projector", "language_model")


@dataclass(frozen=True)
class Row:
    """What is trained, and how many pairs a step has."""

    model: str
    rank: int | None
    pairs: int = 32
    row_tokens: int = 17792
    """Of ours: eight pairs."""
    loop_pairs: int = 16
    """A step of the others: what its optimizer takes is nothing beside two batches."""


ROWS = {
    "2b_lora": Row("InternVL2-2B", 128),
    "8b_lora": Row("InternVL2-8B", 128, pairs=16, loop_pairs=8),
    "2b_full": Row("InternVL2-2B", None),
}
BATCHES = (2, 4, 8, 1)
"""Pairs of a batch that the loop tries, in this order, until one is slower or does not fit; the
last only where the first does not fit."""
TRIES_S = 45
"""No batch is begun later than this."""
ROW_S = 240
"""Most seconds of a row's process."""


def chat_of(row: Row, device: torch.device, tiny: bool) -> Any:
    chat = workloads.random_chat(row.model, device, rank=row.rank, tiny=tiny)
    if row.rank is None:
        lora.select_trainable(chat.model, EVERYTHING)
    return chat


def write_pairs(folder: Path, encoder: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Photos and pairs below `folder`; the recipe's sources."""
    rng = random.Random(seed)
    for number in range(4):
        workloads.picture(SIZE, number).save(folder / f"{number}.jpg", quality=90)
    lines = [
        {
            "image": f"{number % 4}.jpg",
            "question": "<image>\n" + workloads.some_words(rng, 16),
            "chosen": workloads.some_words(rng, ANSWER - 1),
            "rejected": workloads.some_words(rng, ANSWER - 1),
        }
        for number in range(count)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    source = {"name": "pairs", "type": "preference", "annotations": str(folder / "pairs.jsonl")}
    return [source | {"images": str(folder)}]


def state_of(row: Row, folder: Path, chat: Any, tiny: bool, pairs: int) -> Any:
    """The run of a row: files on disk, all else as `train.build` makes it."""
    recipe = recipes.resolve(
        {
            "model": {
                "id": row.model,
                "lora": {"rank": row.rank} if row.rank else None,
                "train": [] if row.rank else list(EVERYTHING),
            },
            "data": {
                "sources": write_pairs(folder, chat.encoder, pairs * (WARMUP + STEPS + LAGGED)),
                "tiles": {"size": chat.tiles.size, "max": 6},
                "max_tokens": 4096,
                "row_tokens": 4096 if tiny else row.row_tokens,
                "max_tiles": 96,
                "share_prefix": False,
                "workers": 0 if tiny else 12,
            },
            "objective": {"name": "mpo", "beta": BETA},
            "optim": {"lr": 1e-6},
            "run": str(folder / "run"),
            "global_batch": pairs,
            "steps": WARMUP + STEPS + LAGGED,
            "device": chat.device.type,
        }
    )
    return train.build(recipe, chat)


def ours(row: Row, device: torch.device, tiny: bool) -> dict[str, Any]:
    pairs = 4 if tiny else row.pairs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = state_of(row, folder, chat_of(row, device, tiny), tiny, pairs)
        # All rows are full: the shorter length would be compiled for nothing.
        state.row_lengths = state.row_lengths[-1:]
        (folder / "run").mkdir(exist_ok=True)
        started, seconds, peaks, metrics = time.perf_counter(), [], [], []
        before = started
        for step_metrics in train.updates(state):
            seconds.append(time.perf_counter() - before)
            peaks.append(_peak_gib(device))
            metrics.append(step_metrics)
            if state.step == WARMUP + STEPS:
                state.objective.config = replace(state.objective.config, delta="lagged")
            if state.step in (WARMUP, WARMUP + STEPS):
                _reset_peak(device)
            before = time.perf_counter()
        figures = {
            "pairs_per_s": pairs / statistics.median(seconds[WARMUP : WARMUP + STEPS]),
            "peak_gib": peaks[WARMUP + STEPS - 1],
            # After the first one, which reads rows that the loader had no time to read ahead.
            "lagged_pairs_per_s": pairs / statistics.median(seconds[WARMUP + STEPS + 1 :]),
            "lagged_peak_gib": peaks[-1],
            "first_step_s": seconds[0],
            "compiled_s": state.warmup_s,
            "step_s": seconds[1:],
            "wait_share": statistics.mean(m["data_wait_s"] / m["step_s"] for m in metrics[WARMUP:]),
            "rows_per_step": statistics.mean(m["rows"] for m in metrics[WARMUP:]),
            "row_tokens": 4096 if tiny else row.row_tokens,
            "tokens_per_pair": sum(m["tokens"] for m in metrics) / (pairs * len(metrics)),
            "loss": [m["loss"] for m in metrics],
            "reference": building.run_start(state).reference,
        }
        if figures["reference"] == "precomputed":
            # Policy and reference are equal at first, which makes the pair losses constants.
            figures["expected_first_loss"] = 0.83178 + metrics[0]["sft"]
            # Once more, into another folder: the first pass has compiled the blocks too.
            (folder / "again").mkdir()
            start = replace(building.run_start(state), folder=folder / "again", step=0)
            again = Mpo(state.recipe.objective, state.recipe.data, state.objective.encoder)
            placement.synchronize(device)
            before = time.perf_counter()
            again.begin_run(start)
            placement.synchronize(device)
            reference_s = time.perf_counter() - before
            total = pairs * (WARMUP + STEPS + LAGGED)
            figures["reference_pairs_per_s"] = total / reference_s
            both = 1 / figures["pairs_per_s"] + reference_s / total
            figures["pairs_per_s_with_reference"] = 1 / both
        return figures


@dataclass(frozen=True)
class Encoded:
    """A pair as the original collates it."""

    input_ids: Tensor
    """int64 (2, T), padded on the right."""
    labels: Tensor
    """int64 (2, T), -100 where nothing is supervised."""
    mask: Tensor
    tiles: Tensor
    """Normalized, bfloat16 (N, 3, S, S)."""


def encoded_units(chat: Any, count: int) -> tuple[Mpo, Sequence[Unit]]:
    """Our objective, and pairs in memory as it encodes them; the weights play no part."""
    data = DataConfig(
        tiles=chat.tiles,
        normalize="imagenet",
        exif="ignore",
        max_tokens=4096,
        row_tokens=4096,
        max_tiles=96,
    )
    objective = Mpo(MpoConfig(), data, chat.encoder)
    with tempfile.TemporaryDirectory() as name:
        (source,) = write_pairs(Path(name), chat.encoder, count)
        config = SourceConfig(**{k: Path(v) if "/" in v else v for k, v in source.items()})
        reader = UnitReader([open_source(config)], data, objective.encode)
        return objective, reader[UnitRef(0, tuple(range(count)), 0, 0)].units


def encoded(unit: Unit, device: torch.device) -> Encoded:
    longest = max(len(example.input_ids) for example in unit.examples)
    ids = torch.zeros(2, longest, dtype=torch.long)
    labels = torch.full((2, longest), -100)
    mask = torch.zeros(2, longest, dtype=torch.long)
    for index, example in enumerate(unit.examples):
        length = len(example.input_ids)
        ids[index, :length] = torch.from_numpy(example.input_ids)
        labels[index, :length] = torch.from_numpy(example.labels)
        mask[index, :length] = 1
    assert unit.tiles is not None
    tiles = normalize_tiles(unit.tiles.to(device), torch.bfloat16, *STATISTICS["imagenet"])
    return Encoded(*(values.to(device) for values in (ids, labels, mask)), tiles)


def joined(batch: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, labels and mask (2B, T) of [chosen; rejected], and the tiles of all pairs once."""
    parts = (
        [getattr(pair, key)[which] for which in (0, 1) for pair in batch]
        for key in ("input_ids", "labels", "mask")
    )
    ids, labels, mask = (
        nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=value)
        for part, value in zip(parts, (0, -100, 0), strict=True)
    )
    return ids, labels, mask, torch.cat([pair.tiles for pair in batch])


class TwoModels:
    """Policy and reference, and the original's losses on a batch of [chosen; rejected]."""

    def __init__(self, row: Row, chat: Any, device: torch.device, checkpointing: bool) -> None:
        config, self.device = chat.model.config, device
        with torch.device(device):
            policy = InternVLForConditionalGeneration._from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        self.reference = copy.deepcopy(policy).requires_grad_(False).eval()
        if row.rank is None:
            # float32 under autocast, which is what DeepSpeed's master weights come to.
            policy = policy.float()
        else:
            policy = _with_adapters(policy, row.rank)
        if checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy = policy.train()
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=device.type == "cuda")
        self.delta, self.count = 0.0, 1e-24

    def step(self, batches: Sequence[Sequence[Encoded]]) -> float:
        """One optimizer step; the mean loss."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.loss(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    def loss(self, batch: Sequence[Encoded]) -> Tensor:
        ids, labels, mask, tiles = joined(batch)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            # Twice, as the original: the tower runs for both answers.
            "pixel_values": torch.cat([tiles, tiles]),
        }
        with torch.no_grad(), self._autocast():
            reference = answer_logps(self.reference(**inputs, use_cache=False).logits, labels)
        with self._autocast():
            logits = self.policy(**inputs, use_cache=False).logits
        logps = answer_logps(logits, labels)
        count = len(batch)
        rewards = BETA * (logps - reference)
        chosen, rejected = rewards[:count], rewards[count:]
        mean = float(rewards.detach().mean())
        self.count += 1
        self.delta += (mean - self.delta) / self.count
        dpo = -F.logsigmoid(chosen - rejected)
        bco = -F.logsigmoid(chosen - self.delta) - F.logsigmoid(-(rejected - self.delta))
        targets = (labels[:count, 1:] != -100).sum()
        return (0.8 * dpo + 0.2 * bco).mean() - logps[:count].sum() / targets

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)


def _with_adapters(policy: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    return get_peft_model(policy, settings, autocast_adapter_dtype=True)


def answer_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums of log-probabilities, float32 (2B,), from the logits of the whole vocabulary."""
    sums = []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):
        supervised = targets != -100
        chosen = row.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        sums.append((chosen * supervised).sum())
    return torch.stack(sums)


def best_batch(
    timed: Callable[..., dict[str, Any]], row: Row, device: torch.device, tiny: bool
) -> dict[str, Any]:
    """The figures of the best of the batches that fit."""
    total = 4 if tiny else row.loop_pairs
    chat = chat_of(row, torch.device("cpu" if tiny else "meta"), tiny)
    pairs = [encoded(unit, device) for unit in encoded_units(chat, total)[1]]
    best: dict[str, Any] = {}
    tried: dict[str, Any] = {}
    started = time.perf_counter()
    for size, checkpointing in itertools.product(BATCHES[:1] if tiny else BATCHES, (False, True)):
        # Checkpointing and the smallest batch only save memory.
        if size > total or (best and (checkpointing or size == BATCHES[-1])):
            continue
        if best and time.perf_counter() - started > TRIES_S:
            break
        name = f"batch {size}" + (", checkpointing" if checkpointing else "")
        try:
            figures = timed(row, chat, device, pairs, size, checkpointing, tiny)
        except torch.OutOfMemoryError:
            tried[name] = "out of memory"
            figures = {}
        # Outside of the handler, whose traceback holds what is to be freed.
        _free(device)
        if figures:
            tried[name] = figures["pairs_per_s"]
        if best and figures.get("pairs_per_s", 0.0) < best["pairs_per_s"]:
            break
        if figures:
            best = figures | {"batch": size, "checkpointing": checkpointing}
    return {"pairs_per_step": total, **best, "tried": tried}


def loop(
    row: Row,
    chat: Any,
    device: torch.device,
    pairs: Sequence[Encoded],
    size: int,
    checkpointing: bool,
    tiny: bool,
) -> dict[str, Any]:
    models = TwoModels(row, chat, device, checkpointing)
    batches = [pairs[n : n + size] for n in range(0, len(pairs), size)]
    seconds, losses = [], []
    _reset_peak(device)
    for _ in range(2 if tiny else 3):
        started = time.perf_counter()
        losses.append(models.step(batches))
        placement.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {
        "pairs_per_s": len(pairs) / statistics.median(seconds[1:]),
        "peak_gib": _peak_gib(device),
        "loss": losses,
    }


def trl(
    row: Row,
    chat: Any,
    device: torch.device,
    pairs: Sequence[Encoded],
    size: int,
    checkpointing: bool,
    tiny: bool,
) -> dict[str, Any]:
    """TRL's trainer on the same pairs, models and batches; its delta is always 0."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import ProcessorMixin, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Processor(ProcessorMixin):
        """Only names a tokenizer: the pairs are encoded."""

        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

    class Clock(TrainerCallback):
        ends: ClassVar[list[float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            placement.synchronize(device)
            self.ends.append(time.perf_counter())

    def collate(lines: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        ids, labels, mask, tiles = joined([pairs[line["image"]] for line in lines])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "completion_mask": (labels != -100).long(),
            "pixel_values": torch.cat([tiles, tiles]),
        }

    models = TwoModels(row, chat, device, checkpointing)
    policy, reference = models.policy, models.reference
    del models
    steps = 2 if tiny else 3
    with tempfile.TemporaryDirectory() as name:
        config = DPOConfig(
            output_dir=name,
            loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=[0.8, 0.2, 1.0],
            beta=BETA,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=len(pairs) // size,
            max_steps=steps,
            max_length=None,
            learning_rate=1e-6,
            bf16=True,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=checkpointing,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = DPOTrainer(
            policy,
            None if row.rank else reference,
            args=config,
            data_collator=collate,
            # A column of that name is what makes it a data set of images.
            train_dataset=Dataset(
                InMemoryTable(pyarrow.table({"image": list(range(len(pairs)))})),
                fingerprint="pairs",
            ),
            processing_class=Processor(chat.tokenizer),
            callbacks=[Clock()],
        )
        _reset_peak(device)
        Clock.ends[:] = [time.perf_counter()]
        trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(Clock.ends)]
    return {
        "pairs_per_s": len(pairs) / statistics.median(seconds[1:]),
        "peak_gib": _peak_gib(device),
        "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
    }


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return 0.0


def by_loop(row: Row, device: torch.device, tiny: bool) -> dict[str, Any]:
    return best_batch(loop, row, device, tiny)


def by_trl(row: Row, device: torch.device, tiny: bool) -> dict[str, Any]:
    if importlib.util.find_spec("trl") is None:
        return {"skipped": "TRL is not installed"}
    return best_batch(trl, row, device, tiny)


ARMS: dict[str, Callable[[Row, torch.device, bool], dict[str, Any]]] = {
    "ours": ours,
    "loop": by_loop,
    "trl": by_trl,
}


def one(name: str, tiny: bool) -> dict[str, Any]:
    """The figures of ROW/ARM."""
    row_name, _, arm = name.partition("/")
    row = ROWS[row_name]
    device = torch.device("cpu" if tiny else "cuda")
    figures = ARMS[arm](row, device, tiny)
    return table.rounded(
        {
            "row": name,
            "model": row.model,
            "method": f"lora {row.rank}" if row.rank else "full",
            "pairs_per_step": 4 if tiny else row.pairs,
            **figures,
            "hardware": "CPU" if tiny else f"1 x {torch.cuda.get_device_name()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": table.commit(),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--one", help="one row and arm in this process: 2b_lora/ours")
    parser.add_argument("--to", type=Path, default=None, help="JSON file")
    parser.add_argument("--budget-s", type=float, default=1500, help="seconds for all rows")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.tiny)))
        return
    # Arms of a row one after the other: they are compared on the same GPU at the same time.
    names = [f"{row}/{arm}" for row in options.rows for arm in options.arms]
    figures = table.run(__file__, names, options, limit_s=ROW_S)
    print(json.dumps(ratios(figures)))


def ratios(figures: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Our pairs per second over those of the others, by row."""
    rates = {row["row"]: row for row in figures if "pairs_per_s" in row}
    names = ("pairs_per_s", "lagged_pairs_per_s", "pairs_per_s_with_reference")
    return {
        f"{name.partition('/')[0]} {key} / {arm}": round(row[key] / rates[other]["pairs_per_s"], 3)
        for name, row in rates.items()
        for key in names
        for arm in ("loop", "trl")
        if key in row and name.endswith("/ours") and (other := name.replace("ours", arm)) in rates
    }


if __name__ == "__main__":
    main()
