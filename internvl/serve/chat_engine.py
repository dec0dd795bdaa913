"""The engine of a chat model: the scheduler's slots, filled from a queue."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from internvl import log
from internvl.errors import ModelFolderError, UserError
from internvl.inference import engine
from internvl.inference.chat import Chat
from internvl.inference.engine.scheduler import Job, Scheduler, Source
from internvl.inference.families import FAMILIES
from internvl.inference.requests import Request, encode
from internvl.inference.settings import Settings
from internvl.models import configs
from internvl.serve.alone import Alone
from internvl.serve.options import Options
from internvl.serve.rendering import Rendering, Served

if TYPE_CHECKING:
    from internvl.models.adapters.switched import Switch

PATIENCE_S = 0.02
"""Longest that a request waits for others to share its prefill, while others are decoded."""
STEPS_BETWEEN_ROWS = 4
"""Tokens that others get between two prefills. Without, a full queue is prefilled row after row:
nobody sees a token until the last row, all answers end together, and the GPU waits for the clients.
Eight rows of eight, four steps apart, end apart if answers have some thirty tokens."""


class ChatEngine:
    """Answers the jobs of a queue with one chat model."""

    def __init__(
        self, chat: Chat, options: Options, adapters: Mapping[str, Path] | None = None
    ) -> None:
        """Makes the slots, and answers once so that what is built at first use is there.

        Args:
            adapters: folders of adapters by the names that requests choose them with.

        Raises:
            ModelFolderError: an adapter that does not fit the model, or cannot be chosen by row.
            UserError: adapters for a model that only `generate` runs.
        """
        self.chat = chat
        chats = {options.name: chat}
        switch = None
        if adapters:
            switch, chosen = with_adapters(chat, adapters)
            chats |= chosen
        self.by_slots = engine.runs(chat.model, Settings())
        """True if slots answer; else one request is answered after the other."""
        text = chat.model.config.text_config
        # Beyond a window or a change of rotary embeddings `generate` goes on, slots do not.
        limit = engine.longest(text) if self.by_slots else text.max_position_embeddings
        self.length = min(options.limits.max_length, limit - 1)
        """Most tokens of a prompt and its answer."""
        self.scheduler: Scheduler | Alone = Alone(chat)
        if self.by_slots:
            self.scheduler = self._slots_of(options, switch)
        elif switch is not None:
            raise UserError(
                f"{chat.folder}: the engine does not run this model, so that no adapter can be "
                "chosen by request; export the adapter merged, and serve that model"
            )
        else:
            log.get_logger().warning(
                "the engine does not run this model (spread over several GPUs, or with attention "
                "to a window): one request is answered after the other"
            )
        self._warm_up()
        slots = 1
        # Only now: the warm-up has found how many the memory holds.
        if isinstance(self.scheduler, Scheduler):
            cache = self.scheduler.decoder.cache
            slots = self.scheduler.most_slots if cache is None else cache.slots
        renderings = {name: Rendering.of_chat(model) for name, model in chats.items()}
        on_gpu = chat.device.type == "cuda"
        self.served = Served(renderings, slots, self.length, self.by_slots, on_gpu)
        """The engine as the routes see it."""

    def _slots_of(self, options: Options, switch: "Switch | None") -> Scheduler:
        chat = self.chat
        on_gpu = chat.device.type == "cuda"
        # Compiled code and fused products would have to know the layers of adapters.
        compiled = on_gpu and switch is None if options.compiled is None else options.compiled
        if compiled:
            engine.accelerate(chat.model)
        return engine.scheduler(
            chat.model,
            chat.encoder,
            options.slots,
            compiled=compiled,
            length=self.length,
            # A CPU wins nothing by larger rows.
            patience_s=PATIENCE_S if on_gpu else 0.0,
            steps_between_rows=STEPS_BETWEEN_ROWS,
            switch=switch,
        )

    @property
    def slots(self) -> int:
        """See `Answering`."""
        return self.served.slots

    def run(self, queue: Source, tell: Callable[[Any], None]) -> None:
        """See `Answering`."""
        for job in self.scheduler.run(_Seeded(queue, self.chat.device)):
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


class _Seeded:
    """A source whose jobs draw from generators of their own if their settings have a seed."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source = source
        self.device = device

    def take(self, *, wait: bool) -> Job | None:
        job = self.source.take(wait=wait)
        if job is not None and job.settings.seed is not None:
            # On the model's device: here it is known, wherever the request was read.
            job.generator = torch.Generator(self.device).manual_seed(job.settings.seed)
        return job


def with_adapters(chat: Chat, folders: Mapping[str, Path]) -> "tuple[Switch, dict[str, Chat]]":
    """Puts adapters on a chat model; returns what chooses among them, and the model by name.

    Raises:
        ModelFolderError: an adapter that does not fit, or that needs another end of answers,
            another normalization or another side of tiles.
    """
    # Here: PEFT takes half a second, which a server without adapters need not wait.
    from internvl.models.adapters import lora, switched
    from internvl.models.adapters.folder import SETTINGS_FILE, is_adapter
    from internvl.models.adapters.settings import settings_of
    from internvl.models.trainable import has_adapters

    # The new adapters were trained on the merged weights.
    if has_adapters(chat.model):
        lora.merge(chat.model)
    config = chat.model.config
    own_settings = config.internvl
    read, chats = [], {}
    for name, folder in folders.items():
        # A run keeps its adapters in a folder of its own.
        if not is_adapter(folder) and is_adapter(folder / "adapter"):
            folder = folder / "adapter"
        settings = settings_of(folder)
        chosen: Any = FAMILIES["chat"].stored(chat, settings, folder / SETTINGS_FILE)
        # `stored` has written to the configuration that all of them share.
        config.internvl = own_settings
        _check_alike(chat, chosen, settings, folder)
        chats[name] = chosen
        read.append(switched.read(chat.model, folder))
    return switched.attach(chat.model, read), chats


def _check_alike(chat: Chat, other: Chat, settings: Mapping[str, Any], folder: Path) -> None:
    """Raises ModelFolderError for an adapter that cannot share a batch with the base."""
    base = configs.chat_settings(chat.model.config)
    pairs = {
        "template": (chat.template.end, other.template.end),
        **{
            key: (base.get(key), settings[key])
            for key in ("normalize", "exif")
            if settings.get(key) is not None
        },
        "force_image_size": (chat.tiles.size, settings.get("force_image_size") or chat.tiles.size),
    }
    for key, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ModelFolderError(
                f"{folder}: its {key} is {theirs!r} and the base's {ours!r}, so that they share no "
                "batch; export it merged (`internvl export`), and serve that model"
            )
