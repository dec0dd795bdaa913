"""Will it fit, and how long will it take: `plan.make(recipe, gpu, step)`. Needs no GPU, no weights.

The model is built on the meta device from `config.json` (or the table of released models), frozen
and adapted as training does it, and counted: memory by footprint.py, FLOPs by flops.py. A step
then takes

    time = loop x ( products / matmul rate + attention / its rates + bytes / memory rate )

where products include padding and what checkpointing computes again, and bytes are the passes over
activations, weights and optimizer states. The rates in `gpus.CALIBRATION` come from one profile.
For InternVL-14B plan/dual_footprint.py, plan/dual_flops.py and plan/dual.py do the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import InternVLConfig

from internvl import zoo
from internvl.compute import backends, placement
from internvl.config import ComputeConfig, ModelConfig, Recipe, recipes
from internvl.errors import UnknownModel, UserError
from internvl.inference import families, inherited
from internvl.inference import load as loading
from internvl.inference.families import FAMILIES
from internvl.inference.inherited import Completed
from internvl.inference.opened import open_model, open_start, parts_settings
from internvl.models import hub, kernels
from internvl.models.adapters import lora
from internvl.models.chat import assemble
from internvl.models.chat import model as chat_model
from internvl.models.dual.configs import DualConfig
from internvl.models.vision import count_parameters
from internvl.plan import dual as dual_plan
from internvl.plan import dual_flops, dual_footprint, flops, footprint
from internvl.plan.dual import PairLoad
from internvl.plan.dual_flops import PairStep
from internvl.plan.flops import Flops, Work
from internvl.plan.footprint import GIB, Footprint, Shape
from internvl.plan.work import FirstStep
from internvl.training import memory_ladder
from internvl.zoo import gpus
from internvl.zoo.gpus import CALIBRATION, Gpu

MEMORY_ERROR = 0.10
"""Stated error of the peak. What is allocated was within 5.1 % in eleven measured steps of chat
models, within 10 % in InternVL-14B's (benchmarks/results/memory_h200.json, dual_h200.json)."""
TIME_ERROR = 0.25
"""Stated error of the time on the GPU that was profiled, where it was up to 20 %; on others 0.4."""
OTHER_TIME_ERROR = 0.4
_TEXT_TOKENS, _SUPERVISED = 64, 16  # of an assumed sample


@dataclass(frozen=True)
class Load:
    """What a step of the run holds."""

    work: Work
    """Of a whole step, over all GPUs."""
    rows: float
    padded: float
    """Tokens with padding."""
    row: Shape
    """The largest row."""
    samples: int | None
    """In an epoch; None where the data are not known."""
    source: str
    """Where these numbers are from, for the reader."""

    @property
    def largest(self) -> str:
        """The row that memory is reckoned for, in words."""
        return f"row: {self.row.tokens:,} tokens, {self.row.tiles} tiles"


@dataclass(frozen=True)
class Plan:
    """The prediction."""

    recipe: Recipe
    """With nothing left open."""
    gpu: Gpu
    num_gpus: int
    load: Load | PairLoad
    memory: Footprint
    flops: Flops
    """Of a step, over all GPUs."""
    parts_s: dict[str, float]
    """Seconds of a step by what it does."""
    trained: int
    parameters: int
    remedy: str = ""
    """What makes it fit, where it does not."""
    inherited: str = ""
    """What holds of images and conversations, and where it is from, in lines."""

    @property
    def fits(self) -> bool:
        return self.memory.total_gib <= self.gpu.memory_gib

    @property
    def step_s(self) -> float:
        return sum(self.parts_s.values())

    @property
    def samples_per_s(self) -> float:
        return self.load.work.samples / self.step_s

    @property
    def share(self) -> float:
        """Needed FLOPs over what the GPUs' matrix products reach."""
        rate = self.gpu.tflops * self.gpu.products * 1e12 * self.num_gpus
        return self.flops.needed / self.step_s / rate

    def render(self) -> str:
        """The prediction as text."""
        return "\n".join(_lines(self))


