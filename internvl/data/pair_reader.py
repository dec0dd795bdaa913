"""Encodes captions of annotation files as training pairs, one for every caption.

Originals: `FlickrDataset` and `COCODataset` of `internvl_g/internvl/train/dataset.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from internvl.data.images import FileSlice, ImageRef, open_rgb
from internvl.data.loader import Read
from internvl.data.pairs import (
    MAX_TOKENS,
    CaptionEncoder,
    clean_caption,
    pad_right,
    random_square,
)
from internvl.data.records import Match, Pair, PairBatch, Sample
from internvl.data.sampler import UnitRef
from internvl.data.sources import Source
from internvl.errors import BadImage, BadSample

PROMPT = "English caption:"
"""Default prompt of a caption that is generated; a source's `prompt` replaces it."""

_DRAWS = 100  # attempts to draw a caption of another image
_MULTIPLE = 8  # tokens that padded lengths are a multiple of


class PairReader(Dataset[Read]):
    """Reads and encodes pairs by reference, in loader workers.

    The random crop and the caption of another image depend on seed, epoch and sample only.
    """

    def __init__(
        self,
        files: Sequence[Source],
        encoder: CaptionEncoder,
        size: int,
        *,
        seed: int,
        written: bool = False,
    ) -> None:
        """
        Args:
            size: side (S) of an image, px.
            written: True adds the caption after a prompt, to be generated (ITG).
        """
        self.files = files
        self.encoder = encoder
        self.size = size
        self.seed = seed
        self.written = written
        self._ends = np.cumsum([len(file) for file in files])

    def __getitem__(self, ref: UnitRef) -> Read:
        read = Read()
        samples = self.files[ref.file].samples(ref.lines)
        for offset, (line, sample) in enumerate(zip(ref.lines, samples, strict=True)):
            sample_ref = replace(ref, lines=(line,), row=ref.row + offset)
            try:
                read.units.append(self._pair(sample, sample_ref))
            except BadSample as bad:
                read.bad.append(bad)
        return read

    def _pair(self, sample: Sample | BadSample, ref: UnitRef) -> Pair:
        # Seeded by the sample: a resumed run, or one with other workers, draws alike.
        draw = np.random.default_rng((self.seed, ref.epoch, ref.file, ref.row))
        image, caption = image_and_caption(sample)
        name = sample.name
        try:
            pixels = random_square(open_rgb(image), self.size, draw)
        except BadImage as error:
            raise BadSample(name, str(error)) from None
        image_id = image_id_of(image)
        negative = self._other_caption(name, ref, image_id, draw)
        written, num_prompt_tokens = self._written_ids(ref, caption) if self.written else ((), 0)
        return Pair(
            name=name,
            pixels=pixels,
            image_id=image_id,
            summary=tuple(self.encoder.embedding(caption)),
            positive=tuple(self.encoder.matching(caption)),
            negative=tuple(self.encoder.matching(negative)),
            written=written,
            num_given=num_prompt_tokens,
        )

    def _other_caption(
        self, name: str, ref: UnitRef, image_id: int, draw: np.random.Generator
    ) -> str:
        """Draws a caption of another image, uniformly over all readable captions.

        Raises:
            BadSample: no draw gave one.
        """
        groups = self.files[ref.file].groups
        cause: BadSample | None = None
        # Rejection, not a list of the others: that would be built anew for every sample.
        for _ in range(_DRAWS):
            index = int(draw.integers(self._ends[-1]))
            file = int(np.searchsorted(self._ends, index, side="right"))
            line = index - int(self._ends[file - 1] if file else 0)
            # Same image in this file, without reading its line.
            if file == ref.file and groups[line] == groups[ref.lines[0]]:
                continue
            try:
                image, caption = image_and_caption(*self.files[file].samples([line]))
            except BadSample as bad:  # reported when it is read as a sample itself
                cause = cause or bad
                continue
            # Another file may have the same image, where groups cannot be compared.
            if image_id_of(image) != image_id:
                return caption
        if cause is not None:
            raise BadSample(name, f"no good caption of another image is left; first mend {cause}")
        raise BadSample(name, f"{_DRAWS} draws found no caption of another image; add other images")

    def _written_ids(self, ref: UnitRef, caption: str) -> tuple[tuple[int, ...], int]:
        """Returns the ids of prompt and caption, at most MAX_TOKENS, and the number at the start
        that is not supervised."""
        prompt = self.encoder.prompt(self.files[ref.file].config.prompt or PROMPT)
        text = self.encoder.matching(caption)
        room = MAX_TOKENS - len(prompt) - 1
        # One less than the prompt: the original supervises the prompt's last token too.
        return (*prompt, *text[1:-1][:room], text[-1]), len(prompt) - 1


