"""Flags of the original's training entries as a recipe.

`flags.yaml` says what each flag becomes. Flags that have an effect together only have a rule here.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from internvl.compat import pair_sources
from internvl.errors import ConfigError
from internvl.files import read_object, read_yaml

ENTRIES = {
    "internvl_chat_finetune": "chat",
    "internvl_chat_pretrain": "chat",
    "internvl_chat_mpo": "preference",
    # A script names this file, which the original does not have.
    "internvl_chat_dpo": "preference",
    "internvl_stage2_finetune": "pairs",
}
"""Python file of the original, without .py -> the section of flags.yaml it takes."""
_SECTIONS = {"chat": ("chat",), "preference": ("chat", "preference"), "pairs": ("pairs",)}
_LOSSES = {"sigmoid": "dpo", "bco_pair": "bco", "ipo": "ipo", "hinge": "hinge", "robust": "robust"}
"""TRL's name of a loss of pairs -> the term of the objective."""
_TRUE, _FALSE = ("true", "1", "yes", "y", "t"), ("false", "0", "no", "n", "f")
_ALL_CHECKPOINTS = 1_000_000  # no `save_total_limit`: transformers deletes none

Flags = Mapping[str, Mapping[str, Any]]
Values = Mapping[str, Any]


@dataclass
class Translated:
    """A recipe made of flags."""

    tree: dict[str, Any]
    """The recipe as nested dictionaries."""
    notes: list[str] = field(default_factory=list)
    """What was said and has no key, and what differs."""

    def set(self, key: str, value: Any) -> None:
        """Sets a dotted key of the recipe."""
        node = self.tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value


@dataclass(frozen=True)
class Call:
    """A call of a training entry."""

    values: Values
    """Value of every flag of the entry, the original's default where none was given."""
    chosen: frozenset[str]
    """Flags that were given."""
    num_gpus: int
    environment: Mapping[str, str]
    folder: Path
    """Folder that paths are relative to."""
    entry_file: Path
    """The entry's Python file, which may not be here."""


def translate(
    entry: str,
    words: Sequence[str],
    *,
    num_gpus: int = 1,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Translated:
    """Translates flags to a recipe.

    Args:
        entry: Python file of the original, such as internvl/train/internvl_chat_finetune.py.
        words: its flags and values.
        num_gpus: processes that the original would start.
        folder: working directory of the call; by default this process's.

    Raises:
        ConfigError: flags that are unknown, wrong or have no counterpart, all of them.
    """
    name = Path(entry).stem
    if name not in ENTRIES:
        names = ", ".join(f"{stem}.py" for stem in ENTRIES)
        raise ConfigError(f"{entry}: no training entry of the original; it has {names}")
    flags = flags_of(ENTRIES[name])
    # All problems at once: a script has forty flags.
    stated, problems = _parse(words, flags)
    problems += [
        f"--{flag} {stated[flag]}: {row['refused']}"
        for flag, row in flags.items()
        if "only" in row and flag in stated and stated[flag] != row["only"]
    ]
    values = {flag: stated.get(flag, row["default"]) for flag, row in flags.items()}
    environment = {} if environment is None else environment
    call = Call(values, frozenset(stated), num_gpus, environment, folder or Path(), Path(entry))
    # Every value is set, defaults of the original too: ours differ.
    translated = Translated({})
    for required in ("output_dir", *(["meta_path"] if "meta_path" in flags else [])):
        if not values[required]:
            problems.append(f"--{required}: missing; the original needs it too")
    problems += _set_keys(translated, flags, values)
    rules = dict.fromkeys(row["rule"] for row in flags.values() if "rule" in row)
    for rule in [*rules, f"objective_of_{ENTRIES[name]}"]:
        problems += RULES[rule](call, translated)
    if problems:
        raise ConfigError("\n".join(["the flags have no recipe:", *problems]))
    translated.notes[:0] = [
        f"--{flag}: changes nothing: {row['nothing']} (original: {row['line']})"
        for flag, row in flags.items()
        if "nothing" in row and flag in stated and stated[flag] != row["default"]
    ]
    return translated


@cache
def table() -> dict[str, dict[str, dict[str, Any]]]:
    """Reads flags.yaml: section -> flag -> what it becomes."""
    tree: dict[str, dict[str, dict[str, Any]]] = read_yaml(Path(__file__).with_name("flags.yaml"))
    return tree


@cache
def flags_of(section: str) -> dict[str, dict[str, Any]]:
    """Returns the flags of an entry ("chat", "preference" or "pairs") with the trainer's."""
    sections = (*_SECTIONS[section], "trainer")
    return {flag: row for name in sections for flag, row in table()[name].items()}


def _parse(words: Sequence[str], flags: Flags) -> tuple[dict[str, Any], list[str]]:
    """Returns (flag -> value, problems); the last one of a repeated flag counts."""
    stated: dict[str, Any] = {}
    problems = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word}: no flag; a value without one?")
            continue
        option, equals, text = word[2:].partition("=")
        flag = option.replace("-", "_")
        takes = not equals and rest and not _is_flag(rest[0])
        value = rest.pop(0) if takes else (text if equals else None)
        # A misspelt flag would leave the original's default in place.
        if flag not in flags:
            near = difflib.get_close_matches(flag, flags, n=1)
            hint = f"did you mean --{near[0]}?" if near else "set the recipe's key instead"
            problems.append(f"--{option}: no flag of the original's scripts; {hint}")
            continue
        try:
            stated[flag] = _typed(value, flags[flag]["type"])
        except ValueError:
            shown = "no value" if value is None else repr(value)
            problems.append(f"--{flag}: {shown} is no {flags[flag]['type']}")
    return stated, problems


