"""Losses of a chat model on a packed row, for training and evaluation."""

from typing import Any

import torch
from torch import Tensor

from internvl.data.images import STATISTICS
from internvl.data.records import PackedBatch, PreferenceBatch
from internvl.models.attention.packed import packed_mask
from internvl.models.chat.model import Supervision
from internvl.models.vision import normalize_tiles


def summed_loss(model: Any, row: PackedBatch, normalize: str) -> Tensor:
    """Returns the weighted SUM of the next-token loss over the supervised positions, float32 ().

    Args:
        row: on the model's device.
        normalize: mean and standard deviation of pixels, a key of `STATISTICS`.
    """
    return _loss(model, row, normalize, Supervision(*_targets(row)))


def answer_losses(
    model: Any, row: PreferenceBatch, normalize: str, visual: Tensor | None = None
) -> Tensor:
    """Returns the negative log-probability of every answer of a row of pairs, float32 (P, 2).

    Sums over the tokens of an answer, as in `summed_loss`; the rejected answers are second.

    Args:
        visual: the row's visual tokens, if `repeated_visual` has computed them.
    """
    num_answers = 2 * row.num_samples
    supervision = Supervision(*_targets(row), row.answers, num_answers)
    return _loss(model, row, normalize, supervision, visual).view(row.num_samples, 2)


def repeated_visual(model: Any, row: PackedBatch, normalize: str) -> Tensor | None:
    """Returns the visual tokens (V, D) of a row for all passes of a step.

    None if there are none, or if every pass must compute its own.
    """
    if row.pixel_values is None or not model.repeats_vision_tokens:
        return None
    return model.vision_tokens_of_row(_pixels(row.pixel_values, normalize))


def _targets(row: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    return row.loss_positions, row.targets, row.loss_weights


def _loss(
    model: Any,
    row: PackedBatch,
    normalize: str,
    supervision: Supervision,
    visual: Tensor | None = None,
) -> Tensor:
    implementation = model.config.text_config._attn_implementation
    mask = packed_mask(implementation, row.document, row.branch, model.dtype, row.starts)
    pixels = None if visual is not None else row.pixel_values
    return model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=mask,
        pixel_values=None if pixels is None else _pixels(pixels, normalize),
        visual=visual,
        supervision=supervision,
    ).loss


def _pixels(tiles: Tensor, normalize: str) -> Tensor:
    # uint8 until here: a quarter of float32's bytes to copy to the device
    return normalize_tiles(tiles, torch.float32, *STATISTICS[normalize])