def make(
    recipe: Recipe,
    gpu: Gpu,
    step: FirstStep | PairStep | None = None,
    num_gpus: int = 1,
    shape: InternVLConfig | DualConfig | None = None,
) -> Plan:
    """Predicts memory and time of a run.

    Args:
        step: what `check` counted in the first step; None goes by stated assumptions.
        num_gpus: each with a copy of the model and its share of every step's samples.
        shape: the model's configuration; by default that of `recipe.model`.

    Raises:
        UserError: the model is neither a folder nor a released one, or not for this objective or
            these tiles; float8 on a GPU that has none.
    """
    if recipe.compute.float8 and not gpu.float8:
        raise UserError(
            f"compute.float8: {gpu.name} has no float8 products; set compute.float8=false"
        )
    completed = complete(recipe, shape)
    model = model_of(completed.recipe, shape)
    made = _predict(completed.recipe, model, gpu, step, num_gpus)
    made = replace(made, inherited=completed.render())
    return made if made.fits else replace(made, remedy=_remedy(made, model, step))


def complete(recipe: Recipe, shape: InternVLConfig | DualConfig | None = None) -> Completed:
    """As handles.complete; where the model's files are not here, from the table of released models.

    Raises:
        UserError: as `make`.
    """
    if shape is None and is_here(recipe):
        return loading.complete(recipe)
    if shape is not None:
        start = inherited.checkpoint_from_config(shape, "the model's configuration")
    else:
        name = "table of released models (config.json is not here)"
        files = _files(recipe)
        start = (
            FAMILIES[files.family].checkpoint_settings(files, name)
            if recipe.model.id is not None
            else families.parts_checkpoint_settings(recipe.model, files)
        )
    FAMILIES["dual" if start.dual else "chat"].check_objective(recipe)
    return inherited.complete(recipe, start)


def model_of(recipe: Recipe, shape: InternVLConfig | DualConfig | None = None) -> Any:
    """The recipe's model on the meta device: frozen, adapted and placed as for training."""
    config = _config(recipe) if shape is None else shape
    family = FAMILIES[families.name_of(config)]
    family.check_objective(recipe)
    model = family.empty_model(config)
    lora.select_trainable(model, recipe.model.parts, recipe.model.train_last_vision_blocks)
    if recipe.model.lora is not None:
        with torch.device("meta"):
            lora.attach(model, recipe.model.lora)
    placement.to_device(model, torch.device("meta"), recipe.dtype)
    if recipe.compute.float8:
        kernels.convert_frozen_linears(model, torch.device("meta"))
    return model


def _config(recipe: Recipe) -> InternVLConfig | DualConfig:
    """The configuration of the model's folder, else of the released model of that name."""
    files = _files(recipe)
    # Which id is the placeholder's does not matter here, so that no tokenizer is needed.
    return FAMILIES[files.family].read_config(files, 0, recipe.data.tiles.size)


def _files(recipe: Recipe) -> hub.ModelFolder:
    """The model's folder, else what is known of the released model of that name."""
    if recipe.model.id is None:
        return open_start(recipe).files if is_here(recipe) else _released_parts(recipe.model)
    folder = Path(recipe.model.id).expanduser()
    if folder.is_dir():
        return open_model(folder).files
    try:
        model = zoo.find(recipe.model.id)
    except UnknownModel as error:
        raise UserError(
            f"model.id: {recipe.model.id} is no folder, and {error}; a plan needs config.json"
        ) from None
    return hub.ModelFolder(folder, zoo.official_config(model))


def _released_parts(model: ModelConfig) -> hub.ModelFolder:
    """The parts' own config.json, and of those that are not here what is known of the released
    tower or language model of that name."""
    tower, language = str(model.vision), str(model.language)
    config = assemble.official_config(
        _part_config("vision", tower, zoo.find_tower),
        _part_config("language", language, zoo.find_language_model),
        parts_settings(model),
    )
    return hub.ModelFolder(Path(language), config)


