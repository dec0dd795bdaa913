"""Reads annotation lines into the batches of each step, prefetched by worker processes."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from internvl.config import DataConfig
from internvl.data import transfer
from internvl.data.images import STATISTICS, read_rgb, size_of
from internvl.data.records import Batch, Sample, Tiles, Unit
from internvl.data.sampler import Ending, Order, Position, UnitRef, step_bounds
from internvl.data.sources import Source
from internvl.data.tiles import empty_tiles, tile_images
from internvl.data.video import read_frames, with_frames
from internvl.data.workers import Reading, describe_refs, name_failing
from internvl.errors import BadImage, BadSample

Encode = Callable[[Sequence[Sample], Tiles | None], list[Unit | BadSample]]
"""An objective's encoder: (samples of the same images, their tiles) -> units and bad samples."""


@dataclass
class Read:
    """Units and bad samples of one group of lines."""

    units: list[Any] = field(default_factory=list)
    """`Unit` or `Pair`, as the objective makes them."""
    bad: list[BadSample] = field(default_factory=list)


@dataclass
class Step:
    """The batches of one rank in a step."""

    index: int
    batches: Sequence[Batch]
    bad: list[BadSample]
    wait_s: float
    """Seconds for which the training loop waited for them."""
    num_seen: int
    """Samples of the run up to the end of this step, bad ones counted."""
    position: Position | None = None
    """Position after this step, if the step number alone does not tell it."""


class UnitReader(Dataset[Read]):
    """Reads and encodes units by reference; runs in loader workers.

    Without `pixels` every image is still decoded, but its tiles are empty: for counting only.
    What is random in a unit (frames, JPEG qualities) depends on seed, epoch and sample alone.
    """

    def __init__(
        self,
        files: Sequence[Source],
        config: DataConfig,
        encode: Encode,
        *,
        seed: int = 0,
        pixels: bool = True,
    ) -> None:
        self.files = files
        self.config = config
        self.encode = encode
        self.seed = seed
        self.pixels = pixels

    def __getitem__(self, ref: UnitRef) -> Read:
        read = Read()
        by_media: dict[Hashable, list[Sample]] = {}
        for sample in self.files[ref.file].samples(ref.lines):
            if isinstance(sample, BadSample):
                read.bad.append(sample)
            else:
                by_media.setdefault((sample.images, sample.videos), []).append(sample)
        # The index groups lines by a hash of their media; the media themselves decide.
        for samples in by_media.values():
            prepared, bad, tiles = self.prepare(samples, ref)
            read.bad += bad
            for unit in self.encode(prepared, tiles) if prepared else []:
                if isinstance(unit, BadSample):
                    read.bad.append(unit)
                else:
                    read.units.append(unit)
        return read

    def prepare(
        self, samples: Sequence[Sample], ref: UnitRef
    ) -> tuple[list[Sample], list[BadSample], Tiles | None]:
        """Reads the media of samples: (samples ready to encode, bad samples, tiles)."""
        try:
            images, counts = self.images(samples[0], ref)
        except BadImage as error:
            return [], [BadSample(sample.name, str(error)) for sample in samples], None
        ready, bad = [], []
        for sample in samples:
            try:
                frames = with_frames(sample, counts, self.config.video.label) if counts else sample
                ready.append(frames)
            except BadImage as error:
                bad.append(BadSample(sample.name, str(error)))
        source = self.files[ref.file].config
        # A frame is always one tile, as in the original.
        most = 1 if counts else source.max_tiles or self.config.tiling.max
        # Before pixels are made: a sample of too many tiles is then refused without their memory.
        empty = empty_tiles([size_of(image) for image in images], self.config.tiling, most)
        if empty is not None and len(empty.pixels) > self.config.max_tiles:
            return [], [*bad, *self._with_too_many_tiles(ready, empty)], None
        if not self.pixels:
            return ready, bad, empty
        try:
            tiles = tile_images(
                images,
                self.config.tiling,
                most,
                resize=self.config.resize,
                mean=STATISTICS[self.config.statistics][0],
                augment=self._draw(ref, "augment") if source.augment else None,
            )
        except BadImage as error:
            return [], [BadSample(sample.name, str(error)) for sample in samples], None
        return ready, bad, tiles

    def _with_too_many_tiles(self, samples: Sequence[Sample], tiles: Tiles) -> Iterator[BadSample]:
        """Yields samples of more tiles than a row takes as bad, with what would keep them."""
        num_tiles = len(tiles.pixels)
        reason = (
            f"{num_tiles} tiles, but a row takes {self.config.max_tiles}; raise data.max_tiles or "
            "lower data.tiles.max"
        )
        # In a row of more tiles it may be too long, or bad for a reason that no key removes.
        encoded = self.encode(samples, tiles) if samples else []
        others = {bad.name: bad.needs for bad in encoded if isinstance(bad, BadSample)}
        for sample in samples:
            needs = {"data.max_tiles": num_tiles, **others.get(sample.name, {})}
            is_kept = others.get(sample.name) != {}
            yield BadSample(sample.name, reason, needs if is_kept else None)

    def images(self, sample: Sample, ref: UnitRef) -> tuple[list[np.ndarray], list[int]]:
        """Decodes images, or frames with the count of each video; all RGB uint8 (H, W, 3).

        Raises BadImage.
        """
        if sample.videos:
            draw = self._draw(ref, "frames")
            frames = [
                read_frames(video, self.config.video, draw, self.config.orientation)
                for video in sample.videos
            ]
            counts = list(map(len, frames))
            return [np.asarray(frame) for video in frames for frame in video], counts
        return [read_rgb(source, self.config.orientation) for source in sample.images], []

    def _draw(self, ref: UnitRef, purpose: str) -> np.random.Generator:
        # A stream for each purpose: more frames must not change how the tiles are degraded. And by
        # sample, so that ranks, workers and a resume draw the same.
        stream = ("frames", "augment").index(purpose)
        return np.random.default_rng((self.seed, ref.epoch, ref.file, ref.row, stream))


