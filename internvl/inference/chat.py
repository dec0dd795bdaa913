"""A chat model with its tokenizer, template and tiling; answers in batches or as a stream."""

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
    """A chat model with its tokenizer, conversation template and tiling."""

    model: chat_model.ChatModel
    tokenizer: PreTrainedTokenizerFast | None
    """None if the folder has no tokenizer files."""
    template: Template
    tiles: TilesConfig
    """Tiling of the checkpoint, or of the recipe in a run."""
    system_message: str | None
    """System message of the checkpoint; None takes the template's."""
    folder: Path
    """Folder of the weights."""

    family = "chat"
    # Prompt and beams of the original's evaluate_caption.py, so that published scores compare.
    caption_prompt = "Provide a one-sentence caption for the provided image."
    caption_beams = 1

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.model.device

    @property
    def tokens_per_tile(self) -> int:
        """Number of visual tokens of a tile (K)."""
        return chat_model.tokens_per_tile(self.model.config, self.tiles.size)

    @property
    def encoder(self) -> ChatEncoder:
        """Encodes conversations to token ids. Raises ModelFolderError without a tokenizer."""
        # Here and not in `load`: a model without tokenizer still exports and merges.
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
        """Answers requests in batches; returns one answer per request, in order.

        Args:
            settings: further fields of `generate.Settings`.

        Raises:
            UserError: an unknown setting or one out of range, or a bad request; see
                `generate.encode`.
        """
        # Not in the signature: Settings alone names and checks them, for `stream` too.
        all_settings = Settings.from_kwargs(max_new_tokens=max_new_tokens, **settings)
        return answers(
            self.model, self.encoder, self.tiles, requests, all_settings, batch_size=batch_size
        )

    def stream(
        self, request: Request, *, max_new_tokens: int = 1024, **settings: Any
    ) -> Iterator[str]:
        """Yields the pieces of one answer while it is generated; joined they equal `answer`'s.

        Raises:
            UserError: as `answer`, or beam search, whose text is known only at its end.
        """
        all_settings = Settings.from_kwargs(max_new_tokens=max_new_tokens, **settings)
        config = configs.chat_settings(self.model.config)
        # Encoded before the iterator is returned: a bad request is refused at the call.
        prompt = generate.encode(
            request, self.encoder, self.tiles, exif=config["exif"], normalize=config["normalize"]
        )
        return generate.stream(self.model, self.encoder, prompt, all_settings)

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
        """Generates a caption per image, in order: the answer to `prompt`.

        Raises:
            UserError: an image or a setting that cannot be used.
        """
        # The mark and its newline as the original's `chat` puts them before a question.
        message = {"role": "user", "content": f"<image>\n{prompt}"}
        requests = [Request([message], [image]) for image in images]
        settings = Settings(max_new_tokens, min_new_tokens, num_beams)
        return answers(
            self.model, self.encoder, self.tiles, requests, settings, batch_size=batch_size
        )

    def as_chat(self, purpose: str) -> "Chat":
        """See `Handle.as_chat`."""
        return self

    def as_dual(self, purpose: str) -> "Dual":
        """See `Handle.as_dual`."""
        raise UserError(f"{purpose} needs an InternVL-14B model; this is a chat model")
