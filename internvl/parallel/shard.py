"""ZeRO 1 to 3 on torch's `fully_shard`.

Trained parameters become DTensors in float32, cut by rows over the ranks of a copy; frozen ones too
under zero3, in the dtype of the computation. Optimizer state has their shape. The stages differ in
what is whole while a step runs:

    zero1   weights from the first row to the last; gradients, summed over ranks once
    zero2   weights from the first row to the last; gradients of a unit, summed row by row
    zero3   weights and gradients of a unit

All ranks must run the same units in the same order, or their collectives pair up wrongly.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from internvl import dist
from internvl.config import ParallelConfig
from internvl.models import units

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shard(model: Any, config: ParallelConfig, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Cuts the model's parameters over the ranks of `mesh`, unit by unit, on its device.

    Last, after checkpointing and compilation; before the optimizer, which holds the shards. Trained
    parameters are float32 and frozen ones in `dtype` already. A model on the meta device stays
    there, and is loaded shard by shard.

    Args:
        dtype: of the computation.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=_DTYPES[config.reduce],
        # Autocast casts what a product takes; positions and loss weights stay float32.
        cast_forward_inputs=False,
    )
    ignored = set(whole_parameters(model, config))
    _move(ignored, mesh)
    everything = [*model.shard_units()]
    for unit in everything:
        fully_shard(
            unit.module,
            mesh=mesh,
            # The root is needed again at once: its output matrix begins the backward pass.
            reshard_after_forward=config.shard == "zero3" and unit.module is not model,
            mp_policy=policy,
            offload_policy=_offload_policy(config, mesh),
            ignored_params=ignored,
        )
        for method in unit.methods:
            register_fsdp_forward_method(unit.module, method)
    for unit in everything:
        # Sums, not means: losses are divided by counts over all ranks.
        unit.module.set_gradient_divide_factor(1.0)
        # By plain sums, then: gloo knows no scaled ones.
        unit.module.set_force_sum_reduction_for_comms(True)
        if unit.following is not None:
            unit.module.set_modules_to_forward_prefetch([unit.following])
    tower = model.model.vision_tower
    model.keep_in_step(config.shard == "zero3" and not units.stays_whole(tower))


def is_sharded(model: nn.Module) -> bool:
    """Returns whether `shard` has cut the model."""
    return isinstance(model, FSDPModule)


def begin_row(model: nn.Module, config: ParallelConfig, row: int, num_rows: int) -> None:
    """Prepares forward and backward of row `row`, from 1, of a step's rows.

    Collective. After the last one gradients are summed over all ranks.
    """
    if not isinstance(model, FSDPModule):
        return
    is_last = row == num_rows
    if config.shard == "zero1":
        if row == 1:
            # Also units that no row runs: torch looks for their gradients.
            _gather(model)
        model.set_requires_gradient_sync(is_last)
    elif config.replicas > 1:
        # A sum over shards for each row, but one over the copies is enough.
        model.set_requires_all_reduce(is_last)
    # Gathered once a step: between its rows no weight changes.
    if config.shard != "zero3":
        model.set_reshard_after_backward(is_last)


def end_step(model: Any, num_tiles: float) -> None:
    """Frees gathered weights after the last row of a step that has `num_tiles` over all ranks."""
    if is_sharded(model):
        free(model)
        # Without shards such a step leaves the tower as it is, decay and momentum included.
        if not num_tiles:
            model.forget_blank_tiles()


def free(model: nn.Module) -> None:
    """Frees all gathered weights; afterwards all ranks gather them anew, alike."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole(model: nn.Module, config: ParallelConfig) -> Iterator[None]:
    """Gathers all weights; inside, ranks may run different modules, without gradients.

    Collective at its beginning. Takes the memory of the whole model in the computation's dtype.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    try:
        _gather(model)
        yield
    finally:
        free(model)
        # torch does not tell what was set before.
        if config.shard == "zero3":
            model.set_reshard_after_forward(True)
            model.set_reshard_after_forward(False, recurse=False)


@contextmanager
def evaluating(model: nn.Module, config: ParallelConfig) -> Iterator[None]:
    """Prepares the weights for an evaluation, and frees them after it.

    They are gathered once if the stage has them whole in a step too, or if the GPU's free memory
    holds them easily. Otherwise every forward gathers them anew, and ranks stay in step: see
    `lockstep`.
    """
    if not isinstance(model, FSDPModule):
        yield
    elif config.shard != "zero3" or _fits(model):
        with whole(model, config):
            yield
    else:
        try:
            yield
        finally:
            free(model)


def _fits(model: nn.Module) -> bool:
    """Returns whether half of the free memory of every rank's GPU holds all weights."""
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    # Ranks on one machine share its memory, and nothing tells how many would gather there.
    if cut[0].device.type != "cuda":
        return False
    free_bytes, _ = torch.cuda.mem_get_info(cut[0].device)
    free_bytes += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    fits = 2 * sum(p.numel() * p.element_size() for p in cut) <= free_bytes
    # All alike: a rank that gathers waits for the others.
    return dist.sum_counts({"fits": float(fits)})["fits"] == dist.world_size()


def _gather(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def whole_parameters(model: Any, config: ParallelConfig) -> Iterator[nn.Parameter]:
    """Yields the parameters of which every rank keeps all."""
    tower = model.model.vision_tower
    yield from model.whole_parameters()
    yield from tower.parameters() if units.stays_whole(tower) else ()
    if config.shard != "zero3":
        yield from (p for p in model.parameters() if not p.requires_grad)


def _move(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Moves parameters to this rank's device, unless they are yet to be loaded."""
    for parameter in parameters:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(mesh.device_type)


def _offload_policy(config: ParallelConfig, mesh: DeviceMesh) -> OffloadPolicy:
    if config.offload == "none":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
