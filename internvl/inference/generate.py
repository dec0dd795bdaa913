"""Generates answers in batches: images and messages in, strings out.

Original: `InternVLChatModel.chat` and `batch_chat`. A request of a batch gets the same answer as
alone.
"""

import queue
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from internvl.config import TilesConfig
from internvl.data.arguments import check_whole
from internvl.data.chat import ChatEncoder
from internvl.data.images import STATISTICS, FileSlice, Triple
from internvl.data.records import Video
from internvl.data.tokenizers import decode
from internvl.errors import UserError
from internvl.files import first_line
from internvl.inference import engine
from internvl.inference.requests import Prompt, Request, check_turns, encode, list_requests
from internvl.inference.settings import Settings as Settings
from internvl.models import configs
from internvl.models.vision import normalize_tiles
from internvl.parallel import lockstep


def answers(
    model: Any,
    encoder: ChatEncoder,
    tiles: TilesConfig,
    requests: Sequence[Request | str] | Request | str,
    settings: Settings,
    *,
    batch_size: int | None = None,
    seeds: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Answers requests; returns one answer per request, in order.

    Args:
        seeds: of every request, in place of `settings.seed`.
        batch_size: requests at a time; by default as many as the GPU's memory holds, up to 128,
            or 16 on a CPU.
        progress: called after every answer with 1.

    Raises:
        BadSample, UserError: see `encode`; the turns of all are checked before the first answer.
    """
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    requests = list_requests(requests)
    names = [f"requests[{i}]" for i in range(len(requests))] if len(requests) > 1 else ["request"]
    # All at first: a bad request at the end must not cost the answers before it.
    for request, name in zip(requests, names, strict=False):
        check_turns(request, encoder, name)
    chat_settings = configs.chat_settings(model.config)
    image_settings = {key: chat_settings[key] for key in ("exif", "normalize")}
    texts: dict[int, str] = {}

    def read(index: int) -> Prompt:
        return encode(requests[index], encoder, tiles, names[index], **image_settings)

    if seeds is not None and len(seeds) != len(requests):
        raise UserError(f"{len(seeds)} seeds for {len(requests)} requests; give one for each")

    def settings_of(index: int) -> Settings:
        return settings if seeds is None else replace(settings, seed=seeds[index])

    # A batch of `generate` draws for all of its rows at once.
    alone = seeds is not None or settings.seed is not None
    by_engine = engine.runs(model, settings)
    answered: Any = _by_generate
    if by_engine:
        answered = partial(_by_engine, files=all(map(_is_of_files, requests)))
    size = 1 if alone and not by_engine else batch_size
    indices = range(len(requests))
    for index, text in answered(model, encoder, read, indices, settings_of, size):
        texts[index] = text
        if progress is not None:
            progress(1)
    return [texts[index] for index in indices]


def _by_engine(
    model: Any,
    encoder: ChatEncoder,
    read: Callable[[int], Prompt],
    order: Sequence[int],
    settings_of: Callable[[int], Settings],
    slots: int | None,
    *,
    files: bool = False,
) -> Iterator[tuple[int, str]]:
    """Yields (request, answer) as answers end, at most `slots` requests at a time.

    Args:
        files: whether all images are files, which worker processes can read.
    """
    num_beams = settings_of(order[0]).num_beams if order else 1
    left: list[engine.Job] = []

    def make(compiled: bool) -> engine.Scheduler:
        if compiled:
            engine.accelerate(model)
        return engine.scheduler(model, encoder, slots, compiled=compiled, num_beams=num_beams)

    def job(index: int, prompt: Prompt) -> engine.Job:
        return _job(model, index, prompt, settings_of(index))

    most = engine.longest(model.config.text_config)
    options: dict[str, Any] = {"files": files, "most": most, "too_long": left.append}
    form = (slots, num_beams)
    for answered in engine.ended_jobs(model, make, form, read, job, order, **options):
        yield answered.key, _whole_answer(answered.prompt, answered.generated, encoder)
    for rest in left:
        yield rest.key, generate(model, encoder, [rest.prompt], rest.settings)[0]


def _is_of_files(request: Request) -> bool:
    """True if a request's images and videos are files or encoded bytes."""
    # A tensor may be on a GPU, which a forked process cannot use; an open file has one position.
    kinds = (str, Path, bytes, FileSlice, Video)
    media = [*request.images, *request.videos]  # type: ignore[misc]  # lists, once it is made
    return all(isinstance(medium, kinds) for medium in media)


def _job(model: Any, key: int, prompt: Prompt, settings: Settings) -> engine.Job:
    """Makes a job that draws from a generator of its own if the settings have a seed."""
    seed, generator = settings.seed, None
    if seed is not None:
        generator = torch.Generator(model.device).manual_seed(seed)
    return engine.Job(key, prompt, settings, generator=generator)


def _by_generate(
    model: Any,
    encoder: ChatEncoder,
    read: Callable[[int], Prompt],
    order: Sequence[int],
    settings_of: Callable[[int], Settings],
    batch_size: int | None,
) -> Iterator[tuple[int, str]]:
    """Yields (request, answer) of batches of similar length by the model's own `generate`."""
    size = batch_size or 16
    # Sorted within a window of batches: the tiles of all requests may not fit in memory.
    for window in _batches(order, 8 * size):
        prompts = {index: read(index) for index in window}
        # By length, so that prompts of one batch need little padding.
        by_length = sorted(window, key=lambda index: -len(prompts[index].input_ids))
        for batch in _batches(by_length, size):
            chosen = [prompts[index] for index in batch]
            texts = generate(model, encoder, chosen, settings_of(batch[0]))
            yield from zip(batch, texts, strict=True)


@torch.no_grad()
def generate(
    model: Any,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    settings: Settings,
    **generate_kwargs: Any,
) -> list[str]:
    """Generates the answers of one batch; prompts are padded on the left, padding is masked.

    Args:
        generate_kwargs: more arguments of the model's `generate`, such as a streamer.
    """
    tokenizer, device = encoder.tokenizer, model.device
    end_id = tokenizer.convert_tokens_to_ids(encoder.template.end)
    # Padding is masked, so any id serves if the tokenizer has none for it.
    pad_id = end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = pad_left(prompts, pad_id)
    statistics = STATISTICS[configs.chat_settings(model.config)["normalize"]]
    # Moved as uint8, a quarter of the bytes of float32, and normalized on the device.
    tiles = [normalized(p.tiles.to(device), statistics) for p in prompts if p.tiles is not None]
    with _extra_as_user_error(settings.extra), _seeded(settings.seed, device):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=torch.cat(tiles) if tiles else None,
            generation_config=settings.generation_config(end_id, pad_id),
            # Ranks that share weights go on until the last of them has its answers.
            synced_gpus=lockstep.in_step(model),
            **generate_kwargs,
        )
    rows = output[:, ids.shape[1] :].tolist()
    return [_whole_answer(*pair, encoder) for pair in zip(prompts, rows, strict=True)]


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch inside and restores its generators afterwards; None does neither."""
    if seed is None:
        yield
        return
    from internvl.compute import rng  # `chat` starts without what trains

    with rng.preserve_rng(device):
        torch.manual_seed(seed)
        yield


def _whole_answer(prompt: Prompt, generated: Sequence[int], encoder: ChatEncoder) -> str:
    """Returns an answer with the beginning that its prompt has."""
    # Decoded at once: whether a token begins with a space depends on the one before it.
    return answer_text([*prompt.begun, *generated], encoder)


@contextmanager
def _extra_as_user_error(extra: Mapping[str, Any]) -> Iterator[None]:
    """Turns an exception of transformers about a value of `extra` into one that names its keys.

    Raises:
        UserError: in place of the exception.
    """
    # transformers validates few values: most raise anything at all once they are used.
    try:
        yield
    except Exception as error:
        # Errors of the model's forward, of the package's callbacks and of memory are not extra's.
        if not extra or isinstance(error, UserError | MemoryError | torch.OutOfMemoryError):
            raise
        # Without the first two frames, this function and `generate`, that every error passes.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][2:]
        ours = {__file__, Module.__call__.__code__.co_filename}
        if ours & {frame.f_code.co_filename for frame in frames}:
            raise
        values = ", ".join(f"{key} = {value!r:.100}" for key, value in extra.items())
        raise UserError(
            f"extra: transformers cannot follow {values} ({first_line(error)}); check the value in "
            "its GenerationConfig"
        ) from error


def normalized(tiles: Tensor, statistics: tuple[Triple, Triple]) -> Tensor:
    """Returns normalized tiles, float32 (N, 3, S, S)."""
    if tiles.is_floating_point():
        return tiles.float()
    return normalize_tiles(tiles, torch.float32, *statistics)


def pad_left(prompts: Sequence[Prompt], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pads prompts on the left: (input_ids, attention_mask), int64 (B, T)."""
    # Written here: setting the tokenizer's padding_side would change it for its other users.
    longest = max(len(p.input_ids) for p in prompts)
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
        mask[row, longest - len(prompt.input_ids) :] = 1
    return ids, mask


