"""`data:` sources, tiles, packing."""

import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from internvl.config.types import STRICT, Fraction, Positive, TileCount, UserFolder, UserPath


@dataclass(frozen=True, kw_only=True)
class TilesChoice:
    """Tiling keys of a recipe (dynamic resolution); null takes the checkpoint's value."""

    __pydantic_config__ = STRICT
    size: Positive | None = None
    """Side of a tile, in pixels: a multiple of twice the patch size. If it differs from the
    checkpoint's, the position embeddings are resized."""
    min: Positive | None = None
    """Fewest tiles of an image."""
    max: TileCount | None = None
    """Most tiles of an image, thumbnail not counted; for InternVL-14B always 1."""
    thumbnail: bool | None = None
    """Append the whole image as one more tile if it was cut into several."""
    pad_square: bool | None = None
    """Pad an image to a square (in the mean colour) instead of stretching it. Only with
    `max: 1`; a source with `augment` ignores it, as the original does."""

    @property
    def unset(self) -> tuple[str, ...]:
        """Names of the fields whose value the checkpoint decides."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is None)


@dataclass(frozen=True, kw_only=True)
class TilesConfig(TilesChoice):
    """Tiling with every field set, as a run uses it once its checkpoint is known."""

    # The types exclude null, so mypy sees that code after the checkpoint was read needs no check.
    __pydantic_config__ = STRICT
    size: Positive = 448
    """Side of a tile, in pixels."""
    min: Positive = 1
    """Fewest tiles of an image."""
    max: TileCount = 12
    """Most tiles of an image, thumbnail not counted."""
    thumbnail: bool = True
    """Append the whole image as one more tile if it was cut into several."""
    pad_square: bool = False
    """Pad an image to a square instead of stretching it."""


def _check_sampling(sampling: str) -> str:
    if not re.fullmatch(r"rand|middle|fps[0-9]*\.?[0-9]+", sampling):
        raise ValueError("must be rand, middle, or fps and frames per second, such as fps2")
    return sampling


def _check_label(label: str) -> str:
    if "{}" not in label:
        raise ValueError("must hold {}, which becomes the number of the frame")
    return label


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Which frames of a video the model sees. Each becomes one tile."""

    __pydantic_config__ = STRICT
    min_frames: Positive = 8
    """Fewest frames drawn."""
    max_frames: Positive = 32
    """Most frames drawn; the count is drawn at random each time, whatever the video's length."""
    # Matched here: a misspelled sampling stops the recipe, not the loader at its first video.
    sampling: Annotated[str, AfterValidator(_check_sampling)] = "rand"
    """rand: one random frame from each of equal segments; middle: the middle frame of each; fps2,
    fps0.5, …: that many frames per second, at most `max_frames`."""
    label: Annotated[str, AfterValidator(_check_label)] = "Frame-{}: <image>"
    """Text line of a frame; {} is the frame's number, from 1."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One annotation file and the folder of its images."""

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
        # The original recognizes these two by such a part of the data set's name.
        "flickr_format",
        "coco_format",
    ] = "chat"
    """chat: JSONL with `conversations` (official) or `messages` (OpenAI style); coco-captions: COCO
    JSON; captions: any caption format, recognized by file name and content; preference: JSONL of
    pairs, `question, chosen, rejected` or as ms-swift, LLaMA-Factory and TRL have them, which chat
    and parquet read too; parquet: a Parquet or Arrow file, or a folder of them (Hugging
    Face datasets); webdataset: a tar file or a folder of them; pairs: the same formats as captions,
    and tars; flickr_format: lines `name.jpg,caption`; coco_format: a JSON list of `image` and
    `caption`. The last two are the original's formats of pairs."""
    annotations: UserPath
    """The file; for parquet and webdataset also a folder."""
    # `str` too: a Path would make one slash of the two in s3://bucket.
    images: UserFolder = "."
    """Folder (or fsspec address, such as s3://bucket/folder) that image and video paths are
    relative to; paths may not leave it."""
    repeat: Annotated[float, Field(gt=0)] = 1.0
    """Times an epoch shows this source. Below 1: part of it. Above: whole passes, then a part."""
    part: Literal["first", "random"] = "first"
    """Samples of a partial pass: the first of the file, as in the original, or a random choice that
    depends on `seed`."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Relative share of an epoch, instead of `repeat`; either all sources have one or none. An
    epoch keeps as many samples as the sources hold together."""
    num_samples: Positive | None = None
    """Expected number of samples; another number is an error."""
    prompt: str | None = None
    """Question of a caption source; `<image>` is put before it. For InternVL-14B, the text that
    precedes generated captions (itg), by default "English caption:"; the other losses use none."""
    augment: bool = False
    """Degrade every tile by JPEG at a random quality of 75 to 100 (original: `data_augment`)."""
    max_tiles: TileCount | None = None
    """Overrides `data.tiles.max` for this source."""
    insert_image_mark: bool = False
    """Insert `<image>` (or `<video>`) before the first question of a sample that has one image or
    video and no mark, as the original does; otherwise such a sample is bad."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """From annotation files to packed rows."""

    __pydantic_config__ = STRICT
    sources: tuple[SourceConfig, ...] = ()
    """Shuffled together; an epoch shows each `repeat` times."""
    meta: UserPath | None = None
    """A meta file of the original (`root, annotation, repeat_time, data_augment, …` of each data
    set); its entries become sources before those above, with `insert_image_mark` as there."""
    # Complete, unlike a recipe's: a DataConfig made in Python may have no checkpoint to ask.
    tiles: TilesChoice = TilesConfig()
    """How an image is cut into tiles. In a recipe, keys that are not set take the checkpoint's
    values."""
    video: VideoConfig = VideoConfig()
    """How frames are drawn from a video."""
    resize: Literal["pillow", "torch"] = "pillow"
    """pillow: as the original, pixel by pixel. torch: torch's antialiased uint8 resize, whose
    pixels differ by 0.004 of 255 on average. With numba (`internvl[fast]`) both are compiled and
    about equally fast; without it torch's takes a quarter of Pillow's time."""
    normalize: Literal["imagenet", "clip", "siglip"] | None = "imagenet"
    """Mean and standard deviation that pixels are normalized with. In a recipe, null or no key
    takes the checkpoint's."""
    exif: Literal["ignore", "apply"] | None = "ignore"
    """ignore: images stay as stored, as in the original; apply: images are turned by their EXIF
    orientation, as viewers show them, in training and by the exported model too. Not for
    InternVL-14B. In a recipe, null or no key takes the checkpoint's."""
    # InternVL2.5's fine-tuning scripts; InternVL2's set 4,096.
    max_tokens: Positive = 8192
    """Longest sample. A longer one is cut at its end, as in the original; if the cut would remove
    part of an image or every answer, the sample is bad."""
    row_tokens: Positive | None = None
    """Length of a packed row, at least `max_tokens`; null takes `max_tokens`."""
    max_tiles: Positive = 48
    """Most tiles in a packed row."""
    share_prefix: bool = True
    """Pack samples of the same image as one row: the image once, then each answer as a branch."""
    packing: Literal["best-fit", "official"] = "best-fit"
    """best-fit: the fullest row with room for the sample, largest samples first; official: the
    original's buffers, in the order of the data."""
    # As in all of the original's packed scripts.
    packing_buffers: Positive = 20
    """Open rows of official packing (original: `max_buffer_size`)."""
    allow_overflow: bool = False
    """With official packing: once half of `packing_buffers` are open, a sample that fits no row is
    added to one that it overfills, as in the original. The row is cut at `row_tokens`. The rest
    continues as a row from its next image on; as in the original, text before that is lost."""
    template: str | None = None
    """Conversation template; null takes the checkpoint's."""
    system_message: str | None = None
    """Replaces the template's system message if a conversation has none; null takes the
    checkpoint's, else the template's."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """raise: stop the run; skip: leave the sample out, list it in bad_samples.jsonl, and stop above
    `max_bad_fraction`."""
    max_bad_fraction: Fraction = 0.01
    """With skip: largest share of bad samples among those read so far; above it the run stops."""
    changed: Literal["refuse", "accept"] = "refuse"
    """What a resumed run does if its annotations have changed. refuse: stop and say which and how.
    accept: continue with the new ones. If samples were only added at the end, the current epoch
    ends as it would have, each sample once, and the next one includes the new samples; otherwise
    the order changes, and in this epoch samples may come twice or not at all."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read and encode ahead of training; 0: the training process does it."""

    @property
    def tiling(self) -> TilesConfig:
        """`tiles` with every field set. Raises ValueError before `inference.inherited.complete`
        has taken unset fields from the checkpoint."""
        if not isinstance(self.tiles, TilesConfig):
            raise ValueError(f"data.tiles: {', '.join(self.tiles.unset)} left to the checkpoint")
        return self.tiles

    @property
    def orientation(self) -> Literal["ignore", "apply"]:
        """`exif`. Raises ValueError as `tiling` does."""
        if self.exif is None:
            raise ValueError("data.exif: left to the checkpoint")
        return self.exif

    @property
    def statistics(self) -> str:
        """`normalize`, a key of config.types.STATISTICS. Raises ValueError as `tiling` does."""
        if self.normalize is None:
            raise ValueError("data.normalize: left to the checkpoint")
        return self.normalize
