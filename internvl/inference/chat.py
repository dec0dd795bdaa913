"""A chat model with its tokenizer, template and tiling: answers in batches or streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast

from internvl.config import TilesConfig
from internvl.data.chat import ChatEncoder
from internvl.data.templates import Template
from internvl.errors import ModelFolderError, UserError
from internvl.inference import generate
from internvl.inference.generate import Request, Settings, answers
from internvl.models import configs
from internvl.models.chat import model as chat_model

if TYPE_CHECKING:
    from internvl.inference.dual import Dual


@dataclass(frozen=True)
class Chat:
    """A chat model with everything that came with it."""

    model: chat_model.ChatModel
    tokenizer: PreTrainedTokenizerFast | None
    """None where the folder has no tokenizer files."""
    template: Template
    tiles: TilesConfig
    """How the released model tiles an image."""
    system_message: str | None
    """Replaces the template's, where the checkpoint has its own."""
    folder: Path
    """Where the weights came from."""

    family = "chat"
    caption_prompt = "Provide a one-sentence caption for the provided image."
    """The original's only prompt for captions; `<image>` comes before it."""
    caption_beams = 1

    @property
    def device(self) -> torch.device:
        """Where images and questions go in."""
        return self.model.device

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of a tile (K)."""
        return chat_model.tokens_per_tile(self.model.config, self.tiles.size)

    @property
    def encoder(self) -> ChatEncoder:
        """Renders conversations for this model. Raises ModelFolderError without a tokenizer."""
        if self.tokenizer is None:
            raise ModelFolderError(
                f"{self.folder}: no tokenizer files; copy those of the release there to use text"
            )
        return ChatEncoder(self.tokenizer, self.template, self.tokens_per_tile, self.system_message)

    def answer(
        self,
        requests: Sequence[Request] | Request,
        *,
        max_new_tokens: int = 1024,
        batch_size: int = 16,
        **settings: Any,
    ) -> list[str]:
        """One answer per request, in order; `settings` are fields of `generate.Settings`.

        Raises:
            UserError: an unknown setting, one out of range, or a bad request; see `encode` there.
        """
        chosen = Settings.of(max_new_tokens=max_new_tokens, **settings)
        return answers(
            self.model, self.encoder, self.tiles, requests, chosen, batch_size=batch_size
        )

    def stream(
        self, request: Request, *, max_new_tokens: int = 1024, **settings: Any
    ) -> Iterator[str]:
        """The pieces of one answer as they are generated; joined they are `answer`'s.

        Raises:
            UserError: with beam search, whose text is known at the end only.
        """
        chosen = Settings.of(max_new_tokens=max_new_tokens, **settings)
        known = configs.chat_settings(self.model.config)
        prompt = generate.encode(
            request, self.encoder, self.tiles, exif=known["exif"], normalize=known["normalize"]
        )
        return generate.stream(self.model, self.encoder, prompt, chosen)

    def caption(
        self,
        images: Sequence[Any],
        prompt: str = caption_prompt,
        *,
        num_beams: int = caption_beams,
        max_new_tokens: int = 30,
        min_new_tokens: int = 8,
        batch_size: int = 16,
    ) -> list[str]:
        """Answers to `prompt` about each image, in order; one image each.

        Raises:
            UserError: an image or a setting that cannot be used.
        """
        message = {"role": "user", "content": f"<image>\n{prompt}"}
        requests = [Request([message], [image]) for image in images]
        chosen = Settings(max_new_tokens, min_new_tokens, num_beams)
        return answers(
            self.model, self.encoder, self.tiles, requests, chosen, batch_size=batch_size
        )

    def as_chat(self, purpose: str) -> "Chat":
        """See `Handle.as_chat`."""
        return self

    def as_dual(self, purpose: str) -> "Dual":
        """See `Handle.as_dual`."""
        raise UserError(f"{purpose} needs an InternVL-14B model; this is a chat model")
