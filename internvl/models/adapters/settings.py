"""Reads an adapter folder: its settings as PEFT's, and its tensors."""

import dataclasses
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import __version__ as peft_version
from torch import Tensor

from internvl import files
from internvl.errors import ModelFolderError
from internvl.models import hub
from internvl.models.adapters.folder import CONFIG_FILE, PICKLED_FILE, SETTINGS_FILE, WEIGHTS_FILE
from internvl.models.config_checks import ValueRule, check_counts, check_settings
from internvl.models.tensors import LazyTensor, in_memory, open_tensors

logger = logging.getLogger(__name__)

MERGE_REMEDY = "merge it with peft (merge_and_unload) and use the merged model"
_REFUSED = {
    "layer_replication": "repeats layers of its base, which then is no InternVL model any more; "
    "train an adapter without it",
    "megatron_config": "is for the layers of Megatron-LM; set it to null if the adapter sits on "
    "plain linear layers",
    "alora_invocation_tokens": "switches the adapter on at a certain place of the text, which is "
    "not computed here and cannot be merged; use the adapter through peft, or train one without it",
    "arrow_config": "routes each token among several adapters, which cannot be merged; combine "
    "them with peft's add_weighted_adapter, and load the result",
    "use_qalora": "is for a base quantized by GPTQ, whose inputs it pools; train an adapter "
    "without it",
}
"""Settings that are not computed here: field -> why, and the remedy."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _or_null(expected: str, allows: Callable[[Any], bool]) -> ValueRule:
    return ValueRule(f"{expected} or null", lambda value: value is None or allows(value))


def _by_name(expected: str, allows: Callable[[Any], bool]) -> ValueRule:
    return _or_null(
        f"an object of layers and {expected}",
        lambda value: isinstance(value, dict) and all(map(allows, value.values())),
    )


def _is_layers(value: Any) -> bool:
    indices = value if isinstance(value, list) else [value]
    # bool is a subclass of int.
    return all(isinstance(index, int) and not isinstance(index, bool) for index in indices)


_NAMES = _or_null("a name or a list of names", _is_names)
_FLAG = _or_null("true or false", lambda value: isinstance(value, bool))
_TYPES: dict[str, ValueRule] = {
    "r": ValueRule("a whole number from 1", _is_rank),
    "lora_alpha": ValueRule("a number", _is_number),
    "lora_dropout": ValueRule("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "rank_pattern": _by_name("whole numbers from 1", _is_rank),
    "alpha_pattern": _by_name("numbers", _is_number),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAMES),
    **dict.fromkeys(("modules_to_save", "target_parameters"), _NAMES),
    "layers_to_transform": _or_null("a number of a layer or a list of them", _is_layers),
    "init_lora_weights": _or_null(
        "true, false or a name", lambda value: isinstance(value, bool | str)
    ),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), _FLAG),
    "ensure_weight_tying": _FLAG,
}
"""Settings that decide what an adapter computes, whose types PEFT itself does not check."""
_HEADS_OF_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_TRAINING_ONLY = ("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "merge_weights", "enable_lora")
"""Keys that other trainers or older versions of PEFT write and that `peft` does not read."""


def read_settings(folder: Path) -> PeftLoraConfig:
    """Reads `adapter_config.json` as PEFT's configuration.

    A key that PEFT does not know is named in the log and has no effect, as in PEFT itself.

    Raises:
        ModelFolderError: no LoRA, or a setting that is not computed here, by name.
    """
    file = folder / CONFIG_FILE
    tree = hub.read_json(file)
    if tree.get("peft_type") != "LORA":
        raise ModelFolderError(
            f"{file}: peft_type = {tree.get('peft_type')!r}; only LoRA adapters are read here, so "
            + MERGE_REMEDY
        )
    # Of the installed PEFT: other versions have others.
    fields = {field.name for field in dataclasses.fields(PeftLoraConfig)}
    _check_unknown(file, {key: value for key, value in tree.items() if key not in fields})
    # Before PEFT sees it: its own errors would not say what to do.
    for key, reason in _REFUSED.items():
        if tree.get(key):
            raise ModelFolderError(f"{file}: {key} = {tree[key]!r} {reason}")
    _check_types(file, tree)
    _check_values(file, tree)
    with foreign_errors(file):
        return PeftLoraConfig(**{key: value for key, value in tree.items() if key in fields})


def _check_unknown(file: Path, unknown: Mapping[str, Any]) -> None:
    for key, value in unknown.items():
        if key.startswith("use_") and value:
            # A switch that is on and that this PEFT does not know surely changes the function.
            raise ModelFolderError(
                f"{file}: {key} = {value!r} is not known to peft {peft_version}; install the peft "
                "that wrote this folder and merge it there, or remove the key if it is about "
                "training alone"
            )
        if value not in (None, False, [], {}) and key not in _TRAINING_ONLY:
            logger.warning(
                "%s: %s is not known to peft %s and has no effect", file, key, peft_version
            )


def _check_types(file: Path, tree: Mapping[str, Any]) -> None:
    """Raises ModelFolderError if a setting that PEFT computes with has the wrong type."""
    for key, rule in _TYPES.items():
        if key in tree and not rule.allows(tree[key]):
            shown = _shown(tree[key])
            raise ModelFolderError(
                f"{file}: {key} is {shown}, {rule.expected} is expected; correct it, or save the "
                "adapter again"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _check_values(file: Path, tree: Mapping[str, Any]) -> None:
    """Raises ModelFolderError for values of known settings that are not computed here."""
    init = tree.get("init_lora_weights", True)
    # PEFT takes this name in upper and lower case.
    if str(init).lower().startswith("corda"):
        raise ModelFolderError(
            f"{file}: init_lora_weights = {init!r} changed the base by statistics that no adapter "
            "folder holds; save it through peft's path_initial_model_for_weight_conversion, which "
            "makes plain LoRA of it"
        )
    if tree.get("task_type") in _HEADS_OF_TASKS:
        raise ModelFolderError(
            f"{file}: task_type = {tree['task_type']!r} has a head of its own, which a chat model "
            "has not; use the adapter through peft"
        )
    if tree.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ModelFolderError(f"{file}: bias = {tree['bias']!r}; it is none, all or lora_only")
    if not tree.get("target_modules") and not tree.get("target_parameters"):
        raise ModelFolderError(
            f"{file}: names no target_modules; copy the adapter folder again, or set it to the "
            "layers that the adapters sit on"
        )


@contextmanager
def foreign_errors(file: Path) -> Iterator[None]:
    """Turns PEFT's exceptions into a ModelFolderError and its warnings into lines of the log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except ModelFolderError:
            raise
        # For a setting it cannot use PEFT raises ValueError, TypeError, KeyError, re.error,
        # ImportError and others.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, AttributeError):  # of a value of another type than PEFT's
                reason = "a setting is of another type"
            raise ModelFolderError(
                f"{file}: peft {peft_version} cannot use it ({reason}); correct the setting, or "
                "save the adapter again"
            ) from error
    # Counted: PEFT warns once for each layer, in the same words.
    lines = Counter(str(warning.message).strip().splitlines()[0] for warning in caught)
    for line, count in lines.items():
        times = "" if count == 1 else f" ({count} times)"
        logger.warning("%s: %s%s", file, line, times)


