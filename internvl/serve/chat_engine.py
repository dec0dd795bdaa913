"""The engine of a chat model: the scheduler's slots, filled from a queue."""

from collections.abc import Callable
from typing import Any

import torch

from internvl.errors import UserError
from internvl.inference import engine
from internvl.inference.chat import Chat
from internvl.inference.requests import Request, encode
from internvl.inference.settings import Settings
from internvl.models import configs
from internvl.serve.engines import JobQueue
from internvl.serve.options import Options

PATIENCE_S = 0.02
"""Longest that a request waits for others to share its prefill, while others are decoded."""


class ChatEngine:
    """Answers the jobs of a queue with one chat model."""

    def __init__(self, chat: Chat, options: Options) -> None:
        """Makes the slots, and answers once so that what is built at first use is there.

        Raises:
            UserError: a model that only `generate` runs.
        """
        if not engine.runs(chat.model, Settings()):
            raise UserError(
                f"{chat.folder}: the engine does not run this model (spread over several GPUs, or "
                "with attention to a window); serve it with vLLM or LMDeploy, whose commands "
                "`internvl export` prints"
            )
        self.chat = chat
        on_gpu = chat.device.type == "cuda"
        compiled = on_gpu if options.compiled is None else options.compiled
        if compiled:
            engine.accelerate(chat.model)
        limit = engine.longest(chat.model.config.text_config)
        self.length = min(options.limits.max_length, limit - 1)
        """Most tokens of a prompt and its answer."""
        self.scheduler = engine.scheduler(
            chat.model,
            chat.encoder,
            options.slots,
            compiled=compiled,
            length=self.length,
            patience_s=PATIENCE_S if on_gpu else 0.0,
        )
        self._warm_up()

    @property
    def slots(self) -> int:
        """Requests at a time."""
        cache = self.scheduler.decoder.cache
        return self.scheduler.most_slots if cache is None else cache.slots

    def run(self, queue: JobQueue[Any], tell: Callable[[Any], None]) -> None:
        """See `Answering`."""
        for job in self.scheduler.run(queue):
            tell(job)

    def _warm_up(self) -> None:
        side = self.chat.tiles.size
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        config = configs.chat_settings(self.chat.model.config)
        # With an image and without: both of the first requests should be as fast as later ones.
        for images in ([image], []):
            request = Request("Hello", images)
            prompt = encode(
                request,
                self.chat.encoder,
                self.chat.tiles,
                exif=config["exif"],
                normalize=config["normalize"],
            )
            job = engine.Job(None, prompt, Settings(max_new_tokens=2))
            for _ in self.scheduler.run(engine.Ready([job])):
                pass