def _is_flag(word: str) -> bool:
    return word.startswith("--")


def _typed(text: str | None, name: str) -> Any:
    """Returns the value of a text. Raises ValueError if it is none of this type."""
    if name == "bool":
        # HfArgumentParser takes a bare flag as true.
        lowered = "true" if text is None else text.lower()
        if lowered not in (*_TRUE, *_FALSE):
            raise ValueError(text)
        return lowered in _TRUE
    if text is None:
        raise ValueError(text)
    return {"int": int, "float": float, "str": str}[name](text)


def _set_keys(translated: Translated, flags: Flags, values: Values) -> Iterator[str]:
    """Sets the keys of flags that have one to themselves; yields problems."""
    for flag, row in flags.items():
        value = values[flag]
        # A null without a meaning leaves the recipe's default.
        if "to" not in row or (value is None and "values" not in row):
            continue
        if "values" in row:
            if value not in row["values"]:
                names = ", ".join(map(str, row["values"]))
                yield f"--{flag} {value}: not one of {names}"
                continue
            value = row["values"][value]
        translated.set(row["to"], value)


def _start(call: Call, translated: Translated) -> Iterator[str]:
    """Chooses the model: by its id, or from parts."""
    values = call.values
    parts = {"vision_path": "vision", "llm_path": "language", "mlp_path": "projector"}
    stated = {key: values[flag] for flag, key in parts.items() if values[flag]}
    name = values["model_name_or_path"]
    if not name:
        for flag in ("vision_path", "llm_path"):
            if not values[flag]:
                yield f"--{flag}: missing; give it, or --model_name_or_path"
        for key, value in stated.items():
            translated.set(f"model.{key}", value)
        translated.set("model.template", values["conv_style"])
        translated.set("model.ps_version", values["ps_version"])
        translated.set("model.select_layer", values["vision_select_layer"])
        if "ps_version" not in call.chosen:
            translated.notes.append(
                "--ps_version: not given, so v2, the original's default today; InternVL-Chat-V1-2 "
                "was released with v1: add --ps_version v1 for it"
            )
        return
    # Refused: somebody who gives both means something else.
    if "vision" in stated or "language" in stated:
        yield "--vision_path, --llm_path: the original ignores them with --model_name_or_path"
    if "projector" in stated:
        yield "--mlp_path: replaces the projector of parts only; leave it out for a whole model"
    translated.set("model.id", name)
    translated.set("data.template", values["conv_style"])
    config = _checkpoint_config(call.folder / name)
    for flag, key in (("ps_version", "ps_version"), ("vision_select_layer", "select_layer")):
        # A released model computes as its config says; another value would spoil its weights.
        if config is not None and config.get(key, values[flag]) != values[flag]:
            yield (
                f"--{flag} {values[flag]}: {name} has {config[key]}, with which its weights were "
                f"trained; give --{flag} {config[key]}"
            )


