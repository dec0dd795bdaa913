"""Requests to answers, batched: pictures and messages in, strings out.

Original: `InternVLChatModel.chat` and `batch_chat`; one request of a batch gets the answer it would
get alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvl.config import TilesConfig
from internvl.data.chat import IMAGE_MARK, ChatEncoder
from internvl.data.images import open_rgb
from internvl.data.records import Message
from internvl.data.tiles import tile_images
from internvl.models.vlm import normalize_tiles

Picture = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Request:
    """A conversation that waits for an answer.

    messages: turns as Message or {"role": …, "content": …}; the last one is the user's. `<image>`
    marks say where the images belong; without any, they are put before the last question.
    """

    messages: Sequence[Message | dict[str, str]]
    images: Sequence[Picture] = ()


@dataclass(frozen=True)
class Settings:
    """How answers are generated; greedy unless said otherwise."""

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    num_beams: int = 1
    temperature: float | None = None
    """Sampling temperature; None does not sample."""
    top_p: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    """Handed to transformers' GenerationConfig as it is, such as length_penalty."""

    def config(self, end_id: int, pad_id: int) -> Any:
        """As transformers' GenerationConfig; generation stops at `end_id`."""
        from transformers import GenerationConfig

        sample = self.temperature is not None
        chosen: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            num_beams=self.num_beams,
            do_sample=sample,
            eos_token_id=end_id,
            pad_token_id=pad_id,
            use_cache=True,
            **(chosen if sample else {}),
            **self.extra,
        )


@dataclass(frozen=True)
class Prompt:
    """An encoded request: `input_ids` int64 (T,), `tiles` uint8 (N, 3, S, S) or None."""

    input_ids: np.ndarray
    tiles: Tensor | None


def encode(request: Request, encoder: ChatEncoder, tiles: TilesConfig) -> Prompt:
    """Opens a request's pictures and renders its prompt.

    Raises:
        BadImage: a picture cannot be read.
        BadSample: the marks do not match the pictures.
    """
    pictures = [p if isinstance(p, Image.Image) else open_rgb(p) for p in request.images]
    cut = tile_images([picture.convert("RGB") for picture in pictures], tiles, tiles.max)
    per_image = () if cut is None else cut.per_image
    messages = _with_marks(request, len(pictures))
    ids = encoder.prompt(messages, per_image)
    return Prompt(ids, None if cut is None else cut.pixels)


def answers(
    model: Any,
    encoder: ChatEncoder,
    tiles: TilesConfig,
    requests: Sequence[Request],
    settings: Settings,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One answer per request, in order. `progress` is told how many more are done.

    Requests of similar length are answered together, so little is padded.
    """
    found: list[str | None] = [None] * len(requests)
    window = batch_size * 8
    for start in range(0, len(requests), window):
        indices = range(start, min(start + window, len(requests)))
        prompts = {i: encode(requests[i], encoder, tiles) for i in indices}
        order = sorted(indices, key=lambda i: -len(prompts[i].input_ids))
        for batch in _batches(order, batch_size):
            texts = generate(model, encoder, [prompts[i] for i in batch], settings)
            for index, text in zip(batch, texts, strict=True):
                found[index] = text
            if progress is not None:
                progress(len(batch))
    return [text for text in found if text is not None]


@torch.no_grad()
def generate(
    model: Any, encoder: ChatEncoder, prompts: Sequence[Prompt], settings: Settings
) -> list[str]:
    """Answers of one batch. Prompts are padded on the left and padding is never attended to."""
    tokenizer, device = encoder.tokenizer, model.device
    end_id = tokenizer.convert_tokens_to_ids(encoder.template.end)
    pad_id = end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(len(p.input_ids) for p in prompts)
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
        mask[row, longest - len(prompt.input_ids) :] = 1
    tiles = [p.tiles for p in prompts if p.tiles is not None]
    pixels = normalize_tiles(torch.cat(tiles).to(device), torch.float32) if tiles else None
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        pixel_values=pixels,
        generation_config=settings.config(end_id, pad_id),
    )
    texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [text.split(encoder.template.end)[0].strip() for text in texts]


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _with_marks(request: Request, num_images: int) -> list[Message]:
    """The messages as records, with the images' marks before the last question if none is there."""
    messages = [m if isinstance(m, Message) else Message(**m) for m in request.messages]
    if num_images and not any(IMAGE_MARK in m.content for m in messages if m.role == "user"):
        last = messages[-1]
        marks = f"{IMAGE_MARK}\n" * num_images
        messages[-1] = Message(last.role, marks + last.content)
    return messages
