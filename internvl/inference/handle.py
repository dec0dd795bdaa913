"""The protocol of a loaded model of any family, which `Chat` and `Dual` implement."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedTokenizerFast

from internvl.data.images import Exif

# For annotations only: code that takes any handle should import neither family.
if TYPE_CHECKING:
    from internvl.inference.chat import Chat
    from internvl.inference.dual import Dual


# A protocol, not a base class: both are dataclasses whose fields serve as these properties.
class Handle(Protocol):
    """A loaded model with its tokenizer."""

    @property
    def family(self) -> str:
        """Family name, a key of `families.FAMILIES`: "chat" or "dual"."""
        ...

    @property
    def model(self) -> Any:
        """The module, a ChatModel or a DualModel."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer; None if the folder has no tokenizer files."""
        ...

    @property
    def folder(self) -> Path:
        """Folder of the weights."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        ...

    @property
    def encoder(self) -> Any:
        """Encodes text to token ids: a ChatEncoder or a CaptionEncoder.

        Raises:
            ModelFolderError: no tokenizer.
        """
        ...

    @property
    def caption_prompt(self) -> str:
        """The prompt of the original's caption evaluation."""
        ...

    @property
    def caption_beams(self) -> int:
        """Number of beams of the original's caption evaluation."""
        ...

    @property
    def exif(self) -> Exif:
        """Whether the EXIF orientation of images is applied, see `open_rgb`."""
        ...

    def num_tiles(self, image: str) -> int:
        """Returns the number of tiles of an image file, from its header; 1 if it has none."""
        ...

    def caption(
        self,
        images: Sequence[Any],
        # Defaults differ between the families, so none is stated here.
        prompt: str = ...,
        *,
        num_beams: int = ...,
        max_new_tokens: int = ...,
        min_new_tokens: int = ...,
        batch_size: int | None = ...,
    ) -> list[str]:
        """Generates a caption per image, in order."""
        ...

    def as_chat(self, purpose: str) -> "Chat":
        """Returns itself as a chat model.

        Args:
            purpose: what needs a chat model, the subject of the error message.

        Raises:
            UserError: this model is not a chat model.
        """
        ...

    def as_dual(self, purpose: str) -> "Dual":
        """Returns itself as an embedding model; `purpose` as in `as_chat`.

        Raises:
            UserError: this model does not embed images and texts.
        """
        ...


def describe_weights(model: Any) -> str:
    """Describes the weights of a module: "2.2 B parameters, bfloat16, on cuda:0"."""
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    # Several: adapters beside a base in 16 bits, or a device map.
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    devices = sorted({str(parameter.device) for parameter in parameters})
    size = f"{count / 1e9:.1f} B" if count >= 5e7 else f"{count / 1e6:.1f} M"
    return f"{size} parameters, {' and '.join(dtypes)}, on {', '.join(devices)}"
