"""POST /v1/embeddings and /v1/rerank: InternVL-C, InternVL-G and its match head."""

import asyncio
import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from internvl import log
from internvl.errors import counted
from internvl.models.dual.model import Mode
from internvl.serve.dual_engine import DualEngine, DualJob
from internvl.serve.encoding import raise_undecodable
from internvl.serve.engines import Engines, Gate
from internvl.serve.errors import ApiError, model_not_found
from internvl.serve.fields import (
    Field,
    Refused,
    as_it_is,
    choice,
    flag,
    read_fields,
    text,
    whole_from,
)
from internvl.serve.http import Handler, finished_or_gone, read_json
from internvl.serve.metrics import Metrics
from internvl.serve.options import Options
from internvl.serve.prompts import FETCHING, Fetcher

MOST_INPUTS = 2048


_EMBEDDINGS = {
    "model": Field(text),
    "input": Field(as_it_is),
    "messages": Field(as_it_is),
    "encoding_format": Field(choice("float", "base64"), "float"),
    "user": Field(text, ""),
}
_EMBEDDINGS_REFUSED = {
    "dimensions": Refused((), "vectors have one length, and are not cut"),
    "truncate_prompt_tokens": Refused((), "captions are cut to 80 tokens, as in training"),
    "normalize": Refused((True,), "vectors have unit length"),
    "prompt_name": Refused((), "the prefix summarize: is the server's"),
    "task": Refused((), "the prefix summarize: is the server's"),
}
_RERANK = {
    "model": Field(text),
    "query": Field(as_it_is),
    "documents": Field(as_it_is),
    "top_n": Field(whole_from(1)),
    "return_documents": Field(flag, False),
    "user": Field(text, ""),
}
_RERANK_REFUSED = {
    "max_chunks_per_doc": Refused((), "documents are not cut"),
    "rank_fields": Refused(([],), "documents are texts or images"),
}
_IMAGE = {"url": Field(text)}
_IMAGE_REFUSED = {
    "detail": Refused(("auto",), "an image is one tile"),
    "max_dynamic_patch": Refused((1,), "an image is one tile"),
}
_MESSAGE = {"role": Field(choice("user")), "content": Field(as_it_is)}


