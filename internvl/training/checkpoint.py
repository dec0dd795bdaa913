"""Checkpoints: everything that changes in a run, saved completely or not at all.

    checkpoints/000500/         torch.distributed.checkpoint: trained weights, optimizer
    checkpoints/000500/state.json   the step and what else is a plain number
    checkpoints/LATEST          names the newest one, for people

A checkpoint is written below `.000500.partial` and renamed, so a folder without a dot is complete.
"""

import errno
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from internvl.data.sampler import Position
from internvl.errors import CheckpointError, UserError
from internvl.files import (
    complete_folder,
    read_run_json,
    remove_partials,
    write_json,
    write_text,
)
from internvl.training.saved_steps import steps as steps

_GO_BACK = "remove this folder to go on from the one before"

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes checkpoint `step`, then removes all but the newest `keep`.

    Raises:
        CheckpointError: it could not be written (disk full, …). Nothing partial is left behind.
    """
    target = folder / f"{step:06d}"
    tensors = _tensors(model, optimizer)
    try:
        # A process that was killed while it wrote leaves one, which nothing else removes.
        remove_partials(folder)
        with complete_folder(target) as partial:
            with _quiet():
                dcp.save(tensors, checkpoint_id=partial, no_dist=True)
            write_json(partial / "state.json", {**state, "step": step})
            if target.exists():
                shutil.rmtree(target)
        write_text(folder / "LATEST", target.name + "\n")
    except (OSError, CheckpointException, RuntimeError) as error:
        needed = sum(t.nbytes for t in tensors.values() if isinstance(t, Tensor))
        raise CheckpointError(_why(error, target, needed)) from error
    # After the new one is complete: a full disk must not cost the old ones.
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"{old:06d}")
    return target


def load(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads checkpoint `step` into model and optimizer; returns its plain state.

    Raises:
        CheckpointError: it does not fit this model, or its files are damaged.
    """
    source = folder / f"{step:06d}"
    tensors = _tensors(model, optimizer)
    try:
        with _quiet():
            saved = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
            # A parameter that no loss has reached yet has no moments; those in `tensors` are zero.
            stored = {k: v for k, v in tensors.items() if k in saved or not _is_moment(k)}
            dcp.load(stored, checkpoint_id=source, no_dist=True)
            tensors |= stored
        state = read_run_json(source / "state.json", _GO_BACK)
    except UserError as error:
        raise CheckpointError(str(error)) from None
    # The metadata is a pickle: damaged, it may raise anything. CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {source} ({_first_line(error)}); {_GO_BACK}"
        ) from error
    set_optimizer_state_dict(model, optimizer, _prefixed(tensors, "optimizer."), options=_FLAT)
    return state


def whole_number(state: dict[str, Any], key: str) -> int:
    """Returns an integer of a checkpoint's plain state. Raises CheckpointError if there is none."""
    # bool is a subclass of int, and `true` no count.
    value = state.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(
            f"state.json of the newest checkpoint is damaged (`{key}` is {value!r}, not a number); "
            f"{_GO_BACK}"
        )
    return value


def position(state: dict[str, Any]) -> Position:
    """Returns the position in the data of a checkpoint's plain state. Raises CheckpointError."""
    try:
        return TypeAdapter(Position).validate_python(state.get("position"))
    except ValidationError:
        raise CheckpointError(
            "state.json of the newest checkpoint is damaged (`position` is none of a run with "
            f"global_batch_rows); {_GO_BACK}"
        ) from None


def load_weights(folder: Path, step: int, model: nn.Module) -> None:
    """Loads only the trained weights of checkpoint `step` into `model`, for use or export."""
    weights = _trained(model)
    try:
        with _quiet():
            dcp.load(weights, checkpoint_id=folder / f"{step:06d}", no_dist=True)
    except (Exception, CheckpointException) as error:  # see `load`
        source = folder / f"{step:06d}"
        raise CheckpointError(
            f"cannot read the checkpoint {source} ({_first_line(error)}); {_GO_BACK}"
        ) from error


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns trained weights and moments by name; loading writes into these tensors."""
    moments = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    return {**_trained(model), **{f"optimizer.{k}": v for k, v in moments.items()}}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    # Not `.data`: loading must raise the version counter, by which fused adapters see new weights.
    return {f"model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _is_moment(name: str) -> bool:
    return name.startswith("optimizer.state.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's warning that a single process saves without torch.distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield


def _prefixed(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _why(error: BaseException, target: Path, needed: int) -> str:
    """Explains a failed save of `needed` bytes, whose partial folder is removed already."""
    # torch's writers report a full disk in several ways, so free space is read from the disk.
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError:
        free = needed
    errno_of = getattr(error, "errno", None)
    if free < 1.02 * needed or errno_of in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: checkpoint {target} needs {needed / 2**20:.0f} MiB and "
            f"{free / 2**20:.0f} MiB are free; it was not written, earlier ones are untouched. "
            "Free some space (or lower checkpoint.keep) and start the same command again"
        )
    return f"checkpoint {target} was not written: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    readable = OSError | CheckpointException | RuntimeError | ValueError | EOFError
    if not isinstance(error, readable):  # the words of a damaged pickle's errors say nothing
        return "it is damaged"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
