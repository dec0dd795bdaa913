"""A model or run opened for measuring, and how it computes beside its own evaluations."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from internvl import dist, log
from internvl.compute import backends, compilation, placement
from internvl.errors import ConfigError, UserError, counted
from internvl.inference import load as loading
from internvl.inference.families import LoadOptions
from internvl.inference.opened import OpenedModel
from internvl.models import hub


@dataclass(frozen=True)
class Numerics:
    """How the forward pass is computed, in words: now, and in the run or folder of the model."""

    current: tuple[str, ...]
    reference: tuple[str, ...]
    """The same properties in the same order."""
    reference_name: str

    @property
    def differences(self) -> str:
        """The properties that differ, as in `Measured.computed`; empty if none does."""
        changed = [
            (current, reference)
            for current, reference in zip(self.current, self.reference, strict=True)
            if current != reference
        ]
        if not changed:
            return ""
        current_text, reference_text = (", ".join(words) for words in zip(*changed, strict=True))
        return f"{current_text}; {self.reference_name}: {reference_text}"

    def __str__(self) -> str:
        return self.differences or ", ".join(self.current)


@dataclass(frozen=True)
class Opened:
    """A loaded model and the context in which it is measured."""

    handle: Any
    """A Chat or Dual."""
    computing: AbstractContextManager[None]
    numerics: Numerics


def join(device: str | None, device_map: str | None) -> str | None:
    """Joins the processes that share this evaluation, if any; returns this one's device.

    Raises:
        ConfigError: several processes, and an option that is for a single one.
    """
    joined = dist.init_from_env("cpu" if device == "cpu" else "auto")
    if dist.world_size() == 1:
        return device
    if not dist.is_main():
        log.get_logger().setLevel(logging.WARNING)
    processes = counted(dist.world_size(), "process", "processes")
    if device_map is not None:
        raise ConfigError(
            f"device_map: {device_map} spreads one model over all GPUs of a single process, and "
            f"there are {processes}; start one, or leave the option out"
        )
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"device: {device} is one device, and each of {processes} needs its own; leave the "
            "option out"
        )
    return str(joined)


def load(
    model: OpenedModel,
    device: str | None,
    dtype: str | None,
    device_map: str | None,
    quantize: str | None,
) -> Opened:
    """Loads a model as it is measured.

    Raises:
        UserError: an option that a run does not take.
    """
    if model.recipe is None:
        return _load_folder(model, device, dtype, device_map, quantize)
    # A run is measured as it measures itself: on one device, unquantized.
    if device_map is not None or quantize is not None:
        option = "quantize" if device_map is None else "device_map"
        raise UserError(
            f"{option} = {device_map or quantize!r} is for model folders, and {model.name} is a "
            f"run; `internvl export {model.name} --to FOLDER`, and evaluate FOLDER"
        )
    return _load_run(model, device, dtype)


def _load_run(opened: OpenedModel, device: str | None, dtype: str | None) -> Opened:
    """Loads a run's model as its own evaluations have it; `dtype` replaces the recipe's."""
    recipe = opened.recipe
    assert recipe is not None
    actual_device = loading.resolve_device(device)
    chosen = dtype or recipe.dtype
    run_precision = _precision(recipe.dtype)
    run_precision += " with float8 products" if recipe.compute.float8 else ""
    run_precision += f" on {recipe.model.quantize} weights" if recipe.model.quantize else ""
    # What `auto` meant in the run is unknown, so it does not count as a difference.
    run_device = actual_device.type if recipe.device == "auto" else recipe.device
    computing: AbstractContextManager[None]
    # float16, which no run trains in: all weights in it, as `load` gives any model.
    if chosen not in placement.DTYPES:
        weights_dtype = loading.resolve_dtype(chosen, actual_device)
        options = LoadOptions(device=actual_device, dtype=weights_dtype)
        handle = loading.load_opened(opened, options)
        precision, computing = f"{chosen} weights", nullcontext()
        attention = "torch's own"
    else:
        handle = loading.load_as_trained(opened, actual_device, chosen)
        precision, computing = _precision(chosen), compilation.evaluating(actual_device, chosen)
        attention = backends.available_compute(recipe.compute, actual_device).attention
    numerics = Numerics(
        (precision, actual_device.type, f"attention {attention}"),
        (run_precision, run_device, f"attention {recipe.compute.attention}"),
        "inside the run",
    )
    return Opened(handle, computing, numerics)


def _precision(dtype: str) -> str:
    """Returns a recipe's `dtype` in words."""
    # Not "bfloat16 weights": trained weights are float32 in any case.
    return dtype if dtype == "float32" else f"{dtype} autocast"


def _load_folder(
    model: OpenedModel,
    device: str | None,
    dtype: str | None,
    device_map: str | None,
    quantize: str | None,
) -> Opened:
    """Loads a model that is no run's, all weights in one dtype."""
    options: dict[str, Any] = {"device_map": device_map, "quantize": quantize}
    handle = loading.load(model, device=device, dtype=dtype, **options)
    # So that whoever answers many requests may compile it.
    handle.model.requires_grad_(False)
    loaded_dtype = str(handle.model.dtype).removeprefix("torch.")
    loaded_dtype += f" on {quantize} weights" if quantize else ""
    # A folder that does not say its dtype cannot differ from it.
    stored_dtype = _stored_dtype(Path(handle.folder)) or loaded_dtype
    numerics = Numerics((loaded_dtype,), (stored_dtype,), "the folder's weights")
    return Opened(handle, nullcontext(), numerics)


def _stored_dtype(folder: Path) -> str | None:
    """Returns the dtype of the weights by config.json, or None."""
    if not (folder / "config.json").is_file():
        return None
    config = hub.read_json(folder / "config.json")
    # Newer versions of transformers write `dtype`, earlier ones `torch_dtype`.
    return config.get("dtype") or config.get("torch_dtype")


def fingerprint(model: OpenedModel, numerics: Numerics) -> str:
    """Returns a hash of the weight files' names, sizes and times, and of the precision."""
    # Not of their content, which may be tens of gigabytes.
    states = model.weight_states()
    return blake2b(repr((states, numerics.current)).encode(), digest_size=8).hexdigest()
