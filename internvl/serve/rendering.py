"""What requests are read and answers written with: all of a chat model but its weights."""

from dataclasses import dataclass
from functools import cached_property

from internvl.config import TilesConfig
from internvl.data.chat import ChatEncoder
from internvl.data.images import Exif
from internvl.inference.chat import Chat
from internvl.models import configs


@dataclass(frozen=True)
class Rendering:
    """How requests to one name become prompts, and tokens text."""

    encoder: ChatEncoder
    tiles: TilesConfig
    exif: Exif
    normalize: str

    @classmethod
    def of_chat(cls, chat: Chat) -> "Rendering":
        """Reads it from a chat model."""
        # Looked up once: the configuration stays in the engine's process.
        settings = configs.chat_settings(chat.model.config)
        return cls(chat.encoder, chat.tiles, settings["exif"], settings["normalize"])


@dataclass(frozen=True)
class Served:
    """An engine as the routes see it, wherever its model is."""

    renderings: dict[str, Rendering]
    """By the name of each adapter; the model's own first."""
    slots: int
    """Requests at a time."""
    length: int
    """Most tokens of a prompt and its answer."""
    by_slots: bool
    """True if slots answer; else one request is answered after the other."""
    on_gpu: bool

    @cached_property
    def adapter_of(self) -> dict[str, int]:
        """Index of the adapter that a name chooses, 0 for none."""
        return {name: index for index, name in enumerate(self.renderings)}

    @property
    def base(self) -> Rendering:
        """The model's own."""
        # A dictionary keeps the order in which it was filled.
        return next(iter(self.renderings.values()))

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer."""
        # Adapters share it: their tokens are chosen in one batch.
        encoder = self.base.encoder
        end_id: int = encoder.tokenizer.convert_tokens_to_ids(encoder.template.end)
        return end_id