def _checkpoint_config(folder: Path) -> dict[str, Any] | None:
    """Returns config.json of a model folder; None for a hub id or a run."""
    file = folder / "config.json"
    return read_object(file) if file.is_file() else None


def _trained(call: Call, translated: Translated) -> Iterator[str]:
    """Chooses what trains in a chat model: freezing, adapters, the tower's last blocks."""
    values = call.values
    ranks = {
        "vision_tower": values["use_backbone_lora"],
        "language_model": values["use_llm_lora"],
    }
    yield from _adapters(translated, ranks, ("use_backbone_lora", "use_llm_lora"))
    frozen = {
        "vision_tower": values["freeze_backbone"],
        "multi_modal_projector": values["freeze_mlp"],
        "language_model": values["freeze_llm"],
    }
    # PEFT freezes what it wraps, whatever the flags say.
    parts = [name for name, is_frozen in frozen.items() if not is_frozen and not ranks.get(name)]
    translated.set("model.train", parts)
    blocks = values["unfreeze_vit_layers"]
    if not blocks or "vision_tower" in parts:
        return
    if ranks["vision_tower"]:
        yield "--unfreeze_vit_layers: not together with --use_backbone_lora; leave one out"
        return
    if blocks > 0:
        # `layers[n:]`: a positive number counts from the first block.
        config = _checkpoint_config(call.folder / str(values["model_name_or_path"])) or {}
        depth = config.get("vision_config", {}).get("num_hidden_layers")
        if depth is None:
            yield (
                f"--unfreeze_vit_layers {blocks}: trains all blocks but the first {blocks}, and how"
                f" many there are shows in config.json only; give --unfreeze_vit_layers -N"
            )
            return
        # Counted from the end, as the recipe does.
        blocks -= depth
    translated.set("model.train_last_vision_blocks", -blocks)


def _adapters(
    translated: Translated, ranks: Mapping[str, int], flags: tuple[str, str]
) -> Iterator[str]:
    """Sets adapters of one rank."""
    adapted = {name: rank for name, rank in ranks.items() if rank}
    if len(set(adapted.values())) > 1:
        yield f"--{flags[0]}, --{flags[1]}: adapters have one rank here; give both the same"
    if adapted:
        lora = {"rank": next(iter(adapted.values())), "on": list(adapted)}
        translated.set("model.lora", lora)


def _tiles(call: Call, translated: Translated) -> Iterator[str]:
    values = call.values
    # The thumbnail needs no case: an image of one tile gets none.
    tiled = values["dynamic_image_size"]
    translated.set("data.tiles.min", values["min_dynamic_patch"] if tiled else 1)
    translated.set("data.tiles.max", values["max_dynamic_patch"] if tiled else 1)
    yield from ()


def _packing(call: Call, translated: Translated) -> Iterator[str]:
    """Sets rows and their losses; without packing the original's samples are rows of their own."""
    values = call.values
    # The original never shows an image for two samples at once.
    translated.set("data.share_prefix", False)
    if not values["use_packed_ds"]:
        packed = ("num_images_expected", "max_packed_tokens", "max_buffer_size", "allow_overflow")
        for flag in (*packed, "loss_reduction", "loss_reduction_all_gather"):
            if flag in call.chosen:
                translated.notes.append(f"--{flag}: changes nothing without --use_packed_ds True")
        return
    translated.set("data.packing", "official")
    translated.set("data.max_tiles", values["num_images_expected"])
    translated.set("data.row_tokens", values["max_packed_tokens"])
    translated.set("data.packing_buffers", values["max_buffer_size"])
    translated.set("objective.weighting", values["loss_reduction"])
    # Averaged weights of all ranks give the mean over the step.
    gathered = values["loss_reduction_all_gather"]
    translated.set("objective.loss_normalization", "global" if gathered else "micro_batch")
    if values["allow_overflow"]:
        yield "--allow_overflow True: a step is counted in rows here, and rows hold whole samples"
    if values["max_packed_tokens"] < values["max_seq_length"]:
        yield "--max_packed_tokens: smaller than --max_seq_length, so a sample may fit no row"


