"""InternVL-14B in use: embeds images and captions, scores pairs, captions images.

Original: `encode_image`, `encode_text` and `forward` of `clip_benchmark/.../internvl_huggingface`,
and `internvl_g/eval/evaluate_caption.py`. An image or caption gets the same output in every batch.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, cast

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
from internvl.data.images import Exif, FileSlice, rgb_at
from internvl.data.pairs import (
    CaptionEncoder,
    center_square,
    clean_caption,
    pad_right,
    square,
)
from internvl.data.tokenizers import decode
from internvl.errors import ModelFolderError, UserError
from internvl.inference import engine
from internvl.inference.handle import describe_weights
from internvl.inference.requests import Prompt
from internvl.inference.settings import Settings
from internvl.models.dual.model import DualModel, Mode
from internvl.models.vision import normalize_tiles
from internvl.parallel import lockstep

ImageInput = str | Path | bytes | BinaryIO | FileSlice | Image.Image | np.ndarray
ImageInputs = Sequence[ImageInput] | ImageInput | Tensor
"""Paths, `data:` addresses, encoded files, file objects, Pillow images and uint8 arrays (H, W, 3);
or one normalized tensor (B, 3, S, S). A single image is a batch of one."""
Captions = Sequence[str] | str | Tensor
"""Strings, or token ids padded with 0, int64 (R, L). A single caption is a batch of one."""

if TYPE_CHECKING:
    from internvl.inference.chat import Chat


@dataclass(frozen=True)
class Dual:
    """InternVL-14B with its tokenizer. InternVL-C alone has no queries: `match`, `caption` and
    mode "g" then raise UserError."""

    model: DualModel
    tokenizer: PreTrainedTokenizerFast | None
    """None if the folder has no tokenizer files."""
    folder: Path
    """Folder of the weights."""

    family = "dual"
    # Prompt and beams of the original's evaluate_caption.py, so that published scores compare.
    caption_prompt = "English caption:"
    caption_beams = 5
    # As the original, which shows photographs as they are stored.
    exif: ClassVar[Exif] = "ignore"

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def image_size(self) -> int:
        """Side (S) of the square image, px."""
        return self.model.config.image_size

    def num_tiles(self, image: str) -> int:
        """See `Handle.num_tiles`."""
        return 1

    @property
    def encoder(self) -> CaptionEncoder:
        """Encodes captions to token ids. Raises ModelFolderError without a tokenizer."""
        # Here and not in `load`: images need no tokenizer.
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
        """Embeds images: float32 (B, E) on the CPU, of unit length.

        Args:
            images: one or several: paths, bytes, Pillow images or uint8 arrays (H, W, 3), or a
                normalized tensor (B, 3, S, S).
            mode: "c" for InternVL-C, "g" for InternVL-G (both embed texts alike).
            normalize: False returns the output of the original's `encode_image`; for "g" that is
                the sum of two unit vectors.
            crop: crop the center, as the original does for classification, instead of resizing to
                a square, as it does for retrieval.

        Raises:
            BadImage: an image cannot be read; it is named by its index.
            UserError: an unknown mode, a tensor of another size, or "g" of a model without queries.
        """
        features = self.encode_images_of(
            images, (mode,), normalize=normalize, batch_size=batch_size, crop=crop
        )
        return features[mode]

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
        """Embeds images in several modes, as `encode_images`; runs the vision tower once."""
        modes = cast("list[Mode]", list_texts(modes, "mode"))
        for mode in modes:
            if mode not in ("c", "g"):
                raise UserError(f'mode is "c" (InternVL-C) or "g" (InternVL-G), not {mode!r}')
        if "g" in modes:
            self._need_queries('mode "g"')
        batches: dict[Mode, list[Tensor]] = {mode: [] for mode in modes}
        for pixels in self._pixels(images, batch_size, crop):
            encoded = self.model.encode_image(pixels, modes)
            for mode, features in zip(modes, encoded, strict=True):
                # Batch by batch: the features of a whole data set would fill GPU memory.
                batches[mode].append(features.cpu())
        return {mode: self._concatenate(features, normalize) for mode, features in batches.items()}

    @torch.no_grad()
    def encode_texts(
        self,
        texts: Sequence[str] | str | None = None,
        *,
        input_ids: Tensor | None = None,
        normalize: bool = True,
        batch_size: int = 256,
    ) -> Tensor:
        """Embeds captions: float32 (R, E) on the CPU, of unit length.

        Args:
            texts: one or several; "summarize:" is prepended to each.
            input_ids: token ids instead of texts, int64 (R, L), padded with 0 on the right.
            normalize: False returns the output of the original's `encode_text`.

        Raises:
            UserError: not a text, or ids of another shape.
            ModelFolderError: strings without a tokenizer.
        """
        check_whole("batch_size", batch_size, 1)
        if (texts is None) == (input_ids is None):
            raise UserError("encode_texts takes either texts or input_ids")
        if texts is None:
            rows = _rows(input_ids)
        else:
            rows = [self.encoder.embedding(text) for text in list_texts(texts)]
        features = _map_batches(
            rows, batch_size, lambda ids: self.model.encode_text(self._to_device(ids))
        )
        return self._concatenate(features, normalize)

    def similarity(
        self, images: ImageInputs, texts: Captions, mode: Mode = "c", *, batch_size: int = 64
    ) -> Tensor:
        """Returns exp(logit_scale) times the cosines of images and captions, float32 (B, R).

        Args:
            images: as in `encode_images`, or their features (B, E).
            texts: as in `encode_texts`, or their features (R, E).
        """
        # At most two dimensions are features; image tensors have three or four.
        if not (isinstance(images, Tensor) and images.dim() <= 2):
            images = self.encode_images(images, mode, batch_size=batch_size)
        if not isinstance(texts, Tensor):
            texts = self.encode_texts(texts)
        elif not texts.is_floating_point():
            texts = self.encode_texts(input_ids=texts)
        images, texts = self._features(images, "images"), self._features(texts, "texts")
        # Normalized again, since given features may come from `normalize=False`.
        cosines = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        return self.model.logit_scale.detach().float().exp().to(cosines.device) * cosines

    @torch.no_grad()
    def match(self, images: ImageInputs, texts: Captions, *, batch_size: int = 32) -> Tensor:
        """Returns the probability that image b and caption b match, float32 (B,) on the CPU.

        Captions are cleaned as in training and encoded without "summarize:". Paths that repeat
        within a batch are read and encoded once.

        Raises:
            UserError: unequal numbers of images and captions, or a model without queries.
        """
        self._need_queries("match")
        check_whole("batch_size", batch_size, 1)
        images = self._as_batch(images)
        if isinstance(texts, Tensor):
            rows = _rows(texts)
        else:
            rows = [self.encoder.matching(clean_caption(text)) for text in list_texts(texts)]
        if len(images) != len(rows):
            raise UserError(f"match takes pairs, not {len(images)} images and {len(rows)} texts")
        probabilities = []
        # In the given order, not by length: pairs of one image often follow each other.
        for start in range(0, len(rows), batch_size):
            batch = slice(start, start + batch_size)
            distinct, indices = _deduplicate(images[batch])
            pixels = torch.cat([*self._pixels(distinct, batch_size, crop=False)])
            # The tower runs once per distinct image, and its output is repeated for the pairs.
            vision = self.model.vision_tokens(pixels)[self._to_device(indices)]
            cross_kv = self.model.encode_kv(vision)
            ids = self._to_device(pad_right(rows[batch]))
            mask = self.model.joint_mask("itm", ids > 0)
            states, _ = self.model.joint_states(cross_kv, ids, mask)
            # Of the logits (no match, match); softmax in float32 as 16 bits would round it.
            probabilities.append(self.model.itm_logits(states).float().softmax(-1)[:, 1].cpu())
        return torch.cat(probabilities) if probabilities else torch.empty(0)

    def caption(
        self,
        images: ImageInputs,
        prompt: str = caption_prompt,
        *,
        num_beams: int = caption_beams,
        max_new_tokens: int = 30,
        min_new_tokens: int = 8,
        length_penalty: float = 1.0,
        batch_size: int | None = None,
    ) -> list[str]:
        """Generates a caption per image, in order, by greedy (one beam) or beam search.

        Args:
            batch_size: images at a time; by default as many as the GPU's memory holds, up to 128,
                or 16 on a CPU.

        Raises:
            BadImage: an image cannot be read; it is named by its index.
            UserError: a model without queries, or a setting out of range.
            ModelFolderError: no tokenizer.
        """
        self._need_queries("caption")
        reason = not_a_text(prompt)
        if reason is not None:
            raise UserError(f"prompt {reason}")
        check_whole("max_new_tokens", max_new_tokens, 1)
        check_whole("min_new_tokens", min_new_tokens, 0)
        check_number("length_penalty", length_penalty)
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        settings = Settings(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(min_new_tokens, max_new_tokens),
            num_beams=num_beams,
            extra={} if length_penalty == 1 else {"length_penalty": length_penalty},
        )
        shown = self._as_batch(images)
        # Placeholders of the queries first, see `engine.queries`.
        ids = np.array([0] * self.model.num_queries + self.encoder.prompt(prompt))
        texts: dict[int, str] = {}
        for job in self._caption_jobs(shown, ids, settings, batch_size):
            # The end token is special.
            text = decode(self.encoder.tokenizer, job.generated, skip_special_tokens=True)
            texts[job.key] = text.strip()
        return [texts[index] for index in range(len(shown))]

    def _caption_jobs(
        self,
        images: list[ImageInput] | Tensor,
        ids: np.ndarray,
        settings: Settings,
        slots: int | None,
    ) -> Iterator[engine.Job]:
        """Yields the jobs of captions as they end; the key is the image's index."""
        model, count = self.model, len(images)
        options: dict[str, Any] = {"num_beams": settings.num_beams}
        if lockstep.in_step(model):
            # One pass for all: other ranks, which may have fewer, run as many.
            slots = count
            options |= {"in_step": True, "row_tokens": 10**9, "tiles_at_once": count}

        def make(compiled: bool) -> engine.Scheduler:
            return engine.captions(model, slots, compiled=compiled, **options)

        def read(index: int) -> Prompt:
            if isinstance(images, Tensor):
                return Prompt(ids, images[index : index + 1])
            return Prompt(ids, _read_square(images, index, self.image_size)[None])

        def job(index: int, prompt: Prompt) -> engine.Job:
            return engine.Job(index, prompt, settings)

        # A tensor may be on a GPU, which a forked process cannot use.
        files = all(isinstance(image, str | Path | bytes | FileSlice) for image in images)
        form = (slots, settings.num_beams)
        return engine.ended_jobs(model, make, form, read, job, range(count), files=files)

    def as_chat(self, purpose: str) -> "Chat":
        """See `Handle.as_chat`."""
        raise UserError(
            f"{purpose} needs a chat model; InternVL-14B writes captions but does not converse: "
            "use `internvl evaluate MODEL caption-file`, or `load(...).caption(images)` in Python"
        )

    def as_dual(self, purpose: str) -> "Dual":
        """See `Handle.as_dual`."""
        return self

    # The dataclass's own would print every module of the model.
    def __repr__(self) -> str:
        queries = "InternVL-C and InternVL-G" if self.model.num_queries else "InternVL-C alone"
        return (
            f"<Dual: {self.folder}\n"
            f"  {describe_weights(self.model)}\n"
            f"  {queries}; an image is {self.image_size} px square\n"
            "  encode_images(images), encode_texts(texts), similarity(images, texts),\n"
            "  match(images, texts), caption(images)>"
        )

    def _pixels(self, images: ImageInputs, batch_size: int, crop: bool) -> Iterator[Tensor]:
        """Yields normalized images (up to batch_size, 3, S, S) on the model's device."""
        check_whole("batch_size", batch_size, 1)
        images = self._as_batch(images)
        if isinstance(images, Tensor):
            # `split` of an empty tensor gives one empty batch, which the tower cannot take.
            yield from (self._to_device(batch) for batch in images.split(batch_size) if len(batch))
            return
        for pixels in _prefetch_pixels(images, batch_size, self.image_size, crop):
            # Moved as uint8, a quarter of the bytes of float32, and normalized on the device.
            yield normalize_tiles(self._to_device(pixels), self.dtype)

    def _as_batch(self, images: ImageInputs) -> list[ImageInput] | Tensor:
        """Returns a list of images, or a normalized tensor (B, 3, S, S)."""
        # A uint8 tensor of up to three dimensions is one image like an array.
        if not isinstance(images, Tensor) or (images.dtype == torch.uint8 and images.dim() < 4):
            return list_images(images)
        shape = (3, self.image_size, self.image_size)
        batch = images[None] if images.dim() == 3 else images
        if batch.dim() != 4 or batch.shape[1:] != shape or not images.is_floating_point():
            raise UserError(
                f"a tensor of images must be normalized and of shape (B, {shape[0]}, "
                f"{shape[1]}, {shape[2]}), not {images.dtype} {tuple(images.shape)}"
            )
        return batch

    def _features(self, features: Tensor, nouns: str) -> Tensor:
        """Checks features; returns them as rows, (B, E)."""
        rows, width = torch.atleast_2d(features), self.model.config.embed_dim
        if rows.shape[1] != width or not rows.is_floating_point():
            raise UserError(
                f"features of {nouns} must be float (B, {width}), not {features.dtype} "
                f"{tuple(features.shape)}"
            )
        return rows

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _concatenate(self, batches: list[Tensor], normalize: bool) -> Tensor:
        # `torch.cat` refuses an empty list; no images are (0, E).
        features = torch.cat(batches) if batches else torch.empty(0, self.model.config.embed_dim)
        return F.normalize(features, dim=-1) if normalize else features

    def _need_queries(self, purpose: str) -> None:
        if not self.model.num_queries:
            raise UserError(
                f"{self.folder}: {purpose} needs QLLaMA's queries, and this file holds InternVL-C "
                "alone; load OpenGVLab/InternVL-14B-224px"
            )


