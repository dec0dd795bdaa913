"""Where a model lives and how it computes: whole on every rank, gradients summed. Every function
takes the model as it is, so sharding over a mesh is a change of this file alone.

place       weights on their device and in their type
arrange     attention, float8, joined adapters, the last block's MLP, checkpointing, compiled
            blocks, in this order
pad         rows to one of a few lengths, so that few shapes are compiled
ahead       the next step made while this one is worked on
on_device   the next row copied while this one is worked on
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl import dist
from internvl.config import ComputeConfig, DataConfig
from internvl.data.packing import ROW_SHARES
from internvl.data.records import Batch, PackedBatch
from internvl.errors import UserError
from internvl.models import configs
from internvl.models.adapters import fused_lora
from internvl.models.attention import flash4, packed, per_document
from internvl.models.chat import model as chat_model
from internvl.models.kernels import float8, last_mlp

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


_COMPILE = {"fallback_random": True}
"""Masks of dropout by torch's own generator, which makes four numbers at a time. Inside compiled
kernels every number costs as much as four, and those were bound by it."""


def place(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """The model on its device: trained weights in float32, frozen ones in the compute type.

    Every rank has all of it, made from the same files and seed.
    """
    for parameter in model.parameters():
        kind = torch.float32 if parameter.requires_grad else DTYPES[dtype]
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, kind)
    return model.to(device)


def arrange(model: Any, device: torch.device, compute: ComputeConfig) -> None:
    """Join adapters with their weights, choose attention, cut what no loss reads, choose what is
    computed again, and compile.

    Names and values of weights stay as they are, but for the frozen ones under `compute.float8`.

    Raises:
        UserError: float8 products that this GPU does not have, or nothing frozen to use them for.
    """
    torch.set_float32_matmul_precision("high" if compute.tf32 else "highest")
    model.loss_chunk = compute.loss_chunk
    packs = isinstance(model, chat_model.ChatModel)
    kind = _attention(compute, device)
    if packs and kind in ("flex", "flash"):
        packed.register()
        model.set_attn_implementation(_kernels(kind, model.config.text_config))
    elif kind == "flash":
        packed.register()
        model.model.vision_tower.set_attn_implementation(packed.TOWER)
    elif packs and kind == "eager":
        text = "eager"
        # What is so already needs more of its attention than scores (GPT-OSS's sinks).
        if device.type == "cpu" and model.config.text_config._attn_implementation != "eager":
            per_document.register()
            text = per_document.DOCUMENTS
        model.set_attn_implementation({"text_config": text, "vision_config": "eager"})
    if compute.float8:
        float8.freeze(model, device)
    fused_lora.join(model)  # with the weights that are left
    if packs:
        last_mlp.cut(model.model.language_model.layers)
    if compute.checkpointing != "none":
        _checkpoint(model, 1 if compute.checkpointing == "full" else 2)
    if _compiles(compute, device):
        for block in model.model.language_model.layers:
            # Rows have few lengths, captions many.
            block.compile(dynamic=not packs, options=_COMPILE)
        for block in model.model.vision_tower.encoder.layer:
            block.compile(dynamic=True, options=_COMPILE)  # any number of tiles


_KERNELS = {
    "flex": {"text_config": packed.FLEX},
    "flash": {"text_config": packed.FLASH, "vision_config": packed.TOWER},
}


def _kernels(kind: str, text: Any) -> dict[str, str]:
    """What the parts of a chat model attend with, by the names of their configurations."""
    names = _KERNELS[kind]
    if kind == "flash" and configs.head_width(text) not in flash4.WIDTHS:
        names = names | {"text_config": packed.FLEX}
    return names


def possible(compute: ComputeConfig, device: torch.device) -> ComputeConfig:
    """The same settings, attention chosen anew where this device has no FlashAttention 4."""
    if compute.attention == "flash" and not packed.has_flash(device):
        return replace(compute, attention="auto")
    return compute


def _attention(compute: ComputeConfig, device: torch.device) -> str:
    """What `auto` stands for on this device, and what was asked for is there.

    Raises:
        UserError: FlashAttention 4 is asked for and not there.
    """
    if compute.attention == "flash" and not packed.has_flash(device):
        raise UserError(
            "compute.attention: flash needs FlashAttention 4 and a GPU of compute capability 9 or "
            "10 (Hopper, Blackwell): pip install 'internvl[flash]', or compute.attention=flex"
        )
    if compute.attention != "auto":
        return compute.attention
    if device.type != "cuda":
        return "dense"
    return "flash" if packed.has_flash(device) else "flex"


def _compiles(compute: ComputeConfig, device: torch.device) -> bool:
    return device.type == "cuda" if compute.compile is None else compute.compile


def _checkpoint(model: Any, every: int) -> None:
    """Every `every`-th block of the parts that train is computed again in the backward pass."""
    for part in (model.model.language_model, model.model.vision_tower):
        if any(parameter.requires_grad for parameter in part.parameters()):
            part.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
            # transformers lets the embeddings ask for gradients, which only reentrant
            # checkpointing needs: everything below the first trained layer would be run back.
            part.disable_input_require_grads()


def row_lengths(compute: ComputeConfig, device: torch.device, data: DataConfig) -> tuple[int, ...]:
    """Lengths that rows are padded to, ascending; none where any length does."""
    auto = compute.attention == "auto" and device.type == "cuda"
    if not (auto or compute.attention in _KERNELS or _compiles(compute, device)):
        return ()
    longest = data.row_tokens or data.max_tokens
    blocks = {math.ceil(longest * share / packed.BLOCK) for share in ROW_SHARES}
    return tuple(sorted(number * packed.BLOCK for number in blocks))


def pad(row: PackedBatch, lengths: Sequence[int]) -> PackedBatch:
    """The row with padding up to the first of `lengths` that holds it.

    Padding is documents -1, -2, … of a block each: attention among it costs next to nothing.
    """
    tokens = len(row.document)
    missing = next((length for length in lengths if length >= tokens), tokens) - tokens
    if not missing:
        return row
    padding = -1 - torch.arange(missing) // packed.BLOCK
    starts = row.starts
    if starts is not None:
        ends = torch.arange(tokens, tokens + missing, packed.BLOCK, dtype=starts.dtype)[1:]
        starts = torch.cat([starts, ends, starts.new_tensor([tokens + missing])])
    return replace(
        row,
        input_ids=F.pad(row.input_ids, (0, missing)),
        position_ids=F.pad(row.position_ids, (0, missing)),
        document=torch.cat([row.document, padding]),
        branch=F.pad(row.branch, (0, missing)),
        starts=starts,
    )


def pin(row: Any) -> Any:
    """The batch in memory that a GPU can copy from by itself."""
    pinned: dict[str, Any] = {name: t.pin_memory() for name, t in _tensors(row).items()}
    return replace(row, **pinned)


def _tensors(row: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(row).items() if isinstance(value, Tensor)}


def ahead(items: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Items in order with the seconds waited for each; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while True:
            started = time.perf_counter()
            item = following.result()
            if item is None:
                return
            following = thread.submit(next, items, None)
            yield item, time.perf_counter() - started


@cache
def _copy_stream(device: torch.device) -> Any:
    """One for all steps: torch keeps freed memory apart for every stream that it was made on."""
    return torch.cuda.Stream(device)


def on_device(rows: Sequence[Batch], device: torch.device) -> Iterator[Any]:
    """Each batch on the device; the next one is copied while this one is worked on."""
    if device.type != "cuda":
        yield from (row.to(device) for row in rows)
        return
    work, copies = torch.cuda.current_stream(device), _copy_stream(device)

    def copy(number: int) -> Any:
        with torch.cuda.stream(copies):
            return rows[number].to(device) if number < len(rows) else None

    following = copy(0)
    for number in range(1, len(rows) + 1):
        row = following
        assert row is not None
        work.wait_stream(copies)
        for tensor in _tensors(row).values():
            tensor.record_stream(work)  # made on one stream, freed after use on the other
        following = copy(number)
        yield row


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[None]:
    """Matrix products in the compute type; nothing changes for float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