def _batch(call: Call, translated: Translated) -> Iterator[str]:
    values = call.values
    per_device, accumulated = (
        values["per_device_train_batch_size"],
        values["gradient_accumulation_steps"],
    )
    if accumulated < 1:
        whole = per_device * call.num_gpus
        yield (
            f"--gradient_accumulation_steps {accumulated}: {call.num_gpus} GPUs x {per_device} "
            f"samples are {whole} already; give BATCH_SIZE={whole} or more, fewer GPUS or a "
            "smaller PER_DEVICE_BATCH_SIZE"
        )
        return
    if per_device < 1:
        yield f"--per_device_train_batch_size {per_device}: at least 1"
        return
    count = per_device * call.num_gpus * accumulated
    if values.get("use_packed_ds"):
        # Attention of its packed rows takes one row only.
        if per_device != 1:
            yield "--per_device_train_batch_size: 1 with --use_packed_ds True, as in the original"
        translated.set("global_batch_rows", count)
        return
    translated.set("global_batch", count)
    # transformers leaves out what fills no whole step of accumulated batches.
    translated.set("drop_last", accumulated > 1 or values["dataloader_drop_last"])


def _duration(call: Call, translated: Translated) -> Iterator[str]:
    values = call.values
    # Both are given in some scripts; transformers takes the steps.
    if values["max_steps"] > 0:
        translated.set("steps", values["max_steps"])
        if "num_train_epochs" in call.chosen:
            translated.notes.append("--num_train_epochs: changes nothing beside --max_steps")
    elif values.get("use_packed_ds"):
        yield "--use_packed_ds True: how many rows an epoch has shows too late; give --max_steps"
    else:
        translated.set("epochs", values["num_train_epochs"])


def _betas(call: Call, translated: Translated) -> Iterator[str]:
    translated.set("optim.betas", [call.values["adam_beta1"], call.values["adam_beta2"]])
    yield from ()


def _schedule(call: Call, translated: Translated) -> Iterator[str]:
    """Sets learning rates over the steps."""
    values = call.values
    name, steps, ratio = (
        values[flag] for flag in ("lr_scheduler_type", "warmup_steps", "warmup_ratio")
    )
    # Steps win in transformers.
    if steps > 0:
        translated.set("optim.warmup_steps", steps)
    translated.set("optim.warmup_ratio", ratio)
    # Files of internvl_chat have no scheduler, those of internvl_g have.
    if values["deepspeed"] and "dataset_name" in values:
        translated.set("optim.schedule", "as_shipped")
        translated.notes.append(
            f"--lr_scheduler_type {name}: changes nothing, for {values['deepspeed']} schedules "
            'itself ("type": "WarmupDecayLR"); set optim.schedule: cosine for the cosine'
        )
        return
    if name == "cosine":
        translated.set("optim.schedule", "cosine")
    elif name in ("constant", "constant_with_warmup"):
        translated.set("optim.schedule", "wsd")
        translated.set("optim.decay_ratio", 0.0)
        if name == "constant":
            translated.set("optim.warmup_steps", 0)
    elif name == "linear" and (steps <= 0 or values["max_steps"] > 0):
        # From the peak down to 0 without a plateau.
        share = steps / values["max_steps"] if steps > 0 else ratio
        translated.set("optim.schedule", "wsd")
        translated.set("optim.decay_ratio", 1.0 - share)
    elif name == "linear":
        yield "--lr_scheduler_type linear: with --warmup_steps it needs --max_steps here"
    else:
        yield f"--lr_scheduler_type {name}: not one of cosine, linear, constant(_with_warmup)"


