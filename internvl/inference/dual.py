"""InternVL-14B in use: images and captions to embeddings, pairs to matches, images to captions.

Original: `encode_image`, `encode_text` and `forward` of `clip_benchmark/.../internvl_huggingface`,
and `internvl_g/eval/evaluate_caption.py`. An image or caption gets the same answer in every batch.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from internvl.data.arguments import (
    check_number,
    check_whole,
    list_images,
    list_texts,
    not_a_text,
)
from internvl.data.images import FileSlice, rgb_at
from internvl.data.pairs import (
    CaptionEncoder,
    center_square,
    clean_caption,
    pad_right,
    square,
)
from internvl.data.tokenizers import decode
from internvl.errors import ModelFolderError, UserError
from internvl.models.dual.beam_search import BeamSearchConfig
from internvl.models.dual.model import DualModel, Mode
from internvl.models.vision import normalize_tiles

ImageInput = str | Path | bytes | BinaryIO | FileSlice | Image.Image | np.ndarray
ImageInputs = Sequence[ImageInput] | ImageInput | Tensor
"""Paths, `data:` addresses, encoded files, file objects, opened images and uint8 arrays (H, W, 3);
or all of them normalized already, (B, 3, S, S). One alone is a row of its own."""
Captions = Sequence[str] | str | Tensor
"""Strings, or token ids padded with 0, int64 (R, L). One alone is a row of its own."""

if TYPE_CHECKING:
    from internvl.inference.chat import Chat


@dataclass(frozen=True)
class Dual:
    """InternVL-14B with its tokenizer; in a file of InternVL-C alone what needs the queries
    refuses."""

    model: DualModel
    tokenizer: PreTrainedTokenizerFast | None
    """None where the folder has no tokenizer files."""
    folder: Path
    """Where the weights came from."""

    family = "dual"
    caption_prompt = "English caption:"
    caption_beams = 5

    @property
    def device(self) -> torch.device:
        """Where images and captions go in."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def image_size(self) -> int:
        """Side (S) of the square image, px."""
        return self.model.config.image_size

    @property
    def encoder(self) -> CaptionEncoder:
        """Captions to ids. Raises ModelFolderError without a tokenizer."""
        if self.tokenizer is None:
            raise ModelFolderError(
                f"{self.folder}: no tokenizer files; copy those of the release there to use text, "
                "or pass input_ids"
            )
        return CaptionEncoder(self.tokenizer)

    @torch.no_grad()
    def encode_images(
        self,
        images: ImageInputs,
        mode: Mode = "c",
        *,
        normalize: bool = True,
        batch_size: int = 64,
        crop: bool = False,
    ) -> Tensor:
        """Features of images, float32 (B, E) on the CPU, of unit length.

        Args:
            images: one, or several: paths, bytes, opened images or uint8 arrays (H, W, 3), or a
                normalized tensor (B, 3, S, S).
            mode: "c" for InternVL-C, "g" for InternVL-G (both embed texts alike).
            normalize: False returns what the original's `encode_image` does; for "g" that is the
                sum of two unit vectors.
            crop: cut the middle out, as the original does for classification, instead of resizing
                to a square, as it does for retrieval.

        Raises:
            BadImage: an image that cannot be read, by its place in the list.
            UserError: an unknown mode, a tensor of another size, or "g" of a model without queries.
        """
        found = self.encode_images_of(
            images, (mode,), normalize=normalize, batch_size=batch_size, crop=crop
        )
        return found[mode]

    @torch.no_grad()
    def encode_images_of(
        self,
        images: ImageInputs,
        modes: Sequence[Mode] | Mode,
        *,
        normalize: bool = True,
        batch_size: int = 64,
        crop: bool = False,
    ) -> dict[Mode, Tensor]:
        """`encode_images` in several modes; every image is read and looked at once."""
        modes = cast("list[Mode]", list_texts(modes, "mode"))
        for mode in modes:
            if mode not in ("c", "g"):
                raise UserError(f'mode is "c" (InternVL-C) or "g" (InternVL-G), not {mode!r}')
        if "g" in modes:
            self._need_queries('mode "g"')
        found: dict[Mode, list[Tensor]] = {mode: [] for mode in modes}
        for pixels in self._pixels(images, batch_size, crop):
            encoded = self.model.encode_image(pixels, modes)
            for mode, features in zip(modes, encoded, strict=True):
                found[mode].append(features.cpu())
        return {mode: self._finished(features, normalize) for mode, features in found.items()}

    @torch.no_grad()
    def encode_texts(
        self,
        texts: Sequence[str] | str | None = None,
        *,
        input_ids: Tensor | None = None,
        normalize: bool = True,
        batch_size: int = 256,
    ) -> Tensor:
        """Features of captions, float32 (R, E) on the CPU, of unit length.

        Args:
            texts: one, or several; "summarize:" is put before each.
            input_ids: ids as they are instead, int64 (R, L); padding is 0, on the right.
            normalize: False returns what the original's `encode_text` does.

        Raises:
            UserError: what is no text, or ids of another shape.
            ModelFolderError: strings without a tokenizer.
        """
        check_whole("batch_size", batch_size, 1)
        if (texts is None) == (input_ids is None):
            raise UserError("encode_texts takes either texts or input_ids")
        if texts is None:
            rows = _rows(input_ids)
        else:
            rows = [self.encoder.embedding(text) for text in list_texts(texts)]
        found = _in_batches(rows, batch_size, lambda ids: self.model.encode_text(self._to(ids)))
        return self._finished(found, normalize)

    def similarity(
        self, images: ImageInputs, texts: Captions, mode: Mode = "c", *, batch_size: int = 64
    ) -> Tensor:
        """exp(logit_scale) times the cosines of images and captions, float32 (B, R).

        Args:
            images: as `encode_images` takes them, or its features (B, E).
            texts: as `encode_texts` takes them, or its features (R, E).
        """
        if not (isinstance(images, Tensor) and images.dim() <= 2):
            images = self.encode_images(images, mode, batch_size=batch_size)
        if not isinstance(texts, Tensor):
            texts = self.encode_texts(texts)
        elif not texts.is_floating_point():
            texts = self.encode_texts(input_ids=texts)
        images, texts = self._features(images, "images"), self._features(texts, "texts")
        cosines = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        return self.model.logit_scale.detach().float().exp().to(cosines.device) * cosines

    @torch.no_grad()
    def match(self, images: ImageInputs, texts: Captions, *, batch_size: int = 32) -> Tensor:
        """Probability that image b and caption b belong together, float32 (B,) on the CPU.

        Captions are cleaned as in training and stand alone, without "summarize:". Of pairs with
        the same path that follow each other, the image is looked at once in a batch.

        Raises:
            UserError: other numbers of images and captions, or a model without queries.
        """
        self._need_queries("match")
        check_whole("batch_size", batch_size, 1)
        images = self._listed(images)
        if isinstance(texts, Tensor):
            rows = _rows(texts)
        else:
            rows = [self.encoder.matching(clean_caption(text)) for text in list_texts(texts)]
        if len(images) != len(rows):
            raise UserError(f"match takes pairs, not {len(images)} images and {len(rows)} texts")
        found = []
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            some, places = _distinct(images[part])
            pixels = torch.cat([*self._pixels(some, batch_size, crop=False)])
            seen = self.model.encode_kv(self.model.vision_tokens(pixels)[self._to(places)])
            ids = self._to(pad_right(rows[part]))
            mask = self.model.joint_mask("itm", ids > 0)
            states, _ = self.model.joint_states(seen, ids, mask)
            found.append(self.model.itm_logits(states).float().softmax(-1)[:, 1].cpu())
        return torch.cat(found) if found else torch.empty(0)

    def caption(
        self,
        images: ImageInputs,
        prompt: str = caption_prompt,
        *,
        num_beams: int = caption_beams,
        max_new_tokens: int = 30,
        min_new_tokens: int = 8,
        length_penalty: float = 1.0,
        batch_size: int = 16,
    ) -> list[str]:
        """A caption of each image, by greedy (one beam) or beam search.

        Raises:
            UserError: a model without queries, or a setting out of range.
            ModelFolderError: no tokenizer.
        """
        self._need_queries("caption")
        reason = not_a_text(prompt)
        if reason is not None:
            raise UserError(f"prompt {reason}")
        check_whole("num_beams", num_beams, 1)
        check_whole("max_new_tokens", max_new_tokens, 1)
        check_whole("min_new_tokens", min_new_tokens, 0)
        check_number("length_penalty", length_penalty)
        how = BeamSearchConfig(
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            end_id=self.model.config.text_config.eos_token_id,
            length_penalty=length_penalty,
        )
        encoder = self.encoder
        prompt_ids = torch.tensor(encoder.prompt(prompt))
        captions: list[str] = []
        for pixels in self._pixels(images, batch_size, crop=False):
            for ids in self.model.caption(pixels, prompt_ids, how).tolist():
                captions.append(decode(encoder.tokenizer, ids, skip_special_tokens=True).strip())
        return captions

    def as_chat(self, purpose: str) -> "Chat":
        """See `Handle.as_chat`."""
        raise UserError(
            f"{purpose} needs a chat model; InternVL-14B writes captions but does not converse: "
            "use `internvl evaluate MODEL caption-file`, or `load(...).caption(images)` in Python"
        )

    def as_dual(self, purpose: str) -> "Dual":
        """See `Handle.as_dual`."""
        return self

    def _pixels(self, images: ImageInputs, batch_size: int, crop: bool) -> Iterator[Tensor]:
        """Normalized images (at most batch_size, 3, S, S) on the model's device."""
        check_whole("batch_size", batch_size, 1)
        images = self._listed(images)
        if isinstance(images, Tensor):
            yield from (self._to(part) for part in images.split(batch_size) if len(part))
            return
        for pixels in _read_ahead(images, batch_size, self.image_size, crop):
            yield normalize_tiles(self._to(pixels), self.dtype)

    def _listed(self, images: ImageInputs) -> list[ImageInput] | Tensor:
        """Images as a list, or as the normalized tensor (B, 3, S, S) that they are."""
        if not isinstance(images, Tensor) or (images.dtype == torch.uint8 and images.dim() < 4):
            return list_images(images)
        wanted = (3, self.image_size, self.image_size)
        batch = images[None] if images.dim() == 3 else images
        if batch.dim() != 4 or batch.shape[1:] != wanted or not images.is_floating_point():
            raise UserError(
                f"a tensor of images must be normalized and of shape (B, {wanted[0]}, "
                f"{wanted[1]}, {wanted[2]}), not {images.dtype} {tuple(images.shape)}"
            )
        return batch

    def _features(self, features: Tensor, nouns: str) -> Tensor:
        """Features as rows, (B, E)."""
        rows, width = torch.atleast_2d(features), self.model.config.embed_dim
        if rows.shape[1] != width or not rows.is_floating_point():
            raise UserError(
                f"features of {nouns} must be float (B, {width}), not {features.dtype} "
                f"{tuple(features.shape)}"
            )
        return rows

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _finished(self, found: list[Tensor], normalize: bool) -> Tensor:
        features = torch.cat(found) if found else torch.empty(0, self.model.config.embed_dim)
        return F.normalize(features, dim=-1) if normalize else features

    def _need_queries(self, what: str) -> None:
        if not self.model.num_queries:
            raise UserError(
                f"{self.folder}: {what} needs QLLaMA's queries, and this file holds InternVL-C "
                "alone; load OpenGVLab/InternVL-14B-224px"
            )