def image_and_caption(sample: Sample | BadSample) -> tuple[ImageRef, str]:
    """Returns the image of a sample and its cleaned caption.

    Raises:
        BadSample: the sample is one, or it has not exactly one image, or no caption.
    """
    if isinstance(sample, BadSample):
        raise sample
    if len(sample.images) != 1 or sample.videos:
        raise BadSample(sample.name, f"a pair has one image, not {len(sample.images)}")
    if not sample.messages:
        raise BadSample(sample.name, "it has no turn to take the caption from; write one")
    caption = clean_caption(sample.messages[-1].content)
    if not caption.strip():
        raise BadSample(sample.name, "nothing is left of the caption once it is cleaned")
    return sample.images[0], caption


def image_id_of(image: ImageRef) -> int:
    """Hashes an image's bytes or address to an id: 64 bits, signed."""
    # Not `hash`, which differs between processes; ranks compare these ids.
    content = image if isinstance(image, bytes) else _image_key(image).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True)


def _image_key(image: ImageRef) -> str:
    if isinstance(image, FileSlice):
        return f"{image.path}:{image.offset}"
    return str(image)


def make_batch(
    pairs: Sequence[Pair], matches: Sequence[tuple[Match, ...]], compared: Sequence[bool]
) -> PairBatch:
    """Collates pairs into one batch.

    Args:
        matches: the captions that each image is matched with, as many for every image.
        compared: whether a pair's caption takes part in the contrastive loss.
    """
    text_ids, text_mask = _padded([pair.summary for pair in pairs])
    # All images with their first caption, then all with their second.
    shown = [match for column in zip(*matches, strict=True) for match in column]
    match_ids, match_mask = _padded([ids for ids, _ in shown])
    written_ids, written_mask = _padded([pair.written for pair in pairs])
    # Positions in the flattened (pairs x tokens) logits; token t is predicted at t - 1.
    supervised = [
        (row * written_ids.shape[1] + t - 1, pair.written[t])
        for row, pair in enumerate(pairs)
        for t in range(pair.num_given, len(pair.written))
    ]
    return PairBatch(
        pixel_values=torch.stack([pair.pixels for pair in pairs]),
        image_ids=torch.tensor([pair.image_id for pair in pairs]),
        text_ids=text_ids,
        text_mask=text_mask,
        text_counts=torch.tensor(compared, dtype=torch.float32),
        match_ids=match_ids,
        match_mask=match_mask,
        match_labels=torch.tensor([label for _, label in shown]),
        written_ids=written_ids,
        written_mask=written_mask,
        loss_positions=torch.tensor([position for position, _ in supervised], dtype=torch.long),
        targets=torch.tensor([token for _, token in supervised], dtype=torch.long),
        names=tuple(pair.name for pair in pairs),
    )


def padded_length(tokens: int) -> int:
    """Rounds a number of tokens up to the padded length."""
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pads rows: int64 ids and bool mask, both (R, T)."""
    # T is a multiple of 8, so that few different lengths occur.
    ids = pad_right(rows, padded_length(max(map(len, rows))))
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
