"""Checks a checkpoint's tensors against the model, and writes tensors as safetensors."""

import json
import logging
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from internvl.errors import ModelFolderError
from internvl.models import keys
from internvl.models.tensors import LazyTensor

logger = logging.getLogger(__name__)

EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
"""Matrices with a row per token of the vocabulary."""

_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|position_ids$")
"""Buffers that older versions stored; they are computed now."""


def check_names(folder: Path, renamed: keys.Renamed, *, log_unexpected: bool = False) -> None:
    """Checks that no weight is missing or unexpected.

    Args:
        log_unexpected: log unexpected weights instead of raising.

    Raises:
        ModelFolderError: missing or unexpected weights.
    """
    extra = [name for name in renamed.unexpected if not _HARMLESS.search(name)]
    if len(extra) < len(renamed.unexpected):
        logger.info("%s: stored buffers that are computed instead are not read", folder)
    # InternVL-14B's fine-tunes hold tensors that nobody documents.
    if log_unexpected and extra:
        logger.warning("%s: %d weights are not read: %s", folder, len(extra), ", ".join(extra))
        extra = []
    for problem, names in (("missing", renamed.missing), ("unexpected", extra)):
        if names:
            raise ModelFolderError(
                f"{folder}: {len(names)} {problem} weights ({', '.join(names[:3])}"
                f"{', …' if len(names) > 3 else ''}); config.json and the weight files are not of "
                "the same model, or a shard is missing: download the folder again"
            )


def check_shapes(
    folder: Path, expected: Mapping[str, Tensor], tensors: dict[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Checks shapes and kinds; wraps a position table of another grid so that reading resizes it.

    Raises:
        ModelFolderError: a shape other than the model's, or integers where it has numbers.
    """
    fitted = {}
    for name, tensor in tensors.items():
        # Quantized without its scales: read as numbers, they answer nonsense.
        if expected[name].is_floating_point() and not tensor.dtype.is_floating_point:
            raise ModelFolderError(
                f"{folder}: {name} is {str(tensor.dtype).removeprefix('torch.')}, as quantized "
                "weights are, and those are not read here; take the unquantized release, and load "
                "it with quantize='8bit' or '4bit' to save memory"
            )
        # Shapes come from the files' headers: nothing is read before the whole folder fits.
        model_shape, file_shape = tuple(expected[name].shape), tensor.shape
        differs = model_shape != file_shape
        if differs and name.endswith("position_embeddings") and _grids(model_shape, file_shape):
            tensor = _resized(tensor, model_shape)
        elif differs and name in EMBEDDINGS and file_shape[1:] == model_shape[1:]:
            raise ModelFolderError(
                f"{folder}: {name} has {file_shape[0]} rows, config.json says vocab_size "
                f"{model_shape[0]}; set vocab_size to the rows of the file, or use the "
                "config.json of these weights"
            )
        elif differs:
            raise ModelFolderError(
                f"{folder}: {name} is {file_shape}, config.json asks for {model_shape}; the two "
                "are not of the same model; download both again"
            )
        fitted[name] = tensor
    return fitted


def _grids(*shapes: tuple[int, ...]) -> bool:
    """True if all are position tables (1, 1 + G², D) of one width."""
    if any(len(shape) != 3 or shape[0] != 1 or shape[1] < 2 for shape in shapes):
        return False
    square = all(round((rows - 1) ** 0.5) ** 2 == rows - 1 for _, rows, _ in shapes)
    return square and len({width for _, _, width in shapes}) == 1


def _resized(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, tensor.dtype, lambda: resize_positions(tensor.read(), shape[1] - 1))


def resize_positions(table: Tensor, num_patches: int) -> Tensor:
    """Resizes a position table (1, 1 + G², D) to a square grid of `num_patches` patches.

    Bicubic (original: `resize_pos_embeddings`).
    """
    old, new = round((table.shape[1] - 1) ** 0.5), round(num_patches**0.5)
    if old == new:
        return table
    # Without the class token's row, which has no place in the grid. float32, as in the original.
    grid = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], patches], dim=1)


def one_device(device: str | torch.device) -> dict[str, Any] | None:
    """Returns `from_pretrained`'s `device_map` for a whole model on one device."""
    return None if torch.device(device).type == "cpu" else {"": torch.device(device)}


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file with the permissions of any new file, 0666 less the umask."""
    # safetensors replaces the file by a temporary one of mode 0600, which no other user can serve.
    # The mode is read from an empty file: asking for the umask would change it for other threads.
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, metadata={"format": "pt"})
    # Not if equal: file systems without permissions refuse it.
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)


SHARD_BYTES = 5 * 10**9  # decimal GB


def write_weights(
    folder: Path, named: Iterator[tuple[str, Tensor]], dtype: torch.dtype | None
) -> str:
    """Writes safetensors shards of at most `SHARD_BYTES`; returns the name of the last dtype."""
    # Streamed: at most one shard is in memory in addition to the model.
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0
    last_dtype = torch.float32

    def flush() -> None:
        # The final names hold the number of shards, which is not known before the last one.
        save_tensors(pending, folder / f"{len(shards):05d}.partial")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in named:
        saved = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        last_dtype = saved.dtype
        if pending and size + saved.nbytes > SHARD_BYTES:
            flush()
            size = 0
        # safetensors refuses tensors that share memory, such as views and tied weights.
        shares_memory = saved.data_ptr() == tensor.data_ptr()
        pending[name] = saved.contiguous().clone() if shares_memory else saved
        size, total = size + saved.nbytes, total + saved.nbytes
    flush()
    _name_shards(folder, shards, total)
    return str(last_dtype).removeprefix("torch.")


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Renames a single file to model.safetensors; numbers and indexes several."""
    if len(shards) == 1:
        (folder / "00000.partial").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for shard, names in enumerate(shards):
        file = f"model-{shard + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{shard:05d}.partial").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes sorted, indented JSON in UTF-8."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
