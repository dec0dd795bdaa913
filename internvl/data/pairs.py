"""Captions and images as InternVL-14B takes them: token ids, and squares of pixels.

Original: `internvl_g/internvl/train/dataset.py` and `clip_benchmark/.../internvl_huggingface`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from internvl.data.images import Rgb
from internvl.data.tiles import cut

SUMMARIZE = "summarize:"
"""Prefix, without a space, of a caption that is embedded."""

MAX_TOKENS = 80
"""Maximum tokens of a caption, BOS and EOS included."""

# Not the tokenizer's `[PAD]`: the original takes every id above 0 for text.
PAD_ID = 0
"""Padding id of captions."""

_MAX_WORDS = 50
_DROPPED = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def clean_caption(text: str) -> str:
    """Lowercases, replaces some punctuation by spaces, keeps 50 words (original: `pre_caption`).

    >>> clean_caption('A man (left) and a  dog: "Yes", fine.')
    'a man left and a dog yes , fine'
    """
    # The original's order of steps; another one would leave other spaces, and so other tokens.
    text = _SPACES.sub(" ", _DROPPED.sub(" ", text.lower()))
    text = text.rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:_MAX_WORDS])


@dataclass(frozen=True)
class CaptionEncoder:
    """Encodes captions to token ids with the tokenizer of InternVL-14B."""

    tokenizer: PreTrainedTokenizerFast

    @property
    def settings(self) -> tuple[str, ...]:
        """Settings that change the ids, besides the tokenizer: none."""
        return ()

    def embedding(self, text: str) -> list[int]:
        """Encodes a caption to embed: BOS, "summarize:", text, EOS; at most MAX_TOKENS."""
        return self.matching(SUMMARIZE + text)

    def matching(self, text: str) -> list[int]:
        """Encodes a caption to match with an image: `embedding` without the prefix."""
        # Cut before EOS is added: a long caption ends with `</s>` too, as in the original.
        ids = self._pieces(text)[: MAX_TOKENS - 2]
        return [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]

    def prompt(self, text: str) -> list[int]:
        """Encodes the beginning of a caption to generate: BOS and the text, no EOS."""
        return [self.tokenizer.bos_token_id, *self._pieces(text)]

    def _pieces(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def pad_right(rows: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """Pads rows of token ids with 0 to `length`, or to the longest: int64 (R, L)."""
    width = max(map(len, rows)) if length is None else length
    ids = torch.full((len(rows), width), PAD_ID, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids


def square(image: Rgb, size: int) -> Tensor:
    """Resizes an RGB image to a square without keeping its aspect: uint8 (3, S, S).

    The input of retrieval and captioning.
    """
    return cut(image, (1, 1), tile_size=size, thumbnail=False)[0]


def center_square(image: Image.Image, size: int) -> Tensor:
    """Resizes the shorter side of an RGB image to S and crops its center: uint8 (3, S, S).

    The input of classification.
    """
    width, height = image.size
    short = min(width, height)
    # `int` for the sides and `round` for the corner, as torchvision's Resize and CenterCrop.
    resized = image.resize(
        (int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC
    )
    left, top = (round((side - size) / 2) for side in resized.size)
    return _pixels(resized.crop((left, top, left + size, top + size)))


def random_square(image: Image.Image, size: int, draw: np.random.Generator) -> Tensor:
    """Crops an RGB image at random and mirrors it with probability 0.5: uint8 (3, S, S).

    The crop has half to all of the area and an aspect of 3:4 to 4:3. The input of training
    (original: torchvision's `RandomResizedCrop` and `RandomHorizontalFlip`).
    """
    box = _random_box(image.size, draw)
    crop = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    # Drawn after the crop: another order would give other crops for the same seed.
    if draw.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _pixels(crop)


_AREA, _RATIO = (0.5, 1.0), (3 / 4, 4 / 3)


def _random_box(size: tuple[int, int], draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws (left, top, right, bottom), px; the center if ten draws do not fit a long image."""
    width, height = size
    for _ in range(10):
        area = width * height * draw.uniform(*_AREA)
        # Uniform in the logarithm, so that 3:4 is as likely as 4:3.
        ratio = math.exp(draw.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _pixels(image: Image.Image) -> Tensor:
    """Converts a Pillow image to uint8 (3, S, S)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