class DualRoutes:
    """Answers embeddings and rankings by the engines of one InternVL-14B."""

    page_file: str | None = None

    def __init__(self, engines: Engines[DualJob], gate: Gate, options: Options) -> None:
        self.engines = engines
        self.gate = gate
        self.options = options
        self.metrics = Metrics()
        name = options.name
        self.modes: dict[str, Mode] = {name: "c", f"{name}:c": "c", f"{name}:g": "g"}
        self.names = list(self.modes)
        self.fetcher = Fetcher(options.limits)
        self._waiting: set[asyncio.Event] = set()

    @property
    def posts(self) -> dict[str, Handler]:
        """See `Routes`."""
        return {"/v1/embeddings": self.embed, "/v1/rerank": self.rerank}

    @staticmethod
    def wake(job: DualJob) -> None:
        """Tells whoever waits for a job that it has ended."""
        job.key.set()

    def changed(self) -> None:
        """Notes that an engine is ready or has died; wakes all who wait for a dead one."""
        if self.engines.ready:
            self.gate.slots = self.engines.slots
        for event in self._waiting:
            event.set()

    async def embed(self, http: HttpRequest) -> Response:
        """Answers POST /v1/embeddings."""
        since_s = time.monotonic()
        self.engines.check()
        body = await read_json(http, self.options.limits)
        values = read_fields(body, _EMBEDDINGS, _EMBEDDINGS_REFUSED)
        # Texts are embedded alike in both modes, but a wrong name is refused all the same.
        mode = self._mode(values["model"])
        inputs = _list_inputs(values)
        self.gate.enter()
        try:
            vectors, tokens = await finished_or_gone(http, self._vectors(inputs, mode))
        finally:
            self.gate.leave()
        # OpenAI's client asks for base64 unless it is told otherwise, and decodes it.
        as_base64 = values["encoding_format"] == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, as_base64)}
            for i, vector in enumerate(vectors)
        ]
        self._log("embeddings", values, counted(len(inputs), "input"), since_s)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse(
            {"object": "list", "data": data, "model": values["model"], "usage": usage}
        )

    async def rerank(self, http: HttpRequest) -> Response:
        """Answers POST /v1/rerank: documents by the probability that they match the query."""
        since_s = time.monotonic()
        self.engines.check()
        values = read_fields(await read_json(http, self.options.limits), _RERANK, _RERANK_REFUSED)
        # Only for its error: the match head is one for both modes.
        self._mode(values["model"])
        documents = values["documents"]
        if not isinstance(documents, list) or not 0 < len(documents) <= MOST_INPUTS:
            raise ApiError(f"documents must be a list of 1 to {MOST_INPUTS:,}", param="documents")
        query = _read_input("query", values["query"])
        read: list[tuple[str, str]] = [
            _read_input(f"documents[{i}]", value) for i, value in enumerate(documents)
        ]
        # Before anything is fetched.
        for index, (task, _) in enumerate(read):
            if task == query[0]:
                raise ApiError(
                    f"documents[{index}] and the query are both {task}; the match head compares "
                    "a text with images, or an image with texts",
                    param=f"documents[{index}]",
                )
        self.gate.enter()
        try:
            scores = await finished_or_gone(http, self._scores(query, read))
        finally:
            self.gate.leave()
        # Stable: documents of equal scores stay in their order.
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        results = []
        for index in order[: values["top_n"]]:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if values["return_documents"]:
                document = documents[index]
                # As Cohere and Jina return a text.
                result["document"] = {"text": document} if isinstance(document, str) else document
            results.append(result)
        self._log("rerank", values, counted(len(documents), "document"), since_s)
        return JSONResponse({"model": values["model"], "results": results})

    def _mode(self, name: str | None) -> Mode:
        if name is None:
            raise ApiError("model is missing", param="model")
        if name not in self.modes:
            raise model_not_found(name, self.names)
        return self.modes[name]

    async def _vectors(
        self, inputs: Sequence[tuple[str, str]], mode: Mode
    ) -> tuple[list[Any], int]:
        """Returns the vectors of (task, text or address) inputs, in order, and their tokens."""
        # A batch of texts and one of images, whatever their order in the request.
        by_task: dict[str, list[int]] = {}
        for index, (task, _) in enumerate(inputs):
            by_task.setdefault(task, []).append(index)
        vectors: dict[int, Any] = {}
        tokens = 0
        for task, indices in by_task.items():
            values: list[Any] = [inputs[index][1] for index in indices]
            names = [f"input[{i}]" for i in indices]
            if task == "images":
                values = await self._images(names, values)
            else:
                encoder = self._engine.dual.encoder
                # Images have no tokens: their count is 0, as other servers have it.
                tokens += sum(len(encoder.embedding(value)) for value in values)
            images = dict(zip(names, values, strict=True)) if task == "images" else {}
            vectors |= zip(indices, await self._run(task, values, mode, images), strict=True)
        return [vectors[index] for index in range(len(inputs))], tokens

    async def _scores(
        self, query: tuple[str, str], documents: Sequence[tuple[str, str]]
    ) -> list[float]:
        if query[0] == "images":
            names = ["query"]
            images = await self._images(names, [query[1]])
            pairs = [(images[0], value) for _, value in documents]
        else:
            names = [f"documents[{i}]" for i in range(len(documents))]
            images = await self._images(names, [value for _, value in documents])
            pairs = [(image, query[1]) for image in images]
        return await self._run("pairs", pairs, "g", dict(zip(names, images, strict=True)))

    async def _images(self, names: Sequence[str], addresses: Sequence[str]) -> list[bytes]:
        """Fetches images, some at once, each of which waits for its host.

        Raises:
            ApiError: one that cannot be had, or all together are larger than a request may be.
        """
        images: list[bytes] = []
        most = self.options.limits.max_body
        pairs = list(zip(addresses, names, strict=True))
        for first in range(0, len(pairs), FETCHING):
            some = pairs[first : first + FETCHING]
            images += await asyncio.gather(*(self.fetcher.image(*pair) for pair in some))
            # A short address can name a large file.
            if sum(map(len, images)) > most:
                raise ApiError(
                    f"{names[len(images) - 1]}: the images up to here have more than "
                    f"{most // 2**20:,} MiB together (--max-body); send fewer in a request",
                    param=names[len(images) - 1],
                    code="image_too_large",
                )
        return images

    @property
    def _engine(self) -> DualEngine:
        engine: DualEngine = self.engines.engines[0].answering
        return engine

    async def _run(
        self, task: str, inputs: Sequence[Any], mode: Mode, images: Mapping[str, bytes]
    ) -> list[Any]:
        """Has an engine compute a batch, whose `images` are known by their names.

        Raises:
            ApiError: one of them cannot be decoded, or the engine has died.
        """
        engine = self.engines.choose()
        ended = asyncio.Event()
        job = DualJob(ended, task, inputs, mode)
        self._waiting.add(ended)
        engine.running += 1
        try:
            engine.queue.put(job)
            await ended.wait()
        finally:
            engine.running -= 1
            self._waiting.discard(ended)
        # Woken by an engine that died.
        if not job.ended:
            self.engines.check()
        if job.error is not None:
            # In a thread: it decodes those before the one that cannot be.
            await asyncio.to_thread(raise_undecodable, images.items())
            raise ApiError(str(job.error), param="input")
        return job.outputs

    def _log(self, route: str, values: Mapping[str, Any], counts: str, since_s: float) -> None:
        total_s = time.monotonic() - since_s
        self.metrics.total_s.observe(total_s)
        user = f", user {values['user']!r:.60}" if values["user"] else ""
        log.get_logger().info(
            "%s %s: %s, total %.3f s%s", route, values["model"], counts, total_s, user
        )

    async def page(self, http: HttpRequest) -> Response:
        """Answers GET /page.json."""
        return JSONResponse({"models": self.names})

    def close(self) -> None:
        """Ends the threads that fetch images."""
        self.fetcher.close()