def _deduplicate(images: list[ImageInput] | Tensor) -> tuple[list[ImageInput] | Tensor, Tensor]:
    """Returns (distinct images, int64 (B,) index of each image among them); compares paths only."""
    # Files only: arrays have no hash, and comparing pixels would read all of them.
    if isinstance(images, Tensor) or not all(isinstance(i, str | Path | FileSlice) for i in images):
        return images, torch.arange(len(images))
    indices = {image: index for index, image in enumerate(dict.fromkeys(images))}
    return list(indices), torch.tensor([indices[image] for image in images])


def _rows(input_ids: Tensor | None) -> list[list[int]]:
    """Splits ids (R, L) into rows without padding. Raises UserError for another shape or dtype."""
    if not isinstance(input_ids, Tensor):
        raise UserError(f"input_ids must be a tensor, int64 (R, L), not {type(input_ids).__name__}")
    input_ids = torch.atleast_2d(input_ids)
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise UserError(
            f"input_ids must be int64 (R, L), not {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    # Up to the last id above 0, not their count: an id of 0 inside a caption is kept.
    lengths = ((input_ids > 0) * torch.arange(1, input_ids.shape[1] + 1)).amax(1).tolist()
    return [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]


def _map_batches(
    rows: Sequence[Sequence[int]], batch_size: int, encode: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Applies `encode` to padded batches of rows; returns its output (1, E) per row, in order."""
    # By length, so that rows of one batch need little padding.
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    outputs: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        encoded = encode(pad_right([rows[index] for index in indices])).cpu()
        outputs |= zip(indices, encoded.split(1), strict=True)
    return [outputs[index] for index in range(len(rows))]


def _prefetch_pixels(
    images: Sequence[ImageInput], batch_size: int, size: int, crop: bool
) -> Iterator[Tensor]:
    """Yields uint8 (up to batch_size, 3, S, S); threads decode the next batch meanwhile."""

    def read(index: int) -> Tensor:
        return _read_square(images, index, size, center_square if crop else square)

    # Threads are enough: Pillow and simplejpeg release the GIL while they decode.
    waiting: deque[list[Future[Tensor]]] = deque()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for start in range(0, len(images), batch_size):
            indices = range(start, min(start + batch_size, len(images)))
            waiting.append([threads.submit(read, index) for index in indices])
            # One batch ahead: decoded images of more batches would only take memory.
            if len(waiting) == 2:
                yield _stack(waiting.popleft())
        yield from map(_stack, waiting)


def _read_square(
    images: Sequence[ImageInput],
    index: int,
    size: int,
    shape: Callable[[Image.Image, int], Tensor] = square,
) -> Tensor:
    """Decodes an image, named by its index, to uint8 (3, S, S)."""
    image = rgb_at(f"image {index}", images[index])
    # Files decode to arrays, and the crops are Pillow's.
    return shape(Image.fromarray(image) if isinstance(image, np.ndarray) else image, size)


def _stack(tasks: Sequence[Future[Tensor]]) -> Tensor:
    return torch.stack([task.result() for task in tasks])
