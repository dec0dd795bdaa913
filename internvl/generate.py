"""Requests to answers, batched: pictures and messages in, strings out.

Original: `InternVLChatModel.chat` and `batch_chat`; one request of a batch gets the answer it would
get alone.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvl.config import TilesConfig, UserError
from internvl.data.chat import IMAGE_MARK, ChatEncoder
from internvl.data.images import STATISTICS, Exif, Triple, as_rgb
from internvl.data.records import Message
from internvl.data.tiles import tile_images
from internvl.data.tokenizers import decode
from internvl.models import configs
from internvl.models.vlm import normalize_tiles

Picture = str | Path | bytes | Image.Image | Tensor
"""A path, an encoded file, an opened picture, or its normalized tiles, float (N, 3, S, S)."""


@dataclass(frozen=True)
class Request:
    """A conversation that waits for an answer.

    messages: turns as Message or {"role": …, "content": …}; the last one is the user's. `<image>`
    marks say where the images belong; without any, they are put before the last question.
    images: either all pictures, which are tiled, or all tiles of a picture each.
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
    """Sampling temperature; None does not sample. Sampling draws from torch's generator, so
    `torch.manual_seed` fixes it."""
    top_p: float = 1.0
    """Sampling: the likeliest tokens that together have this probability."""
    top_k: int = 50
    """Sampling: at most this many tokens (50 is transformers' own default; 0 for all)."""
    repetition_penalty: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    """Handed to transformers' GenerationConfig as it is, such as length_penalty."""

    def config(self, end_id: int, pad_id: int) -> Any:
        """As transformers' GenerationConfig; generation stops at `end_id`."""
        from transformers import GenerationConfig

        sample = self.temperature is not None
        chosen: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
            do_sample=sample,
            eos_token_id=end_id,
            pad_token_id=pad_id,
            use_cache=True,
            **(chosen if sample else {}),
            **self.extra,
        )


@dataclass(frozen=True)
class Prompt:
    """An encoded request: `input_ids` int64 (T,); `tiles` (N, 3, S, S), uint8 or, normalized
    already, floating-point; None without images."""

    input_ids: np.ndarray
    tiles: Tensor | None


def encode(
    request: Request, encoder: ChatEncoder, tiles: TilesConfig, *, exif: Exif = "ignore"
) -> Prompt:
    """Opens a request's pictures and renders its prompt.

    Raises:
        BadImage: a picture cannot be read.
        BadSample: the marks do not match the pictures.
        UserError: tiles of another shape, or beside pictures.
    """
    pixels, per_image = _tiles(request.images, tiles, exif)
    ids = encoder.prompt(_with_marks(request, len(per_image)), per_image)
    return Prompt(ids, pixels)


def _tiles(
    images: Sequence[Picture], config: TilesConfig, exif: Exif
) -> tuple[Tensor | None, tuple[int, ...]]:
    """(all tiles or None, tiles of each image)."""
    given = [image for image in images if isinstance(image, Tensor)]
    if given:
        wanted = (3, config.size, config.size)
        if len(given) < len(images) or any(t.shape[1:] != wanted or t.dim() != 4 for t in given):
            raise UserError(
                f"tiles must be normalized tensors of shape (N, {', '.join(map(str, wanted))}), "
                "one for every image of the request"
            )
        return torch.cat(given), tuple(map(len, given))
    pictures = [as_rgb(image, exif) for image in images]
    cut = tile_images(pictures, config, config.max)
    return (None, ()) if cut is None else (cut.pixels, cut.per_image)


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
    exif = configs.chat_settings(model.config)["exif"]
    found: list[str | None] = [None] * len(requests)
    window = batch_size * 8
    for start in range(0, len(requests), window):
        indices = range(start, min(start + window, len(requests)))
        prompts = {i: encode(requests[i], encoder, tiles, exif=exif) for i in indices}
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
    model: Any, encoder: ChatEncoder, prompts: Sequence[Prompt], settings: Settings, **more: Any
) -> list[str]:
    """Answers of one batch. Prompts are padded on the left and padding is never attended to.

    `more` is handed to the model's `generate`, such as a streamer.
    """
    tokenizer, device = encoder.tokenizer, model.device
    end_id = tokenizer.convert_tokens_to_ids(encoder.template.end)
    pad_id = end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = pad_left(prompts, pad_id)
    statistics = STATISTICS[configs.chat_settings(model.config)["normalize"]]
    tiles = [_normalized(p.tiles.to(device), statistics) for p in prompts if p.tiles is not None]
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        pixel_values=torch.cat(tiles) if tiles else None,
        generation_config=settings.config(end_id, pad_id),
        **more,
    )
    return [answer_text(row, encoder) for row in output[:, ids.shape[1] :].tolist()]


