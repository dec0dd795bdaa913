"""Checkpoints: everything that changes in a run, saved completely or not at all.

    checkpoints/000500/         torch.distributed.checkpoint: trained weights, optimizer
    checkpoints/000500/state.json   the step and what else is a plain number
    checkpoints/LATEST          names the newest one, for people

A checkpoint is written below `.000500.partial` and renamed, so a folder without a dot is complete.
Every rank writes what it alone has, in a thread of its own while the next steps are taken. A run
goes on from a checkpoint with any number of ranks and any sharding.
"""

import errno
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from internvl import dist, log
from internvl.data.sampler import Position
from internvl.errors import CheckpointError, UserError
from internvl.files import read_run_json, remove_partials, write_json, write_text
from internvl.models.tensors import LazyTensor
from internvl.training import moments
from internvl.training.saved_steps import steps as steps

_GO_BACK = "remove this folder to go on from the one before"

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


_LONGEST_WRITE = timedelta(hours=3)
"""Of the slowest rank after the fastest; disks of a cluster stand still at times."""


@dataclass
class _Write:
    """A checkpoint that is being written."""

    step: int
    target: Path
    needed: int
    """Bytes of all ranks."""
    keep: int
    problem: str | None = "its thread ended"
    """Why it was not written; None once it is complete."""
    thread: Thread | None = None
    size: int = 0
    """Bytes on the disk."""
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0


class Saver:
    """Writes checkpoints, one at a time, each complete or not at all.

    Collective: all ranks call its methods at the same steps, and all raise alike.
    """

    def __init__(self, device: torch.device) -> None:
        several = dist.world_size() > 1
        # Of its own: its messages must not meet those of the steps taken meanwhile.
        self._group = distributed.new_group(backend="gloo") if several else None
        # One process on a CPU computes with the cores that would write.
        self._on_gpu = device.type == "cuda"
        self._stager = _stager(device) if several or self._on_gpu else None
        self._write: _Write | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        # Other ranks may not come here, so this one waits for its own thread alone.
        elif issubclass(kind, Exception) and self._write is not None and self._write.thread:
            self._write.thread.join(_JOIN_S)

    def save(
        self,
        folder: Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        keep: int,
        *,
        copy_of: Path | None = None,
    ) -> None:
        """Begins to write checkpoint `step` below `folder`, once the one before is written.

        Returns when the values are copied, or written if there is one process on a CPU.

        Args:
            keep: how many checkpoints stay in `folder`, the newest ones.
            copy_of: a folder of checkpoints; if this step is one, its files are linked instead.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written (disk full, …).
                Nothing partial is left behind.
        """
        self.wait()
        target = folder / f"{step:06d}"
        begun = _begin(target, copy_of) if dist.is_main() else (False, None)
        is_there, problem = dist.from_main(begun)
        if problem is not None:
            raise CheckpointError(problem)
        if is_there:
            return
        tensors = moments.to_save(_tensors(model, optimizer))
        # A file of its own for each setting of each parameter took longer than the values did.
        tensors = {name: value for name, value in tensors.items() if not _is_setting(name)}
        if self._group is not None:
            tensors = _shared_out(tensors)
        needed = dist.sum_counts({"bytes": _num_bytes(tensors)})["bytes"]
        write = _Write(step, target, int(needed), keep)
        self._write = write
        if self._stager is None:
            _write(write, tensors, state, self._group)
            return self.wait()
        if self._group is not None:
            # Here, as the time-out of all groups is shortened after the first step.
            distributed.distributed_c10d._set_pg_timeout(_LONGEST_WRITE, self._group)
        # Copied: the next step changes the tensors while they are written.
        copies = self._stager.stage(tensors, non_blocking=self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()
        arguments = (write, copies, state, self._group)
        write.thread = Thread(target=_write, args=arguments, name="checkpoint", daemon=True)
        write.thread.start()

    def poll(self) -> None:
        """Raises CheckpointError if the last checkpoint could not be written, once that is known
        on every rank."""
        if self._write is None:
            return
        thread = self._write.thread
        is_written = float(thread is None or not thread.is_alive())
        if dist.sum_counts({"written": is_written})["written"] == dist.world_size():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._write is None:
            return
        write, self._write = self._write, None
        if write.thread is not None:
            write.thread.join()
        # Of rank 0 first, which may have failed after the others were done.
        problem = next(filter(None, dist.gather_objects(write.problem)), None)
        if problem is not None:
            raise CheckpointError(problem)
        message = "step %d: checkpoint %s written (%s MiB, %.1f s)"
        mib = f"{write.size / 2**20:,.0f}"
        log.get_logger().info(message, write.step, write.target, mib, write.seconds)


_JOIN_S = 30
"""Of a checkpoint that is being written when the run fails."""


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Writes checkpoint `step`, then removes all but the newest `keep`; see `Saver.save`."""
    with Saver(torch.device("cpu")) as saver:
        saver.save(folder, step, model, optimizer, state, keep)
    return folder / f"{step:06d}"


def _stager(device: torch.device) -> Any:
    """Returns torch's copier of tensors to the CPU's memory, which keeps its buffers."""
    # Not its `DefaultStager`, which torch 2.11 closes after the first checkpoint.
    from torch.distributed.checkpoint._state_dict_stager import StateDictStager

    return StateDictStager(pin_memory=device.type == "cuda", share_memory=False)


def _begin(target: Path, copy_of: Path | None) -> tuple[bool, str | None]:
    """Prepares the folder of a checkpoint; returns (it is there already, problem)."""
    try:
        # A process that was killed while it wrote leaves one.
        remove_partials(target.parent)
        # A step has one state. Another copy would be in the way of the one that is complete.
        if target.exists():
            return True, None
        partial = _partial(target)
        partial.parent.mkdir(parents=True)
        if copy_of is not None and (copy_of / target.name).exists():
            shutil.copytree(copy_of / target.name, partial, copy_function=_link)
            _complete(target, keep=1)
            return True, None
        partial.mkdir()
    except OSError as error:
        return False, _why(error, target, 0)
    return False, None


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial") / target.name


def _link(source: str, target: str) -> None:
    """Links a file, or copies it where links are refused."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write(
    write: _Write,
    tensors: dict[str, Any],
    state: dict[str, Any],
    group: distributed.ProcessGroup | None,
) -> None:
    """Writes this rank's values; on rank 0 also the rest, when all ranks are done."""
    partial = _partial(write.target)
    try:
        # Without a group there is no other rank, and torch would warn of that.
        with _quiet() if group is None else nullcontext():
            dcp.save(tensors, checkpoint_id=partial, process_group=group, no_dist=group is None)
        if dist.is_main():
            write_json(partial / "state.json", {**state, "step": write.step})
            _complete(write.target, write.keep)
            write.size = sum(file.stat().st_size for file in write.target.iterdir())
        write.problem = None
    except (OSError, CheckpointException, RuntimeError) as error:
        if dist.is_main():
            shutil.rmtree(partial.parent, ignore_errors=True)
        write.problem = _why(error, write.target, write.needed)
    write.seconds = time.perf_counter() - write.started


