"""Tensors of a checkpoint: compared with the model that is to hold them, and written as files."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
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
                "the same model; download both again"
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


SHARD_BYTES = 5 * 10**9


def write_weights(
    folder: Path, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None
) -> str:
    """Write safetensors shards of at most `SHARD_BYTES`; returns the name of the last dtype.

    No more than one shard is held in memory beside the model.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0
    kind = torch.float32

    def flush() -> None:
        save_file(pending, folder / f"{len(shards):05d}.partial", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in named:
        kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        kind = kept.dtype
        if pending and size + kept.nbytes > SHARD_BYTES:
            flush()
            size = 0
        # Cloned where it shares its memory: a file holds every tensor on its own.
        pending[name] = kept.contiguous().clone() if kept.data_ptr() == tensor.data_ptr() else kept
        size, total = size + kept.nbytes, total + kept.nbytes
    flush()
    _name_shards(folder, shards, total)
    return str(kind).removeprefix("torch.")


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """One file is model.safetensors; several are numbered and indexed."""
    if len(shards) == 1:
        (folder / "00000.partial").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number:05d}.partial").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