TOGETHER, AHEAD = 8, 2
"""Units that a worker returns at once, and such groups that it prefetches."""


class _SharedReads:
    """Carries the reads of a group from a worker to the main process."""

    # All pixels in one tensor: each tensor that crosses alone costs the main process a file
    # descriptor, which takes longer than to unpickle the rest.

    def __init__(self, reads: Sequence[Read]) -> None:
        self.rest, tensors = transfer.dump(list(reads))
        # Written straight into shared memory: a tensor made before would be copied once more.
        self.pixels = torch.empty(transfer.num_bytes(tensors), dtype=torch.uint8).share_memory_()
        if tensors:
            torch.cat([tensor.flatten() for tensor in tensors], out=self.pixels)

    def reads(self) -> list[Read]:
        """Unpickles the reads; their tensors share one memory."""
        return transfer.load(self.rest, self.pixels)


class Groups(Dataset[Any]):
    """Reads several references at once."""

    def __init__(self, reader: Dataset[Read]) -> None:
        self.reader = reader

    def __getitem__(self, refs: Sequence[UnitRef]) -> list[Read] | _SharedReads:
        reads = [self.reader[ref] for ref in refs]
        # In this process nothing crosses, and shared memory would only be a copy.
        return reads if get_worker_info() is None else _SharedReads(reads)


def received(group: list[Read] | _SharedReads) -> list[Read]:
    """Returns what `Groups` made, in this process or in a worker."""
    return group.reads() if isinstance(group, _SharedReads) else group


def steps(
    order: Order,
    reader: Dataset[Read],
    pack: Callable[[Sequence[Any]], Sequence[Batch]],
    *,
    first: int,
    last: int,
    global_batch: int,
    total: int,
    endings: Sequence[Ending] = (),
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Step]:
    """Yields steps `first` … `last` - 1 of a run over `total` samples; ranks read units in turn.

    Args:
        endings: see `sampler.step_bounds`.
        pack: the units that this rank has read to its batches; may trade units with other ranks.
        workers: processes that prefetch; 0 reads in this one.

    Raises:
        WorkerDied: a worker was killed, or crashed.
    """

    def groups_of(index: int) -> list[list[UnitRef]]:
        # Before anything is read: a rank decodes only the images of its own units.
        refs = order.between(*step_bounds(index, global_batch, total, endings))[rank::world_size]
        return [refs[start : start + TOGETHER] for start in range(0, len(refs), TOGETHER)]

    # One stream over all steps, so that workers read the next step while this one trains.
    groups = iter(
        Reading(
            Groups(reader),
            (group for index in range(first, last) for group in groups_of(index)),
            name=partial(name_failing, reader, order.files),
            describe=partial(describe_refs, order.files),
            workers=workers,
            ahead=AHEAD,
        )
    )
    for index in range(first, last):
        waiting = time.perf_counter()
        units: list[Any] = []
        bad: list[BadSample] = []
        for _ in groups_of(index):
            for read in received(next(groups)):
                units += read.units
                bad += read.bad
        _, num_seen = step_bounds(index, global_batch, total, endings)
        yield Step(index, pack(units), bad, time.perf_counter() - waiting, num_seen)
