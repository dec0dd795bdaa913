"""Requests to answers, batched: images and messages in, strings out.

Original: `InternVLChatModel.chat` and `batch_chat`; one request of a batch gets the answer it would
get alone.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Module

from internvl.config import TilesConfig
from internvl.data.arguments import check_number, check_whole, list_images, listed, nearest
from internvl.data.chat import ChatEncoder
from internvl.data.images import STATISTICS, Exif, FileSlice, Triple, rgb_at
from internvl.data.messages import (
    IMAGE_MARK,
    VIDEO_MARK,
    from_openai,
    has_marks,
    in_order,
)
from internvl.data.records import Message
from internvl.data.tiles import tile_images
from internvl.data.tokenizers import decode
from internvl.errors import BadSample, UserError
from internvl.files import first_line
from internvl.models import configs
from internvl.models.vision import normalize_tiles

ImageInput = str | Path | bytes | BinaryIO | FileSlice | Image.Image | np.ndarray | Tensor
"""A path, `data:` address, encoded file or file object; an opened image, uint8 array (H, W) or
(H, W, C) or tensor (C, H, W); or an image's normalized tiles, float (N, 3, S, S)."""


@dataclass(frozen=True)
class Request:
    """A conversation that waits for an answer.

    messages: turns as Message or {"role": …, "content": …}, under the rules of training data; the
    last one is the user's. `<image>` marks say where the images belong, `\\<image>` is the word;
    without any mark, the images are put before the last question. A content may be a list of
    OpenAI's parts, and their images then stand where the parts do.
    images: one, or several; either all images, which are tiled, or all tiles of an image each.
    """

    messages: Sequence[Message | Mapping[str, Any]]
    images: Sequence[ImageInput] | ImageInput = ()

    def __post_init__(self) -> None:
        images = () if self.images is None else list_images(self.images)
        object.__setattr__(self, "images", images)  # frozen, once it is made


_REFUSED = {
    "max_length": "use max_new_tokens",
    "min_length": "use min_new_tokens",
    "eos_token_id": "the template's end is used",
    "pad_token_id": "the tokenizer's is used",
    "do_sample": "set temperature",
    "use_cache": "it is always used",
    "stop_strings": "cut the answer instead",
    **dict.fromkeys(
        ("num_return_sequences", "return_dict_in_generate"), "an answer is one text; ask again"
    ),
    **dict.fromkeys(
        ("num_beam_groups", "penalty_alpha", "dola_layers", "constraints", "force_words_ids"),
        "transformers would run code from the hub for it",
    ),
}
"""Keys of GenerationConfig that cannot be followed here, and what to do instead."""