def read_tensors(folder: Path) -> tuple[Path, dict[str, LazyTensor]]:
    """Returns (file, tensors by their names in it); safetensors first, as PEFT does.

    Raises:
        ModelFolderError: no such file, or one that is damaged or empty.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file() and (folder / PICKLED_FILE).is_file():
        file = folder / PICKLED_FILE
        tensors = {name: in_memory(tensor) for name, tensor in _unpickled(file).items()}
    elif not file.is_file():
        raise ModelFolderError(f"{file}: missing; copy the adapter folder again")
    else:
        tensors = dict(open_tensors(file))
    if not tensors:
        raise ModelFolderError(f"{file}: holds no tensors; copy the adapter folder again")
    return file, tensors


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        # Not mapped as a model's files are: adapters are small, and old files cannot be mapped.
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    # torch's unpickler raises anything for a damaged or foreign file.
    except Exception as error:
        raise ModelFolderError(
            f"{file}: not a plain file of tensors ({files.pickle_problem(error)}); copy the "
            "adapter folder again, or save it as safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelFolderError(
            f"{file}: not a plain dict of tensors; save the adapter again with save_pretrained"
        )
    return {str(name): tensor for name, tensor in loaded.items()}


def settings_of(folder: Path) -> dict[str, Any]:
    """Reads the official keys of images and conversations that adapters were trained with.

    Empty for adapters of others, which are used with the settings of their base.

    Raises:
        ModelFolderError: a value of the wrong type.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    settings = hub.read_json(file)
    check_settings(file, settings)
    fewest, most = "min_dynamic_patch", "max_dynamic_patch"
    if settings.get(fewest) is not None and settings.get(most) is not None:
        check_counts(file, "", (fewest, settings[fewest]), (most, settings[most]))
    return settings
