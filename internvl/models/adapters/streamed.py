"""Weights of a run with its adapters merged, each computed when it is read. Imports no PEFT."""

from collections.abc import Mapping

import torch
from torch import Tensor

from internvl.config import LoraConfig
from internvl.models.tensors import LazyTensor

_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def merged(
    base: Mapping[str, LazyTensor],
    trained: Mapping[str, LazyTensor],
    config: LoraConfig | None,
    dtype: torch.dtype,
) -> dict[str, LazyTensor]:
    """Returns the weights of a model after training, by the names of `base`.

    Args:
        base: the weights that it began with.
        trained: the weights of a checkpoint by their names in the model that trained; q, k and v
            that share one A have it under q's name.
        config: settings of the adapters.
        dtype: of the weights and adapters that are merged, which are added in float32.
    """
    weights = dict(base)
    for name, tensor in trained.items():
        if _A not in name and _B not in name:
            weights[name.replace(".base_layer.", ".")] = tensor
    for name, up in trained.items():
        if not name.endswith(_B):
            continue
        assert config is not None
        module = name.removesuffix(_B)
        down = trained.get(f"{module}{_A}")
        # Parameters are listed once, so a shared A has one name.
        if down is None:
            down = trained[f"{module.rpartition('.')[0]}.q_proj{_A}"]
        # As `lora.attach` sets it: the original's scale by default.
        scale = (2.0 * config.rank if config.alpha is None else config.alpha) / config.rank
        weight = f"{module}.weight"
        weights[weight] = _adapted(weights[weight], down, up, scale, dtype)
    return weights


def _adapted(
    weight: LazyTensor, down: LazyTensor, up: LazyTensor, scale: float, dtype: torch.dtype
) -> LazyTensor:
    """Returns W + scale B A, (out, in)."""

    def read_rows(start: int, stop: int) -> Tensor:
        # The whole product, whatever the rows: of fewer rows it may be rounded differently.
        b, a = (matrix.read().to(dtype).float() for matrix in (up, down))
        delta = ((b @ a) * scale)[start:stop]
        return (weight.rows(start, stop).to(dtype).float() + delta).to(dtype)

    return LazyTensor(weight.shape, dtype, lambda: read_rows(0, weight.shape[0]), read_rows)
