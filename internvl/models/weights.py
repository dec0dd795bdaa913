"""A checkpoint's tensors against the model that is to hold them: names, shapes, positions."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl.errors import ModelFolderError
from internvl.models import keys
from internvl.models.hub import LazyTensor

logger = logging.getLogger(__name__)

EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
"""The two matrices with a row per token of the vocabulary."""

_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|position_ids$")
"""Buffers that older versions stored and that are computed."""


def check_names(folder: Path, renamed: keys.Renamed, *, log_unexpected: bool = False) -> None:
    """Nothing is missing and nothing is left over.

    Args:
        log_unexpected: name what is left over in the log instead (InternVL-14B's fine-tunes hold
            tensors that nobody documents).

    Raises:
        ModelFolderError: missing or unexpected weights.
    """
    extra = [name for name in renamed.unexpected if not _HARMLESS.search(name)]
    if len(extra) < len(renamed.unexpected):
        logger.info("%s: stored buffers that are computed instead are not read", folder)
    if log_unexpected and extra:
        logger.warning("%s: %d weights are not read: %s", folder, len(extra), ", ".join(extra))
        extra = []
    for what, names in (("missing", renamed.missing), ("unexpected", extra)):
        if names:
            raise ModelFolderError(
                f"{folder}: {len(names)} {what} weights ({', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}); config.json and the weight files are not of "
                "the same model, or a shard is missing: download the folder again"
            )


def check_shapes(
    folder: Path, expected: Mapping[str, Tensor], tensors: dict[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """The tensors, a position table of another grid resized when it is read.

    Raises:
        ModelFolderError: another shape than the model's.
    """
    fitted = {}
    for name, tensor in tensors.items():
        wanted, found = tuple(expected[name].shape), tensor.shape
        if wanted != found and name.endswith("position_embeddings") and _grids(wanted, found):
            tensor = _resized(tensor, wanted)
        elif wanted != found and name in EMBEDDINGS and found[1:] == wanted[1:]:
            raise ModelFolderError(
                f"{folder}: {name} has {found[0]} rows, config.json says vocab_size {wanted[0]}; "
                "set vocab_size to the rows of the file, or use the config.json of these weights"
            )
        elif wanted != found:
            raise ModelFolderError(
                f"{folder}: {name} is {found}, config.json asks for {wanted}; the two are not of "
                "the same model"
            )
        fitted[name] = tensor
    return fitted


def _grids(*shapes: tuple[int, ...]) -> bool:
    """Whether all are position tables (1, 1 + G², D) of one width."""
    if any(len(shape) != 3 or shape[0] != 1 or shape[1] < 2 for shape in shapes):
        return False
    square = all(round((rows - 1) ** 0.5) ** 2 == rows - 1 for _, rows, _ in shapes)
    return square and len({width for _, _, width in shapes}) == 1


def _resized(tensor: LazyTensor, wanted: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(wanted, tensor.dtype, lambda: resize_positions(tensor.read(), wanted[1] - 1))


def resize_positions(table: Tensor, num_patches: int) -> Tensor:
    """Position table (1, 1 + G², D) for another square grid of `num_patches` patches.

    Bicubic in float32, the class token's row untouched (original: `resize_pos_embeddings`).
    """
    old, new = round((table.shape[1] - 1) ** 0.5), round(num_patches**0.5)
    if old == new:
        return table
    grid = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], patches], dim=1)


def one_device(device: str | torch.device) -> dict[str, Any] | None:
    """`device_map` of `from_pretrained` for a whole model on one device."""
    return None if torch.device(device).type == "cpu" else {"": torch.device(device)}