def _list_inputs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lists the inputs of an embedding request as (task, text or address of an image)."""
    given_input, messages = values["input"], values["messages"]
    if (given_input is None) == (messages is None):
        raise ApiError("send either input or messages", param="input")
    # vLLM's form.
    if messages is not None:
        return [_from_messages(messages)]
    listed = given_input if isinstance(given_input, list) else [given_input]
    if not 0 < len(listed) <= MOST_INPUTS:
        raise ApiError(f"input must have 1 to {MOST_INPUTS:,} entries", param="input")
    return [_read_input(f"input[{i}]", value) for i, value in enumerate(listed)]


def _read_input(name: str, value: Any) -> tuple[str, str]:
    """Reads a text, the data: address of an image, {"text": …} or {"image": …}."""
    if isinstance(value, str):
        # Other addresses may be meant as texts; {"image": …} says that they are not.
        task = "images" if value[:11].lower() == "data:image/" else "texts"
        return task, _not_empty(name, text(name, value))
    if isinstance(value, Mapping):
        entries = {key: entry for key, entry in value.items() if entry is not None}
        # Two keys would leave one unread.
        if len(entries) == 1 and next(iter(entries)) in ("text", "image"):
            ((key, entry),) = entries.items()
            # OpenAI's content part has one level more.
            if key == "image" and isinstance(entry, Mapping):
                entry = read_fields(entry, _IMAGE, _IMAGE_REFUSED, f"{name}.{key}")["url"]
            return f"{key}s", _not_empty(name, text(f"{name}.{key}", entry))
    raise ApiError(
        f'{name} must be a text, {{"text": …}} or {{"image": "data:…" or "https:…"}}, not tokens '
        "or anything else",
        param=name,
    )


def _not_empty(name: str, value: str) -> str:
    if not value.strip():
        raise ApiError(f"{name} is empty; leave it out", param=name)
    return value


def _from_messages(messages: Any) -> tuple[str, str]:
    """Reads vLLM's form: one message with one content part, a text or an image."""
    refusal = ApiError(
        "messages must be one message of one content part, text or image_url; send several inputs "
        "as input",
        param="messages",
    )
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], Mapping):
        raise refusal
    content = read_fields(messages[0], _MESSAGE, {}, "messages[0]")["content"]
    if isinstance(content, str):
        return _read_input("messages[0].content", content)
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], Mapping):
        raise refusal
    name, type_ = "messages[0].content[0]", content[0].get("type")
    if type_ not in ("text", "image_url"):
        raise refusal
    entry = read_fields(content[0], {"type": Field(text), type_: Field(as_it_is)}, {}, name)[type_]
    return _read_input(name, {"text" if type_ == "text" else "image": entry})


def _encoded(vector: Any, as_base64: bool) -> Any:
    # Little-endian float32, which OpenAI's client decodes.
    values = np.asarray(vector, dtype="<f4")
    return base64.b64encode(values.tobytes()).decode() if as_base64 else values.tolist()
