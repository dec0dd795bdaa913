"""Captions of annotation files as training pairs: one for every caption, as the original's
`FlickrDataset` and `COCODataset` (`internvl_g/internvl/train/dataset.py`)."""

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
"""What stands before a caption that is generated, where its source has no `prompt`."""

_DRAWS, _MULTIPLE = 100, 8


class PairReader(Dataset[Read]):
    """Reads and encodes pairs by reference; what loader workers run.

    What is random in a pair (its crop, the caption of another image) depends on seed, epoch and
    sample alone.
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
            written: whether pairs also hold their caption after a prompt.
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
        for number, (line, sample) in enumerate(zip(ref.lines, samples, strict=True)):
            one = replace(ref, lines=(line,), row=ref.row + number)
            try:
                read.units.append(self._pair(sample, one))
            except BadSample as bad:
                read.bad.append(bad)
        return read

    def _pair(self, sample: Sample | BadSample, ref: UnitRef) -> Pair:
        draw = np.random.default_rng((self.seed, ref.epoch, ref.file, ref.row))
        image, caption = image_and_caption(sample)
        name = sample.name
        try:
            pixels = random_square(open_rgb(image), self.size, draw)
        except BadImage as error:
            raise BadSample(name, str(error)) from None
        image_id = image_id_of(image)
        negative = self._other_caption(name, ref, image_id, draw)
        written, num_given = self._written(ref, caption) if self.written else ((), 0)
        return Pair(
            name=name,
            pixels=pixels,
            image_id=image_id,
            summary=tuple(self.encoder.embedding(caption)),
            positive=tuple(self.encoder.matching(caption)),
            negative=tuple(self.encoder.matching(negative)),
            written=written,
            num_given=num_given,
        )

    def _other_caption(
        self, name: str, ref: UnitRef, image_id: int, draw: np.random.Generator
    ) -> str:
        """A caption of another image, uniform over all captions that can be read."""
        groups = self.files[ref.file].groups
        cause: BadSample | None = None
        for _ in range(_DRAWS):
            number = int(draw.integers(self._ends[-1]))
            file = int(np.searchsorted(self._ends, number, side="right"))
            line = number - int(self._ends[file - 1] if file else 0)
            if file == ref.file and groups[line] == groups[ref.lines[0]]:
                continue
            try:
                image, caption = image_and_caption(*self.files[file].samples([line]))
            except BadSample as bad:  # named when its own turn comes
                cause = cause or bad
                continue
            if image_id_of(image) != image_id:
                return caption
        if cause is not None:
            raise BadSample(name, f"no good caption of another image is left; first mend {cause}")
        raise BadSample(name, f"{_DRAWS} draws found no caption of another image; add other images")

    def _written(self, ref: UnitRef, caption: str) -> tuple[tuple[int, ...], int]:
        """Ids of prompt and caption, at most MAX_TOKENS, and how many are given.

        As in the original the prompt's last token is supervised too.
        """
        prompt = self.encoder.prompt(self.files[ref.file].config.prompt or PROMPT)
        text = self.encoder.matching(caption)
        room = MAX_TOKENS - len(prompt) - 1
        return (*prompt, *text[1:-1][:room], text[-1]), len(prompt) - 1


def image_and_caption(sample: Sample | BadSample) -> tuple[ImageRef, str]:
    """The image of a sample and its caption, cleaned.

    Raises:
        BadSample: what was read is bad already, has not exactly one image, or no caption.
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
    """The same number wherever an image is named the same, 64 bits, signed."""
    where = image if isinstance(image, bytes) else _address(image).encode()
    return int.from_bytes(blake2b(where, digest_size=8).digest(), "little", signed=True)


def _address(image: ImageRef) -> str:
    if isinstance(image, FileSlice):
        return f"{image.path}:{image.offset}"
    return str(image)


def make_batch(
    pairs: Sequence[Pair], matches: Sequence[tuple[Match, ...]], compared: Sequence[bool]
) -> PairBatch:
    """Pairs as one batch.

    Args:
        matches: captions that each image is shown with, as many for each.
        compared: whether a pair's caption is embedded and compared.
    """
    text_ids, text_mask = _padded([pair.summary for pair in pairs])
    # All images with their first caption, then all with their second.
    shown = [match for column in zip(*matches, strict=True) for match in column]
    match_ids, match_mask = _padded([ids for ids, _ in shown])
    written_ids, written_mask = _padded([pair.written for pair in pairs])
    # Token t of a text is predicted at t - 1.
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
    """What texts of `tokens` are padded to."""
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """int64 ids and bool mask (R, T), T a multiple of 8, so that few lengths occur."""
    ids = pad_right(rows, padded_length(max(map(len, rows))))
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
