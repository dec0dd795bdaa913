"""Answers one job after the other by the model's own `generate`, for models that no engine runs."""

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from internvl.inference import generate
from internvl.inference.chat import Chat
from internvl.inference.engine import Job
from internvl.inference.engine.scheduler import Source


class Alone:
    """Runs jobs as `Scheduler` does, one at a time; without log-probabilities."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        encoder = chat.encoder
        self.end_id = encoder.tokenizer.convert_tokens_to_ids(encoder.template.end)

    def run(self, source: Source) -> Iterator[Job]:
        """Yields a job after each of its tokens, until the source has no more."""
        while (job := source.take(wait=True)) is not None:
            yield from self._answer(job)
            job.ended = True
            yield job

    def _answer(self, job: Job) -> Iterator[Job]:
        if job.cancelled:
            return
        tokens: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()

        def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.full((len(ids),), job.cancelled, device=ids.device)

        def work() -> None:
            callbacks = {"streamer": _Streamer(tokens), "stopping_criteria": [stop]}
            try:
                generate.generate(
                    self.chat.model, self.chat.encoder, [job.prompt], job.settings, **callbacks
                )
            finally:
                tokens.put(None)  # after an error too, or the reader below would wait for ever

        # `generate` returns only at the end, so that its tokens come from another thread.
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(work)
            while (new := tokens.get()) is not None:
                job.generated += new
                yield job
            done.result()  # raises the thread's exception


class _Streamer:
    """A streamer of transformers' `generate`: gets the prompt, then every token."""

    def __init__(self, tokens: "queue.SimpleQueue[list[int] | None]") -> None:
        self.tokens = tokens
        self.is_prompt = True

    def put(self, ids: Tensor) -> None:
        # The first call brings the prompt.
        if not self.is_prompt:
            self.tokens.put(ids.flatten().tolist())
        self.is_prompt = False

    def end(self) -> None:
        """Called after the last token, which has been put."""