def _distinct(images: list[ImageInput] | Tensor) -> tuple[list[ImageInput] | Tensor, Tensor]:
    """(each image once, int64 (B,) where each of `images` is there), where they are files."""
    if isinstance(images, Tensor) or not all(isinstance(i, str | Path | FileSlice) for i in images):
        return images, torch.arange(len(images))
    numbers = {image: number for number, image in enumerate(dict.fromkeys(images))}
    return list(numbers), torch.tensor([numbers[image] for image in images])


def _rows(input_ids: Tensor | None) -> list[list[int]]:
    """Rows of ids without their padding. Raises UserError for ids of another shape or type."""
    if not isinstance(input_ids, Tensor):
        raise UserError(f"input_ids must be a tensor, int64 (R, L), not {type(input_ids).__name__}")
    input_ids = torch.atleast_2d(input_ids)
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise UserError(
            f"input_ids must be int64 (R, L), not {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    lengths = ((input_ids > 0) * torch.arange(1, input_ids.shape[1] + 1)).amax(1).tolist()
    return [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]


def _in_batches(
    rows: Sequence[Sequence[int]], batch_size: int, encode: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`encode` of all rows, in order. Rows of similar length go together, so little is padded."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        encoded = encode(pad_right([rows[number] for number in chosen])).cpu()
        found |= zip(chosen, encoded.split(1), strict=True)
    return [found[number] for number in range(len(rows))]


def _read_ahead(
    images: Sequence[ImageInput], batch_size: int, size: int, crop: bool
) -> Iterator[Tensor]:
    """uint8 (at most batch_size, 3, S, S); threads read the next batch while one is worked on."""
    shape = center_square if crop else square

    def read(number: int) -> Tensor:
        opened = rgb_at(f"image {number}", images[number])
        opened = Image.fromarray(opened) if isinstance(opened, np.ndarray) else opened
        return shape(opened, size)

    waiting: deque[list[Future[Tensor]]] = deque()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for start in range(0, len(images), batch_size):
            numbers = range(start, min(start + batch_size, len(images)))
            waiting.append([threads.submit(read, number) for number in numbers])
            if len(waiting) == 2:
                yield _stacked(waiting.popleft())
        yield from map(_stacked, waiting)


def _stacked(tasks: Sequence[Future[Tensor]]) -> Tensor:
    return torch.stack([task.result() for task in tasks])
