"""Annotation lines to the packed rows of each step, read ahead by worker processes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader, Dataset

from internvl.config import DataConfig
from internvl.data.images import BadImage, open_rgb
from internvl.data.records import BadSample, PackedBatch, Sample, Tiles, Unit
from internvl.data.sources import ChatFile, SampleOrder, UnitRef
from internvl.data.tiles import empty_tiles, tile_images

Encode = Callable[[Sequence[Sample], Tiles | None], list[Unit | BadSample]]
"""An objective's part: samples of the same images, and their tiles, to units."""


@dataclass
class Read:
    """What one group of lines became: units, and the samples that are bad."""

    units: list[Unit] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)


@dataclass
class Step:
    """The rows one rank works through in an optimizer step, and how long they were waited for."""

    index: int
    batches: list[PackedBatch]
    bad: list[BadSample]
    wait_s: float


class UnitReader(Dataset[Read]):
    """Reads and encodes units by reference; what loader workers run.

    Without `pixels` every image is still decoded, but its tiles are empty: for counting only.
    """

    def __init__(
        self,
        files: Sequence[ChatFile],
        config: DataConfig,
        encode: Encode,
        *,
        pixels: bool = True,
    ) -> None:
        self.files = files
        self.config = config
        self.encode = encode
        self.pixels = pixels

    def __getitem__(self, ref: UnitRef) -> Read:
        read = Read()
        by_images: dict[tuple[str, ...], list[Sample]] = {}
        for sample in self.files[ref.file].samples(ref.lines):
            if isinstance(sample, BadSample):
                read.bad.append(sample)
            else:
                by_images.setdefault(sample.images, []).append(sample)
        for samples in by_images.values():
            try:
                tiles = self.tiles(samples[0], ref.file)
            except BadImage as error:
                read.bad += [BadSample(sample.name, str(error)) for sample in samples]
                continue
            for unit in self.encode(samples, tiles):
                (read.bad if isinstance(unit, BadSample) else read.units).append(unit)  # type: ignore[arg-type]
        return read

    def tiles(self, sample: Sample, file: int) -> Tiles | None:
        """The tiles of a sample's images. Raises BadImage naming the file."""
        images = []
        for path in sample.images:
            try:
                images.append(open_rgb(path))
            except BadImage as error:
                raise BadImage(
                    f"{path}: {error}" if path not in str(error) else str(error)
                ) from None
        most = self.files[file].config.max_tiles or self.config.tiles.max
        if not self.pixels:
            return empty_tiles([image.size for image in images], self.config.tiles, most)
        return tile_images(images, self.config.tiles, most)


def steps(
    order: SampleOrder,
    reader: UnitReader,
    pack: Callable[[Sequence[Unit]], list[PackedBatch]],
    *,
    first: int,
    last: int,
    global_batch: int,
    total: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Step]:
    """Steps `first` … `last` - 1 of a run over `total` samples; rank r takes every r-th unit."""

    def refs_of(index: int) -> list[UnitRef]:
        return order.step(index, global_batch, total)[rank::world_size]

    workers = reader.config.workers
    loader = DataLoader(
        reader,
        sampler=(ref for index in range(first, last) for ref in refs_of(index)),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=16 if workers else None,
        # Its own: a loader draws a seed when it starts, which would shift dropout after a resume.
        generator=torch.Generator(),
    )
    reads = iter(loader)
    for index in range(first, last):
        waiting = time.perf_counter()
        units: list[Unit] = []
        bad: list[BadSample] = []
        for _ in refs_of(index):
            read = next(reads)
            units += read.units
            bad += read.bad
        yield Step(index, pack(units), bad, time.perf_counter() - waiting)