def _saving(call: Call, translated: Translated) -> Iterator[str]:
    values = call.values
    strategy, every = values["save_strategy"], values["save_steps"]
    # How many steps an epoch has is not known before the data are read.
    if strategy == "epoch":
        yield "--save_strategy epoch: checkpoints come every --save_steps here; give steps"
        return
    if strategy not in ("steps", "no"):
        yield f"--save_strategy {strategy}: not one of steps, no"
        return
    translated.set("checkpoint.every", every if strategy == "steps" else 0)
    translated.set("checkpoint.keep", values["save_total_limit"] or _ALL_CHECKPOINTS)


def _checkpointing(call: Call, translated: Translated) -> Iterator[str]:
    values = call.values
    # The 14B entry switches it on itself.
    if values["gradient_checkpointing"] or "dataset_name" in values:
        translated.set("compute.checkpointing", "full")
    yield from ()


def _shards(call: Call, translated: Translated) -> Iterator[str]:
    """Sets shards by the stage of a DeepSpeed file."""
    name = call.values["deepspeed"]
    if not name:
        return
    file = call.folder / name
    # The user's own file counts, else the stage in the name of the original's.
    if file.is_file():
        stated = read_object(file).get("zero_optimization", {})
        stage, offload = stated.get("stage", 0), any("offload" in key for key in stated)
    else:
        digits = [word for word in Path(name).stem.split("_") if word.startswith("stage")]
        text = digits[0].removeprefix("stage") if digits else ""
        if text not in ("1", "2", "3"):
            yield f"--deepspeed {name}: no such file, and its name tells no stage"
            return
        stage, offload = int(text), "offload" in name
    if stage:
        translated.set("parallel.shard", f"zero{stage}")
        translated.set("parallel.offload", "cpu" if offload else "none")


def _report(call: Call, translated: Translated) -> Iterator[str]:
    name = call.values["report_to"]
    if name == "wandb":
        translated.set("wandb", call.environment.get("WANDB_PROJECT") or "huggingface")
    elif name not in ("tensorboard", "all", "none"):
        yield f"--report_to {name}: not one of tensorboard, wandb, all, none"


def _pair_source(call: Call, translated: Translated) -> Iterator[str]:
    """Sets the data of InternVL-14B by the name of a set."""
    try:
        source = pair_sources.find(call.values["dataset_name"], call.folder / call.entry_file)
    except ConfigError as error:
        yield str(error)
        return
    translated.set("data.sources", [source])
    # InternVL-14B never cuts an image.
    translated.set("data.tiles.max", 1)


def _trained_pairs(call: Call, translated: Translated) -> Iterator[str]:
    """Chooses what trains in InternVL-14B."""
    values = call.values
    ranks = {
        "vision_tower": values["use_backbone_lora"],
        "language_model": values["use_qllama_lora"],
    }
    yield from _adapters(translated, ranks, ("use_backbone_lora", "use_qllama_lora"))
    if ranks["language_model"] and not ranks["vision_tower"]:
        yield (
            "--use_qllama_lora without --use_backbone_lora: the original scales these adapters by "
            "twice the backbone's rank, so by 0 (lora_alpha=model_args.use_backbone_lora * 2)"
        )
    frozen, crossattn = values["freeze_model"], values["unfreeze_crossattn"]
    # PEFT freezes what it wraps.
    qllama_frozen = frozen or values["freeze_qllama"] or bool(ranks["language_model"])
    parts = []
    if not (frozen or values["freeze_vision_model"] or ranks["vision_tower"]):
        parts.append("vision_tower")
    if not qllama_frozen:
        parts.append("language_model")
    elif frozen and crossattn:
        yield (
            "--unfreeze_crossattn with --freeze_model: cross-attention trains together with its "
            "queries here; leave --freeze_model out"
        )
    elif not frozen:
        if not crossattn:
            yield (
                "--freeze_qllama without --freeze_model: the queries would train without the "
                "cross-attention that reads them; add --unfreeze_crossattn or --freeze_model"
            )
        parts.append("queries")
    if not frozen:
        parts.append("heads")
    elif values["unfreeze_qllama_head"]:
        parts.append("text_projection")
    if values["unfreeze_qllama_head"] and qllama_frozen:
        parts.append("lm_head")
    translated.set("model.train", parts)


