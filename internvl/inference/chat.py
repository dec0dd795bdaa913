"""A chat model with its tokenizer, template and tiling; answers in batches or as a stream."""

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from internvl.config import TilesConfig
from internvl.data.arguments import list_images
from internvl.data.chat import ChatEncoder
from internvl.data.images import STATISTICS, Exif, stored_size
from internvl.data.templates import Template
from internvl.data.tiles import choose_grids, num_tiles
from internvl.errors import BadImage, ModelFolderError, UserError
from internvl.inference import generate, requests
from internvl.inference.conversation import Conversation, Turns, list_turns
from internvl.inference.generate import Settings, answers
from internvl.inference.handle import describe_weights
from internvl.inference.requests import Request
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
    def exif(self) -> Exif:
        """See `Handle.exif`."""
        exif: Exif = configs.chat_settings(self.model.config)["exif"]
        return exif

    def num_tiles(self, image: str) -> int:
        """See `Handle.num_tiles`."""
        # No header is read if all images have as many.
        if self.tiles.max == 1:
            return 1
        try:
            size = stored_size(image, self.exif)
        except BadImage:
            return 1
        (grid,) = choose_grids([size], self.tiles, self.tiles.max)
        return num_tiles(grid, self.tiles.thumbnail)

    @property
    def encoder(self) -> ChatEncoder:
        """Encodes conversations to token ids. Raises ModelFolderError without a tokenizer."""
        # Here and not in `load`: a model without tokenizer still exports and merges.
        if self.tokenizer is None:
            raise ModelFolderError(
                f"{self.folder}: no tokenizer files; copy those of the release there to use text"
            )
        return ChatEncoder(self.tokenizer, self.template, self.tokens_per_tile, self.system_message)

    def ask(
        self,
        images: Any,
        question: str | None = None,
        *,
        history: Turns = (),
        videos: Any = (),
        num_frames: int = 8,
        max_tiles: int | None = None,
        max_new_tokens: int = 1024,
        **settings: Any,
    ) -> str:
        """Answers one question: `ask("cat.jpg", "What is this?")`, or `ask("Hello")` without image.

        Args:
            images: one or several, or None; `<image>` in the question places them, otherwise they
                precede it.
            history: earlier turns, (question, answer) each, or messages. Their images come first
                in `images`, and their questions have `<image>` where these stand.
            videos: one or several, placed by `<video>` or before the question.
            num_frames: frames taken from each video.
            max_tiles: most tiles of all images together; None: the checkpoint's.
            settings: further fields of `generate.Settings`.

        Raises:
            BadImage: an image or video cannot be read.
            BadSample: turns or marks that training would refuse.
            UserError: an unknown setting or one out of range, or no question.
        """
        # A single argument is the question: text alone, or about videos.
        if question is None:
            images, question = None, _lone_question(images)
        # An image is no question: both are texts, so a swapped call has no other sign.
        elif isinstance(images, str) and isinstance(question, str):
            if os.path.isfile(question) and not os.path.exists(images):
                raise UserError(f"images come first: ask({question!r}, {images!r})")
        turns = [*list_turns(history), {"role": "user", "content": question}]
        request = Request(turns, images, videos, num_frames, max_tiles)
        (answer,) = self.answer(request, max_new_tokens=max_new_tokens, **settings)
        return answer

    def conversation(
        self,
        images: Any = (),
        *,
        videos: Any = (),
        num_frames: int = 8,
        max_tiles: int | None = None,
        system: str | None = None,
        **settings: Any,
    ) -> Conversation:
        """Starts a conversation, which keeps its turns: `conversation("cat.jpg").ask("What?")`.

        Args and errors: see `Conversation`.
        """
        return Conversation(
            self,
            images,
            videos=videos,
            num_frames=num_frames,
            max_tiles=max_tiles,
            system=system,
            **settings,
        )

    def pixel_values(self, image: Any, max_tiles: int | None = None) -> Tensor:
        """Returns the normalized tiles of an image, float32 (N, 3, S, S).

        What the original's `load_image` returns; the tiles of several images, concatenated, count
        as one image.

        Raises:
            BadImage: it cannot be read.
            UserError: several images.
        """
        # One: tiles of several, joined without their counts, could not be told apart again.
        listed_images = list_images(image)
        if len(listed_images) != 1:
            raise UserError(f"pixel_values takes one image, not {len(listed_images)}")
        config = configs.chat_settings(self.model.config)
        statistics = STATISTICS[config["normalize"]]
        most = self.tiles.max if max_tiles is None else max_tiles
        # No grid has at least `min` and at most `most` tiles if `min` is larger.
        tiles = replace(self.tiles, min=min(self.tiles.min, most), max=most)
        pixels, _ = requests.stack_tiles(
            listed_images, [False], tiles, "pixel_values", config["exif"], statistics[0]
        )
        assert pixels is not None
        return generate.normalized(pixels, statistics)

    def answer(
        self,
        requests: Sequence[Request | str] | Request | str,
        *,
        max_new_tokens: int = 1024,
        batch_size: int | None = None,
        seeds: Sequence[int] | None = None,
        **settings: Any,
    ) -> list[str]:
        """Answers requests in batches; returns one answer per request, in order.

        Args:
            requests: one or several; a text is a question without images.
            seeds: of every request, in place of the setting `seed`.
            settings: further fields of `generate.Settings`.

        Raises:
            UserError: an unknown setting or one out of range, or a bad request; see
                `generate.encode`.
        """
        # Not in the signature: Settings alone names and checks them, for `stream` too.
        all_settings = Settings.from_kwargs(max_new_tokens=max_new_tokens, **settings)
        return answers(
            self.model,
            self.encoder,
            self.tiles,
            requests,
            all_settings,
            batch_size=batch_size,
            seeds=seeds,
        )

    def stream(
        self, request: Request | str, *, max_new_tokens: int = 1024, **settings: Any
    ) -> Generator[str, None, None]:
        """Yields the pieces of one answer while it is generated; joined they equal `answer`'s.

        Raises:
            UserError: as `answer`, or beam search, whose text is known only at its end.
        """
        all_settings = Settings.from_kwargs(max_new_tokens=max_new_tokens, **settings)
        config = configs.chat_settings(self.model.config)
        request = Request(request) if isinstance(request, str) else request
        # Encoded before the iterator is returned: a bad request is refused at the call.
        prompt = requests.encode(
            request, self.encoder, self.tiles, exif=config["exif"], normalize=config["normalize"]
        )
        return generate.stream(self.model, self.encoder, prompt, all_settings)

    def caption(
        self,
        images: Any,
        prompt: str = caption_prompt,
        *,
        num_beams: int = caption_beams,
        max_new_tokens: int = 30,
        min_new_tokens: int = 8,
        batch_size: int | None = None,
    ) -> list[str]:
        """Generates a caption per image, in order: the answer to `prompt`.

        Raises:
            UserError: an image or a setting that cannot be used.
        """
        # The mark and its newline as the original's `chat` puts them before a question.
        message = {"role": "user", "content": f"<image>\n{prompt}"}
        one_each = [Request([message], [image]) for image in list_images(images)]
        settings = Settings(max_new_tokens, min_new_tokens, num_beams)
        return answers(
            self.model, self.encoder, self.tiles, one_each, settings, batch_size=batch_size
        )

    def as_chat(self, purpose: str) -> "Chat":
        """See `Handle.as_chat`."""
        return self

    def as_dual(self, purpose: str) -> "Dual":
        """See `Handle.as_dual`."""
        raise UserError(f"{purpose} needs an InternVL-14B model; this is a chat model")

    # The dataclass's own would print every module of the model.
    def __repr__(self) -> str:
        tiles = f"1 tile of {self.tiles.size} px"
        if self.tiles.max > 1:
            thumbnail = " and a thumbnail" if self.tiles.thumbnail else ""
            tiles = f"{self.tiles.min} to {self.tiles.max} tiles of {self.tiles.size} px{thumbnail}"
        return (
            f"<Chat: {self.folder}\n"
            f"  {describe_weights(self.model)}\n"
            f"  template {self.template.name}; an image is {tiles}\n"
            "  ask(image, question), conversation(images), answer(requests), stream(request)>"
        )


def _lone_question(question: Any) -> str:
    """Returns the question of an `ask` without images.

    Raises:
        UserError: it is no text, or names an image.
    """
    if not isinstance(question, str):
        raise UserError("ask needs a question: ask(images, question)")
    # Rather a forgotten question than one about a file's name.
    if os.path.isfile(question):
        raise UserError(
            f"ask needs a question about {question}: ask({question!r}, 'What is this?')"
        )
    return question
