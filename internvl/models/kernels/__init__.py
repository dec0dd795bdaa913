"""Faster forms of single layers, each held to a slow twin by its tests; README.md lists them.

The rest of the package knows this file alone, so that a kernel can be deleted in one place.
"""

from typing import Any

import torch
from torch import nn

from internvl.config import ComputeConfig
from internvl.models.kernels import float8, float8_mlp, gelu, last_mlp, patch_embed
from internvl.models.kernels.float8 import convert_frozen_linears as convert_frozen_linears
from internvl.models.kernels.float8 import is_used as uses_float8
from internvl.models.kernels.last_mlp import SelectiveBlock as SelectiveBlock
from internvl.models.kernels.last_mlp import run_selected as run_selected
from internvl.models.kernels.last_mlp import select_positions as select_positions
from internvl.models.kernels.last_mlp import supports as supports_last_mlp
from internvl.models.kernels.patch_embed import products as patch_products


def apply(model: Any, compute: ComputeConfig, device: torch.device) -> None:
    """Replaces layers of a model on `device` by their fast forms.

    Names and values of weights stay, but for the frozen ones under `compute.float8`.

    Raises:
        UserError: float8 products that this GPU does not have, or nothing frozen to use them for.
    """
    # Each looks whether its layers are there, so that a new model needs no list here.
    tower: nn.Module = model.model.vision_tower
    patch_embed.enable(tower)
    gelu.enable(tower)
    last_mlp.enable(model.model.language_model.layers)
    if compute.float8:
        float8.convert_frozen_linears(model, device)


def fuse_frozen_mlps(model: Any) -> None:
    """Rounds the inner states of MLPs in float8 in one pass with their activation.

    For models of which nothing trains; names and values of weights stay.
    """
    float8_mlp.enable(model.model.vision_tower, model.model.language_model)


__all__ = [
    "SelectiveBlock",
    "apply",
    "convert_frozen_linears",
    "fuse_frozen_mlps",
    "patch_products",
    "run_selected",
    "select_positions",
    "supports_last_mlp",
    "uses_float8",
]