@dataclass(frozen=True)
class Settings:
    """How answers are generated; greedy unless said otherwise.

    Raises:
        UserError: a value out of range, or a key of `extra` that would not be followed.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    num_beams: int = 1
    temperature: float | None = None
    """Sampling temperature; None or 0 does not sample. Sampling draws from torch's generator, so
    `torch.manual_seed` fixes it."""
    top_p: float = 1.0
    """Sampling: the likeliest tokens that together have this probability."""
    top_k: int = 50
    """Sampling: at most this many tokens (50 is transformers' own default; 0 for all)."""
    repetition_penalty: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    """Handed to transformers' GenerationConfig as it is, such as length_penalty."""

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        check_whole("num_beams", self.num_beams, 1)
        check_whole("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, above=0, most=1)
        check_number("repetition_penalty", self.repetition_penalty, above=0)
        # 0 is what other libraries' greedy search is called with.
        if self.temperature is not None and self.temperature != 0:
            check_number("temperature", self.temperature, above=0)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens "
                f"({self.max_new_tokens})"
            )
        _check_extra(self.extra)

    @classmethod
    def of(cls, **keys: Any) -> "Settings":
        """Makes settings of keyword arguments. Raises UserError that names an unknown one."""
        known = [own.name for own in fields(cls)]
        for key in keys:
            if key in known:
                continue
            if key in _generation_keys() - _REFUSED.keys():
                raise UserError(f"{key} is a setting of transformers: write extra={{{key!r}: …}}")
            remedy = _REFUSED.get(key) or nearest(key, known)
            raise UserError(f"there is no setting {key!r}; {remedy}")
        return cls(**keys)

    def config(self, end_id: int, pad_id: int) -> Any:
        """As transformers' GenerationConfig; generation stops at `end_id`."""
        from transformers import GenerationConfig

        sample = bool(self.temperature)
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


def _generation_keys() -> set[str]:
    """The settings that transformers knows; it takes any other name without a word."""
    from transformers import GenerationConfig

    return {key for key in GenerationConfig().to_dict() if not key.startswith("_")}


_WHOLE = {
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size", "max_cache_len"), 1),
    **dict.fromkeys(("prefill_chunk_size", "assistant_early_exit", "num_assistant_tokens"), 1),
}
"""Whole numbers of GenerationConfig and the smallest; most are not checked by transformers."""
_SHARES = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_NUMBERS = (
    *("length_penalty", "diversity_penalty", "encoder_repetition_penalty", "guidance_scale"),
    "max_time",
)
_SWITCHES = (
    *("renormalize_logits", "remove_invalid_values", "token_healing", "low_memory", "is_assistant"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("disable_compile", "use_mtp"),
)


def _check_extra(extra: Any) -> None:
    if not isinstance(extra, Mapping):
        raise UserError(f"extra must be a dict of settings, not {type(extra).__name__}")
    if not extra:
        return
    known, own = _generation_keys() - _REFUSED.keys(), {own.name for own in fields(Settings)}
    for key in extra:
        if key in own:
            raise UserError(f"extra: {key} is a setting of its own; write {key}=…")
        if key not in known:
            remedy = _REFUSED.get(key) or nearest(str(key), sorted(known))
            raise UserError(f"extra: {key!r} is not followed here; {remedy}")
        _check_value(key, extra[key])


def _check_value(key: str, value: Any) -> None:
    """Raises UserError where the value of a key of `extra` is of another type than documented."""
    if value is None:  # transformers' own default
        return
    if key in _WHOLE:
        check_whole(f"extra: {key}", value, _WHOLE[key])
    elif key in _NUMBERS:
        check_number(f"extra: {key}", value)
    elif key in _SHARES:
        check_number(f"extra: {key}", value, most=1)
    elif key in _SWITCHES and not isinstance(value, bool):
        raise UserError(f"extra: {key} must be True or False, not {value!r}")


@dataclass(frozen=True)
class Prompt:
    """An encoded request: `input_ids` int64 (T,); `tiles` (N, 3, S, S), uint8 or, normalized
    already, floating-point; None without images."""

    input_ids: np.ndarray
    tiles: Tensor | None


def encode(
    request: Request,
    encoder: ChatEncoder,
    tiles: TilesConfig,
    name: str = "request",
    *,
    exif: Exif = "ignore",
    normalize: str = "imagenet",
) -> Prompt:
    """Opens a request's images and renders its prompt; `name` is what messages call it.

    Args:
        normalize: a key of STATISTICS; its mean is the colour that `tiles.pad_square` pads with,
            as in training.

    Raises:
        BadImage: an image cannot be read.
        BadSample: turns that training would refuse, or marks that do not match the images.
        UserError: tiles of another shape, or beside images.
    """
    messages, images = _conversation(request, encoder, name)
    pixels, per_image = _tiles(images, tiles, name, exif, STATISTICS[normalize][0])
    ids = encoder.prompt(_with_marks(messages, len(per_image)), per_image, name)
    return Prompt(ids, pixels)


def _conversation(
    request: Request, encoder: ChatEncoder, name: str
) -> tuple[Sequence[Message], list[Any]]:
    """(messages in order, images in the order of their marks), checked as training data is."""
    if not isinstance(request, Request):
        given = type(request).__name__
        raise UserError(f"{name} is a {given}, not internvl.Request(messages, images)")
    messages, slots = from_openai(name, request.messages, strict=True)
    if any(mark == VIDEO_MARK and value is not None for mark, value in slots):
        raise BadSample(name, "it has a part of type video; give its frames as images")
    return encoder.ordered(name, messages, "user"), in_order(slots, IMAGE_MARK, request.images)  # type: ignore[arg-type]


def _tiles(
    images: Sequence[Any], config: TilesConfig, name: str, exif: Exif, mean: Triple
) -> tuple[Tensor | None, tuple[int, ...]]:
    """(all tiles or None, tiles of each image)."""
    given = [i for i in images if isinstance(i, Tensor) and (i.dim() > 3 or i.is_floating_point())]
    if given:
        wanted = (3, config.size, config.size)
        if len(given) < len(images) or any(t.shape[1:] != wanted or t.dim() != 4 for t in given):
            raise UserError(
                f"tiles must be normalized tensors of shape (N, {', '.join(map(str, wanted))}), "
                "one for every image of the request"
            )
        return torch.cat(given), tuple(map(len, given))
    opened = [rgb_at(f"{name}: image {n}", image, exif) for n, image in enumerate(images)]
    cut = tile_images(opened, config, config.max, mean=mean)
    return (None, ()) if cut is None else (cut.pixels, cut.per_image)


def answers(
    model: Any,
    encoder: ChatEncoder,
    tiles: TilesConfig,
    requests: Sequence[Request] | Request,
    settings: Settings,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One answer per request, in order. `progress` is told how many more are done.

    Requests of similar length are answered together, so little is padded.

    Raises:
        BadSample, UserError: see `encode`; the turns of all are checked before the first answer.
    """
    check_whole("batch_size", batch_size, 1)
    requests = [requests] if isinstance(requests, Request) else listed(requests, "requests")
    names = [f"requests[{i}]" for i in range(len(requests))] if len(requests) > 1 else ["request"]
    for request, name in zip(requests, names, strict=False):
        _conversation(request, encoder, name)
    known = configs.chat_settings(model.config)
    pixels = {key: known[key] for key in ("exif", "normalize")}
    found: list[str | None] = [None] * len(requests)
    window = batch_size * 8
    for start in range(0, len(requests), window):
        indices = range(start, min(start + window, len(requests)))
        prompts = {i: encode(requests[i], encoder, tiles, names[i], **pixels) for i in indices}
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
    with _extra_named(settings.extra):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=torch.cat(tiles) if tiles else None,
            generation_config=settings.config(end_id, pad_id),
            **more,
        )
    return [answer_text(row, encoder) for row in output[:, ids.shape[1] :].tolist()]


@contextmanager
def _extra_named(extra: Mapping[str, Any]) -> Iterator[None]:
    """What transformers makes of a wrong value in `extra` becomes a UserError that names the keys.

    It checks few of them: most raise whatever happens once they are used.
    """
    try:
        yield
    except Exception as error:
        # Errors of the model's forward, of the package's callbacks and of memory are not extra's.
        if not extra or isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
            raise
        frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)][2:]
        ours = {__file__, Module.__call__.__code__.co_filename}
        names = {code.co_filename for code in frames if code is not Settings.config.__code__}
        if names & ours:
            raise
        given = ", ".join(f"{key} = {value!r:.100}" for key, value in extra.items())
        raise UserError(
            f"extra: transformers cannot follow {given} ({first_line(error)}); check the value in "
            "its GenerationConfig"
        ) from error


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


def _with_marks(messages: Sequence[Message], num_images: int) -> Sequence[Message]:
    """The messages with the images' marks before the last question if no question has one."""
    if not num_images or has_marks(messages, IMAGE_MARK):
        return messages
    *earlier, last = messages
    return [*earlier, Message(last.role, f"{IMAGE_MARK}\n" * num_images + last.content)]
