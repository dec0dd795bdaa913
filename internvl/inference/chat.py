"""A chat model with its tokenizer, template and tiling: answers in batches or streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from internvl.config import TilesConfig
from internvl.data.chat import ChatEncoder
from internvl.data.templates import Template
from internvl.errors import ModelFolderError
from internvl.inference import generate
from internvl.inference.generate import Request, Settings, answers
from internvl.models import configs
from internvl.models.chat import model as chat_model


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
