"""Asks a chat model the questions of an evaluation: tiles, prompts, answers on disk."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvl import dist, zoo
from internvl.config import TilesConfig
from internvl.data.images import ImageRef, as_rgb
from internvl.data.tiles import tile_images
from internvl.errors import BadImage, BadSample, UnknownModel
from internvl.evals import sharing
from internvl.evals.answers import AnswerFiles
from internvl.evals.scores import fingerprint
from internvl.inference.chat import Chat
from internvl.inference.engine import one_engine
from internvl.inference.requests import Request, check_turns
from internvl.inference.settings import Settings
from internvl.models import configs
from internvl.parallel import lockstep

Answer = dict[str, str]
"""{"question": …, "answer": …}, or {"reason": …} for a question that cannot be asked."""


@dataclass(frozen=True)
class Tiling:
    """How the images of an evaluation are tiled."""

    most: int
    """Most tiles of an image, its thumbnail not counted; 1: one square tile."""
    source: str
    """What determined it, for the result."""

    def __str__(self) -> str:
        noun = "1 tile" if self.most == 1 else f"up to {self.most} tiles"
        return f"{noun} an image ({self.source})"


def tiling(
    chat: Chat, chosen: str | int | None, most: int, most_of: Mapping[str, int] | None = None
) -> Tiling:
    """Returns the tiling of an evaluation.

    Args:
        chosen: "one", "checkpoint" or a number; None: that of the published scores, one tile for a
            model that does not tile (InternVL-Chat 1.1 and 1.2), else `most`.
        most: most tiles of an image for models that tile.
        most_of: released model -> its number if that differs.
    """
    if chosen == "one":
        return Tiling(1, "--tiles one")
    if chosen == "checkpoint":
        return Tiling(chat.tiles.max, "--tiles checkpoint")
    if chosen is not None:
        return Tiling(int(chosen), f"--tiles {chosen}")
    if chat.tiles.max == 1:
        return Tiling(1, "the model does not tile")
    name = _released_name(chat)
    if most_of and name in most_of:
        return Tiling(most_of[name], f"published scores of {name}")
    return Tiling(most, "published scores")


def _released_name(chat: Chat) -> str:
    try:
        return zoo.find(chat.folder.name).name
    except UnknownModel:
        return ""


@dataclass(frozen=True)
class Shown:
    """Images of a question as the model gets them."""

    blocks: tuple[Tensor, ...]
    """For every mark its tiles, uint8 (N, 3, S, S)."""
    num_images: int

    @property
    def num_tiles(self) -> int:
        """Tiles of all images."""
        return sum(map(len, self.blocks))


def cut_tiles(
    chat: Chat,
    images: Sequence[Any],
    most: Sequence[int],
    *,
    merge: bool = False,
    double_first: bool = False,
) -> Shown:
    """Decodes images and cuts each into at most its own number of tiles.

    Args:
        merge: make one block of all tiles.
        double_first: double the first image's size before it is tiled.

    Raises:
        BadImage: one cannot be decoded.
    """
    settings = configs.chat_settings(chat.model.config)
    blocks = []
    for index, (image, limit) in enumerate(zip(images, most, strict=True)):
        rgb = as_rgb(image, settings["exif"])
        if double_first and index == 0:
            rgb = _doubled(rgb)
        config = replace(chat.tiles, min=1, max=limit)
        cut = tile_images([rgb], config, limit, mean=_mean(settings, config))
        assert cut is not None
        blocks.append(cut.pixels)
    if merge and blocks:
        blocks = [torch.cat(blocks)]
    return Shown(tuple(blocks), len(images))


def _doubled(rgb: Any) -> Image.Image:
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(np.asarray(rgb))
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR)


def _mean(settings: Mapping[str, Any], config: TilesConfig) -> Any:
    # Here, as only padding needs it.
    from internvl.data.images import STATISTICS

    return STATISTICS[settings["normalize"]][0]


@dataclass(frozen=True)
class Question:
    """A question as it is given to the model."""

    text: str
    """As it is asked, without the mark that a lone image gets before it."""
    request: Request
    seed: int | None = None
    """Of its own draws, where answers are sampled."""


def key_of(*values: Any) -> str:
    """Returns a hash of values, for the name of a file with answers."""
    return blake2b(repr(values).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def key_of_images(images: Iterable[ImageRef]) -> str:
    """Returns a hash of images and videos: names, sizes and times of files, else their bytes."""
    return key_of([_identity(image) for image in dict.fromkeys(images)])


def _identity(image: ImageRef) -> tuple[Any, ...]:
    # Cells of tables: a changed image there changes no name.
    if isinstance(image, bytes) or (isinstance(image, str) and image.startswith("data:")):
        content = image if isinstance(image, bytes) else image.encode()
        return (blake2b(content, digest_size=16).hexdigest(),)
    return (str(image), *fingerprint(image))


def ask(
    chat: Chat,
    count: int,
    prepare: Callable[[int], Question],
    settings: Settings,
    *,
    batch_size: int,
    fills_device: bool = False,
    cache: Path | None,
    unit: str = "questions",
) -> list[Answer]:
    """Answers questions on all ranks together, in batches that do not depend on their number.

    Args:
        count: number of questions.
        prepare: makes a question, its images decoded, from its index; runs ahead in a thread.
        fills_device: of a batch as many requests are in flight as the device holds; else all.
        cache: folder of the answers so far, whose name tells questions, images and settings apart;
            None keeps none.
        unit: what is counted for the progress.

    Returns:
        On rank 0, an answer for every question, or the reason why it cannot be asked.
    """
    batches = [range(n, min(n + batch_size, count)) for n in range(0, count, batch_size)]
    files = None if cache is None else AnswerFiles(cache)
    done: dict[int, list[Answer]] = {}
    if files is not None and dist.is_main():
        rows = files.read()
        for n, batch in enumerate(batches):
            # Half a batch is computed again, as the whole that it is part of.
            if all(index in rows for index in batch):
                done[n] = [rows[index] for index in batch]
    in_step = lockstep.in_step(chat.model)
    in_flight = None if fills_device else batch_size

    def read(batch: range) -> list[Question | str]:
        return [_try(chat, prepare, index) for index in batch]

    def answer(batch: list[Question | str]) -> list[Answer]:
        shown = [entry for entry in batch if isinstance(entry, Question)]
        seeds = [entry.seed for entry in shown if entry.seed is not None] or None
        # Ranks that run in step need a forward each, also for a batch that cannot be asked.
        requests = [entry.request for entry in shown] or ([_nothing(chat)] if in_step else [])
        answers = (
            chat.answer(requests, batch_size=in_flight, seeds=seeds, **vars(settings))
            if requests
            else []
        )
        texts = iter(answers)
        return [
            {"question": entry.text, "answer": next(texts)}
            if isinstance(entry, Question)
            else {"reason": entry}
            for entry in batch
        ]

    def keep(index: int, rows: list[Answer]) -> None:
        if files is not None:
            files.append(dict(zip(batches[index], rows, strict=True)))

    work = sharing.Work(unit, read, answer, keep, in_step)
    with one_engine(chat.model, count):
        results = work.run(batches, sizes=[*map(len, batches)], done=done)
    return [row for batch_rows in results for row in batch_rows]


def _try(chat: Chat, prepare: Callable[[int], Question], index: int) -> Question | str:
    """Returns a question, or the reason why it cannot be asked."""
    try:
        question = prepare(index)
        # Here, for a question that cannot be encoded would cost its whole batch.
        check_turns(question.request, chat.encoder, f"question {index + 1}")
        return question
    except (BadImage, BadSample) as error:
        return str(error)


def _nothing(chat: Chat) -> Request:
    """Returns a request about a black tile."""
    tile = torch.zeros(1, 3, chat.tiles.size, chat.tiles.size, dtype=torch.uint8)
    return Request("<image>\nNothing.", [tile])