def _complete(target: Path, keep: int) -> None:
    """Renames a checkpoint whose files are all there, then removes all but the newest `keep`."""
    partial = _partial(target)
    partial.rename(target)
    partial.parent.rmdir()
    write_text(target.parent / "LATEST", target.name + "\n")
    # After the new one is complete: a full disk must not cost the old ones.
    for old in steps(target.parent)[:-keep]:
        shutil.rmtree(target.parent / f"{old:06d}")


def _shared_out(tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns what this rank writes: its rows of what is cut, and a share of what all ranks have.

    torch would have every rank copy all of that to the host first, and pin memory for it.
    """
    loads, mine = [0] * dist.world_size(), set()
    sizes = {name: _num_bytes({name: t}) for name, t in tensors.items()}
    # By name among equals: ranks may have them in another order.
    for name in sorted(tensors, key=lambda name: (-sizes[name], name)):
        if not isinstance(tensors[name], DTensor):
            rank = loads.index(min(loads))
            loads[rank] += sizes[name]
            mine |= {name} if rank == dist.rank() else set()
    return {n: t for n, t in tensors.items() if isinstance(t, DTensor) or n in mine}


def _num_bytes(tensors: dict[str, Any]) -> int:
    """Returns the bytes of the values that are on this rank."""
    locals_ = (t.to_local() if isinstance(t, DTensor) else t for t in tensors.values())
    return sum(t.nbytes for t in locals_ if isinstance(t, Tensor))


def load(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads checkpoint `step` into model and optimizer; returns its plain state.

    Each rank reads what it has; all ranks call it, and all raise alike.

    Raises:
        CheckpointError: it does not fit this model, or its files are damaged.
    """
    tensors, state, problem = _tensors(model, optimizer), {}, None
    try:
        state = _read(folder / f"{step:06d}", tensors)
    except CheckpointError as error:
        problem = str(error)
    problem = next(filter(None, dist.gather_objects(problem)), None)
    if problem is not None:
        raise CheckpointError(problem)
    set_optimizer_state_dict(model, optimizer, _prefixed(tensors, "optimizer."), options=_FLAT)
    return state


def _read(source: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Reads this rank's values into `tensors`; returns the plain state. Raises CheckpointError."""
    with _readable(source):
        with _quiet():
            saved = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
            names = {k.removesuffix(moments.CODES) for k in saved}
            for name in tensors.keys() - names:
                # A parameter that no loss has reached yet has no moments; those in `tensors` are
                # zero, but torch made them by a step, which AdamW would count as the first one.
                if _is_moment(name) and name.endswith(".step"):
                    tensors[name] = torch.zeros_like(tensors[name])
            stored = {
                name: value
                for name, value in tensors.items()
                if not _is_setting(name) and (name in names or not _is_moment(name))
            }
            targets, finish = moments.to_load(stored, saved, lambda: _lazy_tensors(source))
            # Without a group: a rank that cannot read must not leave the others waiting.
            dcp.load(targets, checkpoint_id=source, no_dist=True)
            finish()
            tensors |= {
                name: value if moments.is_packed(value) else targets.get(name, value)
                for name, value in stored.items()
            }
        return read_run_json(source / "state.json", _GO_BACK)


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Turns what reading a damaged checkpoint raises into CheckpointError."""
    try:
        yield
    except UserError as error:
        raise CheckpointError(str(error)) from None
    # The metadata is a pickle: damaged, it may raise anything. CheckpointException is no Exception.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {source} ({_first_line(error)}); {_GO_BACK}"
        ) from error


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
    source = folder / f"{step:06d}"
    with _readable(source), _quiet():
        dcp.load(_trained(model), checkpoint_id=source, no_dist=True)


def read_weights(folder: Path, step: int) -> dict[str, LazyTensor]:
    """Returns the trained weights of checkpoint `step` by their names in the model, each read when
    asked for, and only the rows that are.

    Raises:
        CheckpointError: damaged; when a weight is read as well.
    """
    return _prefixed(_lazy_tensors(folder / f"{step:06d}"), "model.")


def _lazy_tensors(source: Path) -> dict[str, LazyTensor]:
    reader = dcp.FileSystemReader(source)
    with _readable(source):
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata.items()
    # What is no tensor (rates of the optimizer, …) is no weight.
    return {
        name: _lazy(reader, name, entry)
        for name, entry in stored
        if isinstance(entry, TensorStorageMetadata)
    }


def _lazy(reader: dcp.FileSystemReader, name: str, entry: TensorStorageMetadata) -> LazyTensor:
    shape, dtype = tuple(entry.size), entry.properties.dtype

    def read(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        rows = torch.empty(sizes, dtype=dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        # The slices of all ranks' files that these rows lie in.
        items = create_read_items_for_chunk_list(name, entry, [chunk])
        with _readable(Path(reader.path)):
            reader.read_data(LoadPlan(items), _Into(rows)).wait()
        return rows

    def read_rows(start: int, stop: int) -> Tensor:
        return read((start, *(0,) * (len(shape) - 1)), (stop - start, *shape[1:]))

    return LazyTensor(shape, dtype, lambda: read((0,) * len(shape), shape), read_rows)


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Returns the view that an item is copied into."""
        target = self.target
        for dim, (first, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, first, size)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Does nothing: the values are in place."""


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns trained weights and moments by name; loading writes into these tensors."""
    state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    return {**_trained(model), **{f"optimizer.{k}": v for k, v in state.items()}}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    # Not `.data`: loading must raise the version counter, by which fused adapters see new weights.
    return {f"model.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _is_moment(name: str) -> bool:
    return name.startswith("optimizer.state.")


def _is_setting(name: str) -> bool:
    """True for a parameter's rate, decay, …, which the recipe and the step decide."""
    return name.startswith("optimizer.param_groups.")


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
    errno_of = getattr(_first(error), "errno", None)
    if free < 1.02 * needed or errno_of in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: checkpoint {target} needs {needed / 2**20:.0f} MiB and "
            f"{free / 2**20:.0f} MiB are free; it was not written, earlier ones are untouched. "
            "Free some space, or lower checkpoint.keep; the same command then goes on"
        )
    return (
        f"checkpoint {target} was not written: {_first_line(error)}; earlier ones are untouched. "
        f"It needs {needed / 2**20:.0f} MiB: check the rights, the quota and the largest file "
        "(ulimit -f) that you have there; the same command then goes on"
    )


def _first(error: BaseException) -> BaseException:
    """Returns the error of the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _first_line(error: BaseException) -> str:
    error = _first(error)
    readable = OSError | CheckpointException | RuntimeError | ValueError | EOFError
    if not isinstance(error, readable):  # the words of a damaged pickle's errors say nothing
        return "it is damaged"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