def _part_config(key: str, name: str, find: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    if _is_local(name):
        return hub.open_folder(name).config
    try:
        return find(name)
    except UnknownModel as error:
        raise UserError(
            f"model.{key}: {name} is no folder, and {error}; a plan needs a folder with config.json"
        ) from None


def is_here(recipe: Recipe) -> bool:
    """Whether the model's files are on this machine, so that a check would fetch nothing."""
    model = recipe.model
    if model.id is not None:
        return _is_local(model.id)
    projector = model.projector is None or model.projector.is_file()
    return projector and _is_local(str(model.vision)) and _is_local(str(model.language))


def _is_local(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).expanduser().is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def attention_of(compute: ComputeConfig) -> str:
    """The attention a GPU computes with."""
    return "flex" if compute.attention in ("auto", "flash") else compute.attention


def is_compiled(compute: ComputeConfig) -> bool:
    """Whether a GPU runs compiled blocks."""
    return compute.compile is None or compute.compile


def _predict(
    recipe: Recipe, model: Any, gpu: Gpu, step: FirstStep | PairStep | None, num_gpus: int
) -> Plan:
    load, memory = _memory(recipe, model, step, num_gpus)
    if isinstance(load, PairLoad):
        needed = dual_flops.count(model, load.work)
        compiled = is_compiled(recipe.compute)
        times = dual_plan.times(recipe, model, load, gpu, num_gpus, compiled=compiled)
    else:
        needed = flops.count(model, load.work)
        times = _times(recipe, model, load, needed, gpu, num_gpus)
    trained, parameters = count_parameters(model)
    return Plan(
        recipe=recipe,
        gpu=gpu,
        num_gpus=num_gpus,
        load=load,
        memory=memory,
        flops=needed,
        parts_s=dict(times),
        trained=trained,
        parameters=parameters,
    )


def _memory(
    recipe: Recipe, model: Any, step: FirstStep | PairStep | None, num_gpus: int
) -> tuple[Load | PairLoad, Footprint]:
    """What a step holds, and the memory it takes of each GPU."""
    compiled, attention = is_compiled(recipe.compute), attention_of(recipe.compute)
    if families.name_of(model.config) == "dual":
        assert not isinstance(step, FirstStep)
        pair_load = dual_plan.load_of(recipe, model.num_queries, step, num_gpus)
        return pair_load, dual_footprint.of(
            model,
            recipe,
            pair_load.pairs,
            pair_load.captions,
            compiled=compiled,
            micro_batches=round(pair_load.rows / num_gpus),
        )
    assert not isinstance(step, PairStep)
    load = load_of(recipe, model, step, num_gpus)
    return load, footprint.of(model, recipe, load.row, compiled=compiled, attention=attention)


def load_of(recipe: Recipe, model: Any, step: FirstStep | None, num_gpus: int = 1) -> Load:
    """What a step holds, counted or assumed."""
    data = recipe.data
    lengths = backends.row_lengths(recipe.compute, torch.device("cuda"), data)
    limit = lengths[-1] if lengths else data.row_tokens or data.max_tokens
    if step is None:
        tiling = data.tiling
        per_tile = chat_model.tokens_per_tile(model.config, tiling.size)
        tiles = tiling.max + (tiling.thumbnail and tiling.max > 1)
        tokens = min(data.max_tokens, tiles * per_tile + _TEXT_TOKENS)
        pairs = tokens * (tokens + 1) / 2
        sample = Work(1, tokens, tiles, _SUPERVISED, pairs)
        batch = float(recipe.global_batch or 0)
        if recipe.global_batch_rows is not None:  # as full as other runs' rows are
            batch = recipe.global_batch_rows * limit * CALIBRATION.fill / tokens
        work = sample.scaled(batch)
        padded = work.tokens / CALIBRATION.fill
        source = (
            f"assumed, for the data were not read: {tiles} tile(s), {_TEXT_TOKENS} tokens of text "
            f"and {_SUPERVISED} supervised ones a sample, nothing shared"
        )
        rows = padded / limit
        samples = None
    else:
        work = step.work
        padded = sum(next((n for n in lengths if n >= t), t) for t in step.row_tokens)
        rows, samples = len(step.row_tokens), step.samples_an_epoch
        source = f"counted in the first step: {rows} row(s), {work.tokens / padded:.1%} full"
    longest = limit
    if rows <= num_gpus:
        longest = next((n for n in lengths if n >= padded), math.ceil(padded))
    share = longest / work.tokens
    row = Shape(
        tokens=min(limit, longest),
        tiles=min(data.max_tiles, math.ceil(work.tiles * share)),
        supervised=math.ceil(work.supervised * share),
    )
    return Load(work, rows, padded, row, samples, source)


def _times(
    recipe: Recipe, model: Any, load: Load, needed: Flops, gpu: Gpu, num_gpus: int
) -> Iterator[tuple[str, float]]:
    """Seconds of a step by what it does, the loop's own share included."""
    known = CALIBRATION
    rate = gpu.tflops * gpu.products * 1e12 * num_gpus
    copy = gpu.tb_per_s * gpu.copies * 1e12 * num_gpus
    compiled, attention = is_compiled(recipe.compute), attention_of(recipe.compute)
    number = 2 if recipe.dtype == "bfloat16" else 4
    padding = load.padded / load.work.tokens
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[recipe.compute.checkpointing]
    slower = known.loop * number / 2  # float32 products run at half the rate at best

    again_tower = again if flops.trains(model.model.vision_tower) else 0.0
    whole, run = (flops.last_mlp_flops(model, n) for n in (load.work.tokens, load.work.supervised))
    products = padding * (_in_bfloat16(needed.decoder, again) - _in_bfloat16(whole, again))
    products += _in_bfloat16(run, again)
    products += _in_bfloat16(needed.tower, again_tower) + needed.logits.needed
    yield "matrix products", slower * products / rate

    inner, forward = needed.decoder_attention.needed, needed.decoder_attention.forward
    mixing = inner + again * forward
    if attention != "flex":  # every pair of a row, seen or not
        mixing *= (load.padded / max(1.0, load.rows)) ** 2 * load.rows / load.work.pairs
    speed = known.flex if attention == "flex" else known.attention
    seconds = mixing / speed + needed.tower_attention.needed / known.attention
    yield "attention", slower * seconds / rate

    blocks = footprint.Blocks(
        model,
        recipe.compute,
        number,
        compiled=compiled,
        attention=attention,
        joined=not recipe.model.quantize,
    )
    vision = model.config.vision_config
    num_blocks = model.config.text_config.num_hidden_layers
    kept = (num_blocks - 1) * blocks.decoder_block(load.row.tokens) + blocks.last_block(load.row)
    kept *= load.padded / load.row.tokens
    passes = known.passes * (1.0 if compiled else known.uncompiled) * (1 + again / 3)
    moved = passes * kept
    patches = load.work.tiles * blocks.patch_tokens * vision.num_hidden_layers
    shown = 3 if flops.trains(model.model.vision_tower) else 1
    moved += shown * known.tower_passes * number * patches * vision.hidden_size
    yield "pointwise", known.loop * moved / copy

    if recipe.compute.offload:
        entered = num_blocks * load.padded * number * model.config.text_config.hidden_size
        waits = 2 * (again * entered + (1 - again) * kept)
        yield "copies to the CPU and back", waits / (known.bus_tb_per_s * 1e12 * num_gpus)

    quantized = 0.0
    if recipe.model.quantize is not None:
        packed = footprint.states(model, recipe)["quantized weights"]
        numbers = packed / (0.5625 if recipe.model.quantize == "4bit" else 1.0)
        quantized = (2 + again) * (packed + 4 * numbers)
    trained, _ = count_parameters(model)
    offloaded = recipe.optim.offload
    yield from gpus.update_times(trained, load.rows, gpu, num_gpus, quantized, offloaded=offloaded)


def _in_bfloat16(part: flops.Part, again: float) -> float:
    """FLOPs of bfloat16 products that take the time of a part's, `again` of its forward twice."""
    faster = part.float8 / max(1.0, part.needed) * (1 - 1 / CALIBRATION.float8)
    return (part.needed + again * part.forward) * (1 - faster)


def _remedy(made: Plan, model: Any, step: FirstStep | PairStep | None) -> str:
    """The first setting of the ladder that makes it fit, alone or with those before it."""

    # Nothing on the ladder changes the model: in 4 bits it has the same parameters. Times are
    # predicted for the answer alone, because they take as long as all the rest.
    def fits(recipe: Recipe) -> bool:
        _, memory = _memory(recipe, model, step, made.num_gpus)
        return memory.total_gib <= made.gpu.memory_gib

    def summary(recipe: Recipe) -> str:
        return _short(_predict(recipe, model, made.gpu, step, made.num_gpus))

    for rung in memory_ladder.LADDER:
        recipe = made.recipe
        while (value := rung.value(recipe)) is not None:
            recipe = _set(recipe, rung.key, value)
            if fits(recipe):
                return f"{rung.key}={value} makes it fit: {summary(recipe)}"
    settings: dict[str, str] = {}
    recipe = made.recipe
    while (following := memory_ladder.next_rung(recipe)) is not None:
        rung, value = following
        settings[rung.key] = value
        recipe = _set(recipe, rung.key, value)
        if fits(recipe):
            together = " ".join(f"{key}={value}" for key, value in settings.items())
            return f"{together} together make it fit: {summary(recipe)}"
    together = " ".join(f"{key}={value}" for key, value in settings.items())
    return (
        f"no setting makes it fit: with {together or 'these settings'} it takes {summary(recipe)}; "
        "choose LoRA, a smaller model or a larger GPU"
    )


def _set(recipe: Recipe, key: str, value: str) -> Recipe:
    return recipes.resolve(recipes.to_tree(recipe), [f"{key}={value}"])


def _short(made: Plan) -> str:
    return f"{made.memory.total_gib:.1f} GiB, {made.samples_per_s:.3g} samples/s"


def _lines(made: Plan) -> Iterator[str]:
    recipe, gpu, memory = made.recipe, made.gpu, made.memory
    adapters = recipe.model.lora
    method = f"training {', '.join(recipe.model.parts)}"
    if adapters is not None:
        method = f"LoRA of rank {adapters.rank}"
    if recipe.model.quantize:
        method += f" on {recipe.model.quantize} weights"
    if recipe.compute.float8:
        method += " with float8 products (their rate is an estimate)"
    yield (
        f"plan for {made.num_gpus} x {gpu.name} ({gpu.memory_gib:g} GiB): {recipe.model.name}, "
        f"{method}, {made.trained:,} of {made.parameters:,} parameters train"
    )
    yield from made.inherited.splitlines()
    yield f"  samples: {made.load.source}"
    yield f"  largest {made.load.largest}, checkpointing {recipe.compute.checkpointing}"
    yield f"  peak memory, GiB (error up to {MEMORY_ERROR:.0%})"
    yield from _table(memory.parts, GIB)
    yield f"    {'allocated at the peak':<34}{memory.allocated_gib:8.2f}"
    yield from _table(memory.overhead, GIB)
    yield f"    {'in all':<34}{memory.total_gib:8.2f}"
    left = gpu.memory_gib - memory.total_gib
    near = abs(left) < MEMORY_ERROR * gpu.memory_gib
    doubt = "; within the error, so try one step first" if near else ""
    if made.fits:
        yield f"  fits: {left:.1f} GiB are left{doubt}"
    else:
        yield f"  DOES NOT FIT: {-left:.1f} GiB too much{doubt}"
        yield f"    {made.remedy}"
        if isinstance(made.load, PairLoad):
            yield "    every GPU holds all weights: they are not sharded over GPUs yet"
    error = f"error up to {TIME_ERROR if gpu.measured else OTHER_TIME_ERROR:.0%}"
    yield f"  a step of {made.load.work.samples:,.0f} samples, seconds ({error})"
    yield from _table(made.parts_s, 1.0)
    yield f"    {'in all':<34}{made.step_s:8.2f}"
    yield (
        f"  {made.samples_per_s:.3g} samples/s, "
        f"{made.flops.needed / made.load.work.samples / 1e12:.3g} TFLOP a sample, {made.share:.0%} "
        f"of what matrix products reach ({gpu.tflops * gpu.products:.0f} TFLOP/s a GPU)"
    )
    if made.load.samples is not None:
        samples = made.load.samples
        whole = recipe.num_samples(samples) / made.samples_per_s
        yield (
            f"  an epoch of {samples:,} samples: {_duration(samples / made.samples_per_s)}; "
            f"the run's {recipe.num_steps(samples):,} steps: {_duration(whole)}"
        )
    if recipe.optim.offload:
        yield f"  the CPU's memory holds {8 * made.trained / GIB:.1f} GiB of moments for each GPU"
    if not gpu.measured:
        yield f"  the rates of {gpu.name} are its maker's, times the shares an H200 reached"
    if made.num_gpus > 1:
        yield "  several GPUs: a copy of the model on each; assumed, not measured"


def _table(parts: dict[str, float], unit: float) -> Iterator[str]:
    rows: Sequence[tuple[str, float]] = sorted(parts.items(), key=lambda item: -item[1])
    for name, value in rows:
        yield f"    {name:<34}{value / unit:8.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