_LEAST_OFFLOADED = 4096  # bytes; smaller tensors stay where they are


def offloaded(
    model: nn.Module, device: torch.device, compute: ComputeConfig
) -> AbstractContextManager[Any]:
    """With `compute.offload`, what is saved inside for the backward pass waits on the CPU.

    Weights stay. Copies are on the stream that computes, so nothing is freed or read too early.
    """
    if not compute.offload:
        return nullcontext()
    weights = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(model.parameters(), model.buffers())
    }

    def copied(tensor: Tensor, home: torch.device) -> Tensor:
        # Compiled code relies on the strides it has seen.
        pinned = device.type == "cuda" and home.type == "cpu"
        copy = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=home, pin_memory=pinned
        )
        return copy.copy_(tensor, non_blocking=True)

    def leave(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        stays = (
            tensor.device.type != device.type
            or tensor.nbytes < _LEAST_OFFLOADED
            or 0 in tensor.stride()
            or tensor.untyped_storage().data_ptr() in weights
        )
        return tensor if stays else (tensor.device, copied(tensor, torch.device("cpu")))

    def fetch(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return saved if isinstance(saved, Tensor) else copied(saved[1], saved[0])

    return torch.autograd.graph.saved_tensors_hooks(leave, fetch)


def attending(compute: ComputeConfig) -> AbstractContextManager[Any]:
    """torch's own attention inside writes its scores out, where the recipe says so.

    A chat model is told by `arrange`; InternVL-14B calls torch's attention in many places.
    """
    eager = compute.attention == "eager"
    return sdpa_kernel(SDPBackend.MATH) if eager else nullcontext()


def several_shapes() -> AbstractContextManager[None]:
    """Lets torch keep the code for every row length; by itself it gives up at eight graphs."""
    return torch._dynamo.config.patch(recompile_limit=64)


@contextmanager
def compiling(compute: ComputeConfig, device: torch.device) -> Iterator[None]:
    """Inside, code is built for the first time.

    Raises:
        UserError: FlashAttention 4 and this torch do not go together, and what to do.
    """
    try:
        with several_shapes():
            yield
    except (BackendCompilerFailed, TypeError) as error:  # TypeError: called as another version is
        if _attention(compute, device) != "flash":
            raise
        raise UserError(
            "FlashAttention 4 does not run as this torch calls it "
            f"({str(error).strip().splitlines()[0]}): take another version of flash-attn-4, or do "
            "without it, compute.attention=flex"
        ) from error


def same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside is not missed afterwards: the generators' states come back."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def uncompiled() -> AbstractContextManager[None]:
    """Compiled blocks run as they are written: generation has a new shape for every token."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(device: torch.device, dtype: str) -> Iterator[None]:
    """How a run's evaluations compute, in the run and from outside: compiled blocks as they are
    written, matrix products in the compute type."""
    with autocast(device, dtype), uncompiled():
        yield


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Inside, so many CPU threads compute; None leaves them as they are."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def compiled() -> Iterator[None]:
    """Inside `uncompiled`, for rows of one length: compiled blocks are again."""
    with torch.compiler.set_stance("default"), several_shapes():
        yield


def seed(number: int, step: int) -> None:
    """Random numbers that depend on the recipe's seed, the step and the rank alone: no state of a
    generator needs to be saved, and ranks do not drop the same units."""
    mixed = np.random.SeedSequence((number, step, dist.rank())).generate_state(2, np.uint32)
    torch.manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)


_BUCKET = 2**26  # elements that cross the network at once


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Adds up the gradients of all ranks on each. A parameter that no rank has one for gets none.

    Losses are divided by counts over all ranks beforehand, so the sum is the whole step's gradient.
    """
    if dist.world_size() == 1:
        return
    has = {str(i): float(p.grad is not None) for i, p in enumerate(parameters)}
    anywhere = dist.sum_counts(has)
    wanted = [p for i, p in enumerate(parameters) if anywhere[str(i)]]
    for bucket in _buckets(wanted):
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket]
        summed = torch.cat(parts)
        distributed.all_reduce(summed)
        for p, part in zip(bucket, summed.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, of one type at a time, `_BUCKET` elements or little more together."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) >= _BUCKET
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a global norm of `max_norm`; returns the norm before."""
    return nn.utils.clip_grad_norm_(list(parameters), max_norm)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