def answer_text(ids: Sequence[int], encoder: ChatEncoder) -> str:
    """Decodes generated ids to the answer: the text before the template's end and after its last
    `lead`, without special tokens and outer white space."""
    # A lead is made of special tokens, so they must stay in the text for it to be located.
    template, skip = encoder.template, not encoder.template.lead
    text = decode(encoder.tokenizer, ids, skip_special_tokens=skip).split(template.end)[0]
    if not template.lead:
        return text.strip()
    return text.rpartition(template.lead)[2].strip()


def stream(
    model: Any, encoder: ChatEncoder, prompt: Prompt, settings: Settings
) -> Generator[str, None, None]:
    """Yields the pieces of one answer while it is generated; joined they equal `answers`'.

    Generation stops when the iterator is closed.

    Raises:
        UserError: beam search, whose text is known only at its end.
    """
    if settings.num_beams > 1:
        raise UserError(f"beam search (num_beams = {settings.num_beams}) cannot stream")
    job = _job(model, 0, prompt, settings)
    if engine.runs(model, settings) and job.text_length < engine.longest(model.config.text_config):
        return _stream_by_engine(model, encoder, job)
    return _stream_by_generate(model, encoder, prompt, settings)


def _stream_by_engine(
    model: Any, encoder: ChatEncoder, job: engine.Job
) -> Generator[str, None, None]:
    pieces = _Pieces(encoder, job.prompt.begun)
    for _ in engine.scheduler(model, encoder, 1).run(engine.Ready([job])):
        piece = pieces.end(job.generated) if job.ended else pieces.after(job.generated)
        if piece:
            yield piece


