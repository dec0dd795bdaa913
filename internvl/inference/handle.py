"""What every loaded model offers, whichever its family: `Chat` and `Dual` are the two."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from internvl.inference.chat import Chat
    from internvl.inference.dual import Dual


class Handle(Protocol):
    """A model with its tokenizer, ready to use."""

    @property
    def family(self) -> str:
        """Key of `families.FAMILIES`: "chat" or "dual"."""
        ...

    @property
    def model(self) -> Any:
        """The module itself: a ChatModel or a DualModel."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """None where the folder has no tokenizer files."""
        ...

    @property
    def folder(self) -> Path:
        """Where the weights came from."""
        ...

    @property
    def device(self) -> torch.device:
        """Where inputs go in."""
        ...

    @property
    def encoder(self) -> Any:
        """Texts to token ids: a ChatEncoder or a CaptionEncoder. Raises ModelFolderError."""
        ...

    @property
    def caption_prompt(self) -> str:
        """The original's prompt for a caption."""
        ...

    @property
    def caption_beams(self) -> int:
        """Beams of the original's search for a caption."""
        ...

    def caption(
        self,
        images: Sequence[Any],
        prompt: str = ...,
        *,
        num_beams: int = ...,
        max_new_tokens: int = ...,
        min_new_tokens: int = ...,
        batch_size: int = ...,
    ) -> list[str]:
        """A caption of each image, in order."""
        ...

    def as_chat(self, purpose: str) -> "Chat":
        """The handle where it converses.

        Args:
            purpose: what needs it, the subject of the message.

        Raises:
            UserError: this model does not converse.
        """
        ...

    def as_dual(self, purpose: str) -> "Dual":
        """The handle where it embeds images and texts; as `as_chat`.

        Raises:
            UserError: this model has no embeddings.
        """
        ...
