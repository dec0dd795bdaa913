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


def answer_losses(model: Any, row: PreferenceBatch, normalize: str) -> Tensor:
    """Returns the negative log-probability of every answer of a row of pairs, float32 (P, 2).

    Sums over the tokens of an answer, as in `summed_loss`; the rejected answers are second.
    """
    num_answers = 2 * row.num_samples
    supervision = Supervision(*_targets(row), row.answers, num_answers)
    return _loss(model, row, normalize, supervision).view(row.num_samples, 2)


def _targets(row: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    return row.loss_positions, row.targets, row.loss_weights


def _loss(model: Any, row: PackedBatch, normalize: str, supervision: Supervision) -> Tensor:
    implementation = model.config.text_config._attn_implementation
    mask = packed_mask(implementation, row.document, row.branch, model.dtype, row.starts)
    pixels = row.pixel_values  # uint8: a quarter of float32's bytes to copy to the device
    if pixels is not None:
        pixels = normalize_tiles(pixels, torch.float32, *STATISTICS[normalize])
    return model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=mask,
        pixel_values=pixels,
        supervision=supervision,
    ).loss