def _stream_by_generate(
    model: Any, encoder: ChatEncoder, prompt: Prompt, settings: Settings
) -> Generator[str, None, None]:
    """Yields the pieces that the model's own `generate` makes in a thread."""
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    closed = threading.Event()

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), closed.is_set(), device=ids.device)

    def work() -> None:
        callbacks = {
            "streamer": _Streamer(_Pieces(encoder, prompt.begun), pieces.put),
            "stopping_criteria": [stop],
        }
        try:
            generate(model, encoder, [prompt], settings, **callbacks)
        finally:
            pieces.put(None)  # after an error too, or the reader below would wait for ever

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(work)
        try:
            while (piece := pieces.get()) is not None:
                if piece:
                    yield piece
        finally:
            closed.set()  # before the pool's exit, which waits until generation has stopped
        done.result()  # raises the thread's exception


class _Streamer:
    """A streamer of transformers' `generate`: gets the prompt, then every token."""

    def __init__(self, pieces: "_Pieces", emit: Callable[[str], None]) -> None:
        self.pieces = pieces
        self.emit = emit
        self.ids: list[int] | None = None

    def put(self, ids: Tensor) -> None:
        if self.ids is None:  # the first call brings the prompt
            self.ids = []
            return
        self.ids += ids.flatten().tolist()
        self.emit(self.pieces.after(self.ids))

    def end(self) -> None:
        self.emit(self.pieces.end(self.ids or []))


class _Pieces:
    """Cuts the text of an answer that grows into pieces which, joined, are its final text."""

    def __init__(self, encoder: ChatEncoder, begun: Sequence[int] = ()) -> None:
        self.encoder = encoder
        self.begun = begun
        self.sent = ""

    def after(self, ids: Sequence[int]) -> str:
        """Returns what the answer's tokens so far add; empty while that may still change."""
        # The whole answer is decoded every time (1 s in all for 2,000 tokens): the text that a
        # token adds depends on those before it.
        text = self._stable_text([*self.begun, *ids])
        return self._rest(text) if text.startswith(self.sent) else ""

    def end(self, ids: Sequence[int]) -> str:
        """Returns what is left of the answer that these tokens are."""
        return self._rest(answer_text([*self.begun, *ids], self.encoder))

    def _stable_text(self, ids: Sequence[int]) -> str:
        """Returns the text so far without what later tokens may still change."""
        template = self.encoder.template
        if template.lead and template.lead not in self.encoder.tokenizer.decode(ids):
            return ""
        # A character of several tokens decodes to U+FFFD until its last byte is there.
        text = answer_text(ids, self.encoder).rstrip("\ufffd")
        # The template's end may be plain text that arrives in several tokens.
        for length in range(len(template.end) - 1, 0, -1):
            if text.endswith(template.end[:length]):
                return text[:-length].rstrip()
        return text

    def _rest(self, text: str) -> str:
        piece = text[len(self.sent) :]
        if piece:
            self.sent = text
        return piece


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