def _normalized(tiles: Tensor, statistics: tuple[Triple, Triple]) -> Tensor:
    """float32 (N, 3, S, S)."""
    if tiles.is_floating_point():
        return tiles.float()
    return normalize_tiles(tiles, torch.float32, *statistics)


def pad_left(prompts: Sequence[Prompt], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), int64 (B, T): the prompts, ending together."""
    longest = max(len(p.input_ids) for p in prompts)
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
        mask[row, longest - len(prompt.input_ids) :] = 1
    return ids, mask


def answer_text(ids: Sequence[int], encoder: ChatEncoder) -> str:
    """The answer in generated ids: up to the template's end, without special tokens and outer
    white space; where the template has a `lead`, what follows its last occurrence."""
    template, skip = encoder.template, not encoder.template.lead
    text = decode(encoder.tokenizer, ids, skip_special_tokens=skip).split(template.end)[0]
    if not template.lead:
        return text.strip()
    return text.rpartition(template.lead)[2].strip()


def stream(model: Any, encoder: ChatEncoder, prompt: Prompt, settings: Settings) -> Iterator[str]:
    """The pieces of one answer as they are generated; joined they are `generate`'s answer.

    Generation runs in a thread, and stops when the iterator is closed.

    Raises:
        UserError: with beam search, whose text is known at the end only.
    """
    if settings.num_beams > 1:
        raise UserError(f"beam search (num_beams = {settings.num_beams}) cannot stream")
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    closed = threading.Event()

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), closed.is_set(), device=ids.device)

    def work() -> None:
        more = {"streamer": _Pieces(encoder, pieces.put), "stopping_criteria": [stop]}
        try:
            generate(model, encoder, [prompt], settings, **more)
        finally:
            pieces.put(None)

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(work)
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            closed.set()
        done.result()  # raises what went wrong


class _Pieces:
    """What `transformers`' generate calls with the prompt and then with every token."""

    def __init__(self, encoder: ChatEncoder, take: Callable[[str], None]) -> None:
        self.encoder = encoder
        self.take = take
        self.ids: list[int] | None = None
        self.sent = ""

    def put(self, ids: Tensor) -> None:
        if self.ids is None:  # the prompt
            self.ids = []
            return
        self.ids += ids.flatten().tolist()
        # The whole answer is decoded every time (a second in all for 2,000 tokens): what a token
        # adds to the text depends on those before it.
        text = self._settled(self.ids)
        if text.startswith(self.sent):
            self._send(text)

    def end(self) -> None:
        self._send(answer_text(self.ids or [], self.encoder))

    def _settled(self, ids: Sequence[int]) -> str:
        """The text so far without what later tokens may still change: half a character, the
        beginning of the template's end."""
        template = self.encoder.template
        if template.lead and template.lead not in self.encoder.tokenizer.decode(ids):
            return ""
        text = answer_text(ids, self.encoder).rstrip("\ufffd")
        for length in range(len(template.end) - 1, 0, -1):
            if text.endswith(template.end[:length]):
                return text[:-length].rstrip()
        return text

    def _send(self, text: str) -> None:
        if text[len(self.sent) :]:
            self.take(text[len(self.sent) :])
            self.sent = text


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
