"""`data:` sources, tiles, packing."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from internvl.config.types import STRICT, Fraction, Positive, TileCount


@dataclass(frozen=True, kw_only=True)
class TilesChoice:
    """How an image becomes tiles (dynamic resolution): what a recipe says of it. What it leaves
    out, or null, is the checkpoint's own."""

    __pydantic_config__ = STRICT
    size: Positive | None = None
    """Side of a tile, in pixels. A multiple of twice the patch size. Another one than the
    checkpoint's resizes its position embeddings."""
    min: Positive | None = None
    """Fewest tiles an image may become."""
    max: TileCount | None = None
    """Most tiles an image may become, thumbnail not counted; for InternVL-14B always 1."""
    thumbnail: bool | None = None
    """Append the whole image as one more tile where it was cut into several."""
    pad_square: bool | None = None
    """Pad an image to a square (in the mean colour) instead of stretching it. Only with
    `max: 1`; a source with `augment` ignores it, as the original does."""

    @property
    def open(self) -> tuple[str, ...]:
        """Names of the fields that are left to the checkpoint."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is None)


@dataclass(frozen=True, kw_only=True)
class TilesConfig(TilesChoice):
    """How an image becomes tiles, nothing left open; a recipe's once its checkpoint is known."""

    __pydantic_config__ = STRICT
    size: Positive = 448
    """Side of a tile, in pixels."""
    min: Positive = 1
    """Fewest tiles an image may become."""
    max: TileCount = 12
    """Most tiles an image may become, thumbnail not counted."""
    thumbnail: bool = True
    """Append the whole image as one more tile where it was cut into several."""
    pad_square: bool = False
    """Pad an image to a square instead of stretching it."""


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Which frames stand for a video. Each becomes one tile."""

    __pydantic_config__ = STRICT
    min_frames: Positive = 8
    """Fewest frames drawn."""
    max_frames: Positive = 32
    """Most frames drawn; the number is drawn anew every time, whatever the length."""
    sampling: Annotated[str, Field(pattern=r"^(rand|middle|fps[0-9]*\.?[0-9]+)$")] = "rand"
    """rand: one random frame of each of equal parts; middle: the middle one; fps2, fps0.5, …: that
    many frames a second, at most `max_frames`."""
    label: Annotated[str, Field(pattern=r"\{\}")] = "Frame-{}: <image>"
    """The line that stands for a frame; {} is its number, from 1."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One annotation file and the folder its images lie in."""

    __pydantic_config__ = STRICT
    name: str
    """Used in messages and logs. Unique within a recipe."""
    type: Literal[
        "chat",
        "coco-captions",
        "captions",
        "preference",
        "parquet",
        "webdataset",
        "pairs",
        "flickr_format",
        "coco_format",
    ] = "chat"
    """chat: JSONL with `conversations` (official) or `messages` (OpenAI style); coco-captions: COCO
    JSON; captions: any form of data/captions.py, by name and content; preference: JSONL with
    `question, chosen, rejected`; parquet: a Parquet or Arrow file, or a folder of them (Hugging
    Face datasets); webdataset: a tar file or a folder of them; pairs: the same
    forms as captions, and tars; of these flickr_format, `name.jpg,caption` lines, and coco_format,
    a JSON list of `image` and `caption`, are the original's own."""
    annotations: Path
    """The file, or for parquet and webdataset also a folder."""
    images: str | Path = "."
    """Folder (or fsspec address, such as s3://bucket/folder) that image and video paths start
    from; paths may not leave it."""
    repeat: Annotated[float, Field(gt=0)] = 1.0
    """Times an epoch shows this source. Below 1: part of it. Above: whole passes, then a part."""
    part: Literal["first", "random"] = "first"
    """What part of a pass is: its first lines, as in the original, or a random choice by seed."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Relative share of an epoch, instead of `repeat`; all sources or none have one. An epoch keeps
    as many samples as the sources hold together."""
    num_samples: Positive | None = None
    """How many samples the source must hold; another number is an error."""
    prompt: str | None = None
    """The question of a caption source; `<image>` is put before it. For InternVL-14B, what captions
    are written after (itg), by default "English caption:"; the other losses use none."""
    augment: bool = False
    """Degrade every tile by JPEG at a random quality of 75 to 100 (original: `data_augment`)."""
    max_tiles: TileCount | None = None
    """Overrides `data.tiles.max` for this source."""
    insert_image_mark: bool = False
    """Put `<image>` (or `<video>`) before the first question of a sample with one image or video
    and no mark, as the original does; otherwise such a sample is a bad one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """From annotation files to packed rows."""

    __pydantic_config__ = STRICT
    sources: tuple[SourceConfig, ...] = ()
    """Shuffled together; each is shown `repeat` times an epoch."""
    meta: Path | None = None
    """A meta file of the original (`root, annotation, repeat_time, data_augment, …` of each data
    set); its entries become sources before those above, with `insert_image_mark` as there."""
    tiles: TilesChoice = TilesConfig()
    """How an image becomes tiles. In a recipe, what is left out is the checkpoint's."""
    video: VideoConfig = VideoConfig()
    """How a video becomes images."""
    resize: Literal["pillow", "torch"] = "pillow"
    """pillow: as the original, pixel by pixel. torch: its antialiased uint8 resize, 0.004 of 255
    off on average. Both are compiled where numba is installed (`internvl[fast]`), and then take
    about the same time; without it torch's takes a quarter of Pillow's."""
    normalize: Literal["imagenet", "clip", "siglip"] | None = "imagenet"
    """Mean and deviation that pixels are normalized with. In a recipe, null or nothing takes the
    checkpoint's."""
    exif: Literal["ignore", "apply"] | None = "ignore"
    """ignore: an image is taken as it is stored, as in the original; apply: it is turned as its
    EXIF orientation says, as viewers show it, in training and by the exported model too. Not for
    InternVL-14B. In a recipe, null or nothing takes the checkpoint's."""
    max_tokens: Positive = 8192
    """Longest sample. A longer one loses its end, as in the original, but never part of an image
    or every answer: then it is a bad sample."""
    row_tokens: Positive | None = None
    """Length of a packed row, at least `max_tokens`; null takes `max_tokens`."""
    max_tiles: Positive = 48
    """Most tiles in a packed row."""
    share_prefix: bool = True
    """Samples of the same image form one row: the image once, every answer a branch of it."""
    packing: Literal["best-fit", "official"] = "best-fit"
    """best-fit: the fullest row that still takes a sample, largest samples first; official: the
    original's buffers, in the order of the data."""
    packing_buffers: Positive = 20
    """Open rows of official packing (original: `max_buffer_size`)."""
    allow_overflow: bool = False
    """With official packing: once half of `packing_buffers` are open, a sample that no row takes
    goes into one that it overfills, as in the original. The row is cut at `row_tokens`; what was
    cut off goes on as a row from its next image on, and text before that is lost, as there."""
    template: str | None = None
    """Conversation template; null takes the checkpoint's own."""
    system_message: str | None = None
    """Replaces the template's system message where a conversation has none; null takes the
    checkpoint's, and where it has none either, the template's."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """raise stops the run; skip leaves the sample out, lists it in bad_samples.jsonl, and stops
    above `max_bad_fraction`."""
    max_bad_fraction: Fraction = 0.01
    """With skip: the run stops when more than this share of the samples seen so far were bad."""
    changed: Literal["refuse", "accept"] = "refuse"
    """What a run does that goes on and finds its annotations changed. refuse: it says which and
    how, and stops. accept: it goes on with them. Where samples were only added at the end, the
    epoch that has begun ends as it would have, each sample once, and the new ones come from the
    next on; otherwise the order is a new one, and samples may come twice or not at all in this
    epoch."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read and encode ahead of training; 0 does it in the training process."""

    @property
    def tiling(self) -> TilesConfig:
        """`tiles` with nothing left open. Raises ValueError before the checkpoint filled them in
        (handles.complete)."""
        if not isinstance(self.tiles, TilesConfig):
            raise ValueError(f"data.tiles: {', '.join(self.tiles.open)} left to the checkpoint")
        return self.tiles

    @property
    def orientation(self) -> Literal["ignore", "apply"]:
        """`exif`. Raises ValueError as `tiling` does."""
        if self.exif is None:
            raise ValueError("data.exif: left to the checkpoint")
        return self.exif

    @property
    def statistics(self) -> str:
        """`normalize`, a key of data.images.STATISTICS. Raises ValueError as `tiling` does."""
        if self.normalize is None:
            raise ValueError("data.normalize: left to the checkpoint")
        return self.normalize
