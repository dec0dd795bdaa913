"""POST /v1/chat/completions: from the request's JSON to an answer, whole or as a stream."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from internvl import log
from internvl.data.tiles import choose_grids, num_tiles
from internvl.data.tokenizers import decode
from internvl.inference.engine import Job
from internvl.inference.requests import Prompt
from internvl.serve.answer_text import AnswerText
from internvl.serve.chat_request import MOST_TILES, ChatRequest, parse
from internvl.serve.encoding import Readers, processes_for
from internvl.serve.engines import Engine, Engines, Gate
from internvl.serve.errors import ApiError, model_not_found
from internvl.serve.fields import Field, read_fields, text, whole_from
from internvl.serve.http import Handler, finished_or_gone, read_json
from internvl.serve.messages import read_messages
from internvl.serve.metrics import Metrics
from internvl.serve.options import Options
from internvl.serve.prompts import Fetcher, Prompts
from internvl.serve.rendering import Served


@dataclass(eq=False)
class Answer:
    """One answer of a request on its way."""

    index: int
    text: AnswerText
    engine: Engine[Job]
    came: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever its job has more tokens."""
    holds: bool = True
    """True while it counts among the answers that the server holds."""


@dataclass(eq=False)
class Asked:
    """A request and what the log says of it."""

    request: ChatRequest
    prompt: Prompt
    num_tiles: int
    jobs: list[Job]
    engine: Engine[Job]
    since_s: float
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    first_s: float | None = None
    """Seconds until the first token."""