def _layer_decay(call: Call, translated: Translated) -> Iterator[str]:
    # transformers leaves out biases and norms alone, not the logit scale.
    translated.set("optim.decay_scalars", True)
    if not call.values["use_custom_trainer"]:
        return
    rates = {"vision": "VIT_LAYER_DECAY_RATE", "qllama": "QLLAMA_LAYER_DECAY_RATE"}
    try:
        # The original reads them from the environment, 1.0 without.
        decay = {key: float(call.environment.get(name, "1.0")) for key, name in rates.items()}
    except ValueError as error:
        yield f"{', '.join(rates.values())}: {error}"
        return
    translated.set("optim.layer_decay", decay)


def _objective_of_chat(call: Call, translated: Translated) -> Iterator[str]:
    # DeepSpeed gets all tensors in one group, so all are decayed.
    translated.set("optim.decay_vectors", bool(call.values["deepspeed"]))
    yield from ()


def _preference(call: Call, translated: Translated) -> Iterator[str]:
    """Sets mixed preference optimization: losses of pairs, and of the chosen answers."""
    values = call.values
    if values["use_packed_ds"]:
        yield "--use_packed_ds: not for preference pairs, as in the original"
    if "loss_type" in call.chosen:
        names = [name.strip() for name in values["loss_type"].split(",")]
        unknown = [name for name in names if name not in _LOSSES]
        if unknown:
            yield f"--loss_type {unknown[0]}: not one of {', '.join(_LOSSES)}"
            return
        # A lone loss has no weight there.
        weights = {
            _LOSSES[name]: values.get(f"{name}_loss_weight", 1.0) if len(names) > 1 else 1.0
            for name in names
        }
        if values["rpo_alpha"]:
            weights["sft"] = values["rpo_alpha"]
    else:
        weights = {"dpo": 0.8, "bco": 0.2, "sft": 1.0}
        translated.notes.append(
            "--loss_type: not given, so the losses that InternVL3.5's entry has in its code; older "
            "entries then train DPO alone: add --loss_type sigmoid for it"
        )
    translated.set("objective.name", "mpo")
    translated.set("objective.weights", weights)
    translated.set("objective.beta", values["beta"])
    translated.set("objective.label_smoothing", values["label_smoothing"])
    # Both answers stand in one row.
    translated.set("data.row_tokens", 2 * values["max_seq_length"])
    translated.set("data.on_bad_sample", "skip")


def _objective_of_preference(call: Call, translated: Translated) -> Iterator[str]:
    yield from _objective_of_chat(call, translated)


def _objective_of_pairs(call: Call, translated: Translated) -> Iterator[str]:
    values = call.values
    translated.set("objective.name", "retrieval")
    # For memory only: the loss compares all pairs of a step.
    translated.set("objective.micro_batch", values["per_device_train_batch_size"])
    if values["gradient_accumulation_steps"] > 1:
        translated.notes.append(
            "--gradient_accumulation_steps: the loss compares all pairs of a step; the original "
            "compares those of one forward pass"
        )
    yield from ()


Rule = Callable[[Call, Translated], Iterator[str]]
RULES: dict[str, Rule] = {
    "start": _start,
    "trained": _trained,
    "tiles": _tiles,
    "packing": _packing,
    "batch": _batch,
    "duration": _duration,
    "betas": _betas,
    "schedule": _schedule,
    "saving": _saving,
    "checkpointing": _checkpointing,
    "shards": _shards,
    "report": _report,
    "pair_source": _pair_source,
    "trained_pairs": _trained_pairs,
    "layer_decay": _layer_decay,
    "preference": _preference,
    "objective_of_chat": _objective_of_chat,
    "objective_of_preference": _objective_of_preference,
    "objective_of_pairs": _objective_of_pairs,
}
"""Rule of flags.yaml -> what sets its keys and yields its problems."""
