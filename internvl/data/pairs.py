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

from internvl.data.tiles import cut

SUMMARIZE = "summarize:"
"""What stands, without a space, before a caption that is embedded."""

MAX_TOKENS = 80
"""Longest caption with its first and last special token."""

PAD_ID = 0
"""Padding of captions. The tokenizer's own `[PAD]` would count as text: text is an id above 0."""

_MAX_WORDS = 50
_DROPPED = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def clean_caption(text: str) -> str:
    """Lower case, some punctuation to spaces, at most 50 words (original: `pre_caption`).

    >>> clean_caption('A man (left) and a  dog: "Yes", fine.')
    'a man left and a dog yes , fine'
    """
    text = _SPACES.sub(" ", _DROPPED.sub(" ", text.lower()))
    text = text.rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:_MAX_WORDS])


@dataclass(frozen=True)
class CaptionEncoder:
    """Captions to token ids."""

    tokenizer: PreTrainedTokenizerFast

    def embedding(self, text: str) -> list[int]:
        """A caption to be embedded: "summarize:" before it, `</s>` at its end, also when cut."""
        return self.matching(SUMMARIZE + text)

    def matching(self, text: str) -> list[int]:
        """A caption beside an image: as `embedding`, without the word before it."""
        ids = self._pieces(text)[: MAX_TOKENS - 2]
        return [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]

    def prompt(self, text: str) -> list[int]:
        """The beginning of a caption that goes on: without `</s>`."""
        return [self.tokenizer.bos_token_id, *self._pieces(text)]

    def _pieces(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def pad_right(rows: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """int64 (R, L) of rows of token ids, padded with 0 to `length` or to the longest."""
    width = max(map(len, rows)) if length is None else length
    ids = torch.full((len(rows), width), PAD_ID, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids


def square(image: Image.Image, size: int) -> Tensor:
    """An RGB image resized to a square, its aspect not kept: uint8 (3, S, S).

    Retrieval and captioning look at images like this.
    """
    return cut(image, (1, 1), tile_size=size, thumbnail=False)[0]


def center_square(image: Image.Image, size: int) -> Tensor:
    """The middle of an RGB image whose shorter side is resized to S: uint8 (3, S, S).

    Classification looks at images like this.
    """
    width, height = image.size
    short = min(width, height)
    resized = image.resize(
        (int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC
    )
    left, top = (round((side - size) / 2) for side in resized.size)
    return _pixels(resized.crop((left, top, left + size, top + size)))


def random_square(image: Image.Image, size: int, draw: np.random.Generator) -> Tensor:
    """A random part of an RGB image, mirrored half of the time: uint8 (3, S, S).

    Half to all of its area, sides 3:4 to 4:3, bicubic; training looks at images like this
    (original: torchvision's `RandomResizedCrop` and `RandomHorizontalFlip`).
    """
    box = _random_box(image.size, draw)
    part = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    if draw.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _pixels(part)


_AREA, _RATIO = (0.5, 1.0), (3 / 4, 4 / 3)


def _random_box(size: tuple[int, int], draw: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom); the middle of an image too long for ten tries."""
    width, height = size
    for _ in range(10):
        area = width * height * draw.uniform(*_AREA)
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
    """uint8 (3, S, S)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