class ChatRoutes:
    """Answers chat completions by the engines of one model."""

    page_file: str | None = "chat.html"

    def __init__(self, engines: Engines[Job], gate: Gate, options: Options) -> None:
        self.engines = engines
        self.gate = gate
        self.options = options
        self.metrics = Metrics()
        self.names = [options.name]
        self.fetcher = Fetcher(options.limits)
        self._prompts: dict[str, Prompts] = {}
        self._readers: Readers | None = None
        self._waiting: set[Answer] = set()

    @property
    def posts(self) -> dict[str, Handler]:
        """See `Routes`."""
        return {"/v1/chat/completions": self.complete, "/v1/tiles": self.tiles}

    def wake(self, job: Job) -> None:
        """Tells whoever waits for a job that it has more tokens."""
        job.key.came.set()
        # Here, not where it is read: a client that reads slowly keeps no other one out.
        if job.ended:
            self._release(job.key)

    def _release(self, answer: Answer) -> None:
        if answer.holds:
            answer.holds = False
            answer.engine.running -= 1
            self.gate.leave()

    def changed(self) -> None:
        """Notes that an engine is ready or has died; wakes all who wait for a dead one."""
        # Several engines may have become ready in the same moment.
        if self.engines.ready and self._readers is None:
            served = self._served
            readers = self.options.readers
            if readers is None:
                readers = processes_for(served.on_gpu, len(self.engines.engines))
            self._readers = Readers(served.renderings, readers)
            self._prompts = {
                name: Prompts(name, self.fetcher, self._readers) for name in served.renderings
            }
            self.gate.slots = self.engines.slots
        for waiting in self._waiting:
            waiting.came.set()

    async def complete(self, http: HttpRequest) -> Response:
        """Answers POST /v1/chat/completions."""
        since_s = time.monotonic()
        self.engines.check()
        asked = parse(await read_json(http, self.options.limits), self.options.temperature)
        # Before the messages: another model may have other limits.
        if asked.model not in self.names:
            raise model_not_found(asked.model, self.names)
        turns, media = read_messages(asked.messages, self.options.limits, self._served.length)
        # Before anything is fetched: images of requests that are refused cost nothing.
        self.gate.enter(asked.n)
        try:
            read = self._prompts[asked.model].read(turns, media, asked)
            prompt = await finished_or_gone(http, read)
            begun = self._begin(asked, prompt, since_s)
        # A cancelled task too: whatever ends it here, no answer has begun.
        except BaseException:
            self.gate.leave(asked.n)
            raise
        if asked.stream:
            return EventStream(self._stream(begun), lambda: self._end(begun))
        try:
            await finished_or_gone(http, self._finish(begun))
            return JSONResponse(self._whole(begun))
        finally:
            self._end(begun)

    async def tiles(self, http: HttpRequest) -> Response:
        """Answers POST /v1/tiles: how images of some sizes are cut, and their tokens."""
        self.engines.check()
        values = read_fields(await read_json(http, self.options.limits), _TILES, {})
        most_images = self.options.limits.max_images
        if len(values["sizes"]) > most_images:
            raise ApiError(
                f"{len(values['sizes']):,} sizes, and a request may have {most_images} images "
                "(--max-images); send fewer",
                param="sizes",
                code="too_many_images",
            )
        renderings = self._served.renderings
        if values["model"] is None:
            raise ApiError("model is missing", param="model")
        if values["model"] not in renderings:
            raise model_not_found(values["model"], self.names)
        rendering, most = renderings[values["model"]], values["max_dynamic_patch"]
        config = rendering.tiles
        if most is None:
            grids = choose_grids(values["sizes"], config, config.max)
        else:
            # Each image by itself, as a request with this field has it.
            config = replace(config, min=min(config.min, most), max=most)
            grids = tuple(choose_grids([size], config, most)[0] for size in values["sizes"])
        images = []
        for columns, rows in grids:
            tiles = num_tiles((columns, rows), config.thumbnail)
            images.append(
                {
                    "columns": columns,
                    "rows": rows,
                    "thumbnail": tiles > columns * rows,
                    "tokens": tiles * rendering.encoder.tokens_per_tile,
                }
            )
        return JSONResponse({"images": images})

    async def page(self, http: HttpRequest) -> Response:
        """Answers GET /page.json: what the page needs to begin."""
        self.engines.check()
        return JSONResponse(
            {
                "models": self.names,
                "system_message": self._served.base.encoder.system_message,
                "max_length": self._served.length,
            }
        )

    @property
    def _served(self) -> Served:
        served: Served = self.engines.engines[0].answering.served
        return served

    def _begin(self, asked: ChatRequest, prompt: Prompt, since_s: float) -> Asked:
        """Puts the jobs of a request into the queue of an engine.

        Raises:
            ApiError: the prompt and its answer do not fit.
        """
        self.engines.check()
        # Now, not at its arrival: images may have taken seconds.
        engine = self.engines.choose()
        served: Served = engine.answering.served
        # `generate` does not hand them out token by token.
        if asked.top_logprobs is not None and not served.by_slots:
            raise ApiError("this model is served without log-probabilities", param="logprobs")
        settings = asked.settings(self._max_tokens(asked, prompt, served))
        jobs = []
        for index in range(asked.n):
            encoder = served.renderings[asked.model].encoder
            answer = AnswerText(encoder, asked.stop, asked.skip_special_tokens)
            job = Job(Answer(index, answer, engine), prompt, settings)
            job.top_logprobs = asked.top_logprobs
            job.adapter = served.adapter_of[asked.model]
            if asked.seed is not None:
                # Answers of one request differ: each has a seed of its own.
                job.settings = replace(settings, seed=(asked.seed + index) % 2**63)
            jobs.append(job)
        self.metrics.prompt_tokens.inc(len(prompt.input_ids))
        self.metrics.tiles.inc(prompt.num_tiles)
        engine.running += len(jobs)
        # After all are made: an error above leaves none in the queue.
        for job in jobs:
            self._waiting.add(job.key)
            engine.queue.put(job)
        # Without its tiles, megabytes that the engine alone needs.
        num_tiles, prompt = prompt.num_tiles, replace(prompt, tiles=None)
        return Asked(asked, prompt, num_tiles, jobs, engine, since_s)

    def _max_tokens(self, asked: ChatRequest, prompt: Prompt, served: Served) -> int:
        length = len(prompt.input_ids)
        tiles = prompt.num_tiles
        tokens_per_tile = served.base.encoder.tokens_per_tile
        visual = f" ({tiles} tiles of {tokens_per_tile})" if tiles else ""
        left = served.length - length
        least = max(1, asked.sampling["min_new_tokens"])
        if left < max(least, asked.max_tokens or 1):
            answer = f" and the answer {asked.max_tokens:,}" if asked.max_tokens else ""
            raise ApiError(
                f"the prompt has {length:,} tokens{visual}{answer}; together they may have "
                f"{served.length:,}. Send fewer or smaller images (max_dynamic_patch), a shorter "
                "text, or a lower max_tokens",
                param="messages",
                code="context_length_exceeded",
            )
        # A short prompt must not run to the end of its slot.
        default = max(least, min(left, self.options.limits.max_tokens))
        return default if asked.max_tokens is None else asked.max_tokens

    async def _next(self, asked: Asked) -> AsyncIterator[tuple[Job, str]]:
        """Yields (job, new text) of the answers of a request until all have ended."""
        left = list(asked.jobs)
        while left:
            await _any([job.key.came for job in left])
            if asked.engine.error is not None:
                self.engines.check()
            for job in list(left):
                answer: Answer = job.key
                if not answer.came.is_set():
                    continue
                answer.came.clear()
                # In this order: once it has ended, no token comes after those that are read.
                ended = job.ended
                ids = list(job.generated)
                if ids and asked.first_s is None:
                    asked.first_s = time.monotonic() - asked.since_s
                    self.metrics.first_token_s.observe(asked.first_s)
                # A text that nobody reads before its end is decoded then, unless it may stop.
                read = asked.request.stream or asked.request.stop
                piece = answer.text.after(ids) if read and not ended else ""
                if ended:
                    piece = answer.text.end(ids)
                # Its slot is of use to others at once.
                if answer.text.stopped and not ended:
                    job.cancelled = True
                if ended or answer.text.stopped:
                    left.remove(job)
                yield job, piece

    async def _finish(self, asked: Asked) -> None:
        async for _ in self._next(asked):
            pass

    def _end(self, asked: Asked) -> None:
        """Frees what a request holds, whether it was answered or not."""
        for job in asked.jobs:
            job.cancelled = True
            self._waiting.discard(job.key)
            self._release(job.key)
        total_s = time.monotonic() - asked.since_s
        generated = sum(len(job.generated) for job in asked.jobs)
        self.metrics.tokens.inc(generated)
        self.metrics.total_s.observe(total_s)
        first = "-" if asked.first_s is None else f"{asked.first_s:.3f}"
        log.get_logger().info(
            "%s %s: %d tokens in, %d tiles, %d out, first token %s s, total %.3f s%s",
            asked.id,
            asked.request.model,
            len(asked.prompt.input_ids),
            asked.num_tiles,
            generated,
            first,
            total_s,
            f", user {asked.request.user!r:.60}" if asked.request.user else "",
        )

    def _whole(self, asked: Asked) -> dict[str, Any]:
        """Returns the chat completion of an answered request."""
        choices = [
            {
                "index": job.key.index,
                "message": {"role": "assistant", "content": job.key.text.sent, "refusal": None},
                "logprobs": self._logprobs(asked, job, 0),
                "finish_reason": self._reason(job),
            }
            for job in asked.jobs
        ]
        head = self._head(asked, "chat.completion")
        return {**head, "choices": choices, "usage": self._usage(asked)}

    async def _stream(self, asked: Asked) -> AsyncIterator[str]:
        """Yields the events of a streamed chat completion."""
        head = self._head(asked, "chat.completion.chunk")
        # OpenAI's other chunks say null where the last one has the usage.
        usage = {"usage": None} if asked.request.include_usage else {}
        shown = [0] * len(asked.jobs)

        def event(index: int, delta: Mapping[str, Any], **more: Any) -> str:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            return _event({**head, "choices": [choice | more], **usage})

        try:
            for job in asked.jobs:
                # As OpenAI: the role comes once, before any text.
                yield event(job.key.index, {"role": "assistant", "content": ""})
            async for job, piece in self._next(asked):
                index, answer = job.key.index, job.key.text
                ended = job.ended or answer.stopped
                # A token may add no text yet; its log-probability waits for the text.
                if piece or ended:
                    logprobs = self._logprobs(asked, job, shown[index])
                    shown[index] = answer.num_tokens
                if piece:
                    yield event(index, {"content": piece}, logprobs=logprobs)
                if ended:
                    rest = None if piece else logprobs
                    reason = self._reason(job)
                    yield event(index, {}, logprobs=rest, finish_reason=reason)
            if asked.request.include_usage:
                yield _event({**head, "choices": [], "usage": self._usage(asked)})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            # The status has been sent; OpenAI's client raises for an event with an error.
            yield _event(error.body)

    def _head(self, asked: Asked, noun: str) -> dict[str, Any]:
        return {
            "id": asked.id,
            "object": noun,
            "created": asked.created,
            "model": asked.request.model,
            "system_fingerprint": None,
        }

    def _usage(self, asked: Asked) -> dict[str, Any]:
        prompt = len(asked.prompt.input_ids)
        completion = sum(job.key.text.num_tokens for job in asked.jobs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _reason(self, job: Job) -> str:
        """Returns OpenAI's word for why an answer ended."""
        at_end = job.generated[-1:] == [self._served.end_id]
        return "stop" if job.key.text.stopped or at_end else "length"

    def _logprobs(self, asked: Asked, job: Job, start: int) -> dict[str, Any] | None:
        """Returns the log-probabilities of an answer's tokens from number `start` on."""
        if asked.request.top_logprobs is None:
            return None
        served = self._served
        tokenizer = served.base.encoder.tokenizer

        def entry(token: int, value: float) -> dict[str, Any]:
            word = decode(tokenizer, [token], skip_special_tokens=False)
            return {"token": word, "logprob": value, "bytes": list(word.encode())}

        # Those whose text has been sent, or the tokens after a stop string would be listed.
        stop = job.key.text.num_tokens
        content = [
            entry(token, value) | {"top_logprobs": [entry(*pair) for pair in pairs]}
            for token, (value, pairs) in zip(
                job.generated[start:stop], job.logprobs[start:stop], strict=True
            )
            # The token that ends an answer is no text of it.
            if token != served.end_id
        ]
        return {"content": content, "refusal": None}

    def close(self) -> None:
        """Ends the threads that read requests."""
        self.fetcher.close()
        if self._readers is not None:
            self._readers.close()


def _sizes(name: str, value: Any) -> list[tuple[int, int]]:
    """Reads (width, height) of images, in px."""
    side = whole_from(1, 100_000)
    if not isinstance(value, list) or not all(isinstance(v, list) and len(v) == 2 for v in value):
        raise ApiError(f"{name} must be a list of [width, height]", param=name)
    return [(side(name, width), side(name, height)) for width, height in value]


_TILES = {
    "model": Field(text),
    "sizes": Field(_sizes, ()),
    "max_dynamic_patch": Field(whole_from(1, MOST_TILES)),
}


class EventStream(StreamingResponse):
    """A stream of events; calls `ended` whether it was sent, or its client went away before."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        # Proxies would collect the pieces otherwise.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; see ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _any(events: Sequence[asyncio.Event]) -> None:
    """Waits until any of the events is set."""
    if any(event.is_set() for event in events):
        return
    # The common case costs no task.
    if len(events) == 1:
        await events[0].wait()
        return
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
