"""Fills a model on the meta device with values, each rank with the rows of its own shards."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from internvl.models.tensors import LazyTensor, in_memory


def without_data(model: nn.Module) -> None:
    """Replaces every parameter by one on the meta device; tied ones stay tied, buffers stay."""
    replaced: dict[int, nn.Parameter] = {}
    # Not `model.to("meta")`, which makes two parameters of a tied one.
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                replaced[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = replaced[id(parameter)]


def set_dtypes(model: nn.Module, frozen: torch.dtype) -> None:
    """Sets the dtypes of training: trained weights float32, frozen ones `frozen`."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dtype = torch.float32 if parameter.requires_grad else frozen
            parameter.data = parameter.data.to(dtype)


def allocate(model: nn.Module, device: torch.device, shards_on: torch.device) -> None:
    """Gives every parameter on the meta device memory of its own, without values; moves buffers.

    Args:
        shards_on: device of the parameters that are sharded.
    """
    # Before it moves: `_apply` gives each module a parameter of its own.
    tied = _tied(model)

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        return torch.empty_like(tensor, device=shards_on if isinstance(tensor, DTensor) else device)

    # As `to_empty`, which has one device for all and empties buffers too. FSDP hooks in here.
    model._apply(move)
    for (module, name), *others in tied:
        for other, other_name in others:
            other._parameters[other_name] = module._parameters[name]


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Lists the places of each parameter that has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [entries for entries in places.values() if len(entries) > 1]


def names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters by their names in a model without wrappers and adapters."""
    wrappers = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|base_layer)\.")
    return {wrappers.sub("", name): parameter for name, parameter in model.named_parameters()}


def fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, LazyTensor]) -> None:
    """Reads each rank's rows of every parameter from the tensor of the same name."""
    for name, parameter in parameters.items():
        read_into(parameter, tensors[name])


def fill_drawn(parameters: Mapping[str, nn.Parameter], drawn: Iterable[tuple[str, Tensor]]) -> None:
    """Takes each rank's rows of the drawn tensors; those without a parameter are passed over."""
    for name, values in drawn:
        if name in parameters:
            read_into(parameters[name], in_memory(values))


@torch.no_grad()
def read_into(parameter: Tensor, tensor: LazyTensor) -> None:
    """Reads the rows of a parameter that this rank has, cast to its dtype."""
    if isinstance(parameter, DTensor):
        local: Tensor = parameter.to_local()
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    else:
        local, shape, offset = parameter, tuple(parameter.shape), (0,) * parameter.ndim
    # Of a tensor with fewer rows than ranks; it must not cost the reading of all.
    if local.numel() == 0:
        return
    # Shards are rows. A tensor that is cut along another dimension is read whole.
    values = tensor.rows(offset[0], offset[0] + shape[0]) if parameter.ndim else tensor.read()
    for dim in range(1, parameter.ndim):
        values = values.narrow(dim, offset[dim], shape[dim])
    local.copy_(values)
