"""Frames of a video file, through PyAV, by the original's rules.

Original: `internvl_chat/internvl/train/dataset.py`, `get_frame_indices`, `read_frames_decord`.
"""

import importlib
import io
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from internvl.config import VideoConfig
from internvl.data.images import BadImage, is_address, open_rgb, read_address
from internvl.data.messages import (
    IMAGE_MARK,
    VIDEO_MARK,
    fill_marks,
    has_marks,
    wrong_marks,
)
from internvl.data.records import Message, Sample, Video


def choose_frames(
    num_frames: int, fps: float, config: VideoConfig, draw: np.random.Generator
) -> np.ndarray:
    """int64 indices of the frames that stand for a video of `num_frames` at `fps`, ascending.

    Their number is drawn from min_frames…max_frames whatever the length, except for fps sampling;
    a shorter video repeats its last frame. `draw` decides the number and, for "rand", the frames.
    """
    if config.sampling.startswith("fps"):
        step_s = 1 / float(config.sampling.removeprefix("fps"))
        times = np.arange(step_s / 2, num_frames / fps + step_s / 2, step_s)
        indices = np.around(times * fps).astype(np.int64)
        return indices[indices < num_frames][: config.max_frames]
    wanted = int(draw.integers(config.min_frames, config.max_frames, endpoint=True))
    count = min(wanted, num_frames)
    bounds = np.linspace(0, num_frames, count + 1).astype(np.int64)
    first, last = bounds[:-1], bounds[1:] - 1
    if config.sampling == "middle":
        chosen = (first + last) // 2
    elif (last > first).all():
        # As in the original, a segment's last frame is never drawn.
        chosen = draw.integers(first, last)
    else:
        chosen = np.sort(draw.permutation(num_frames)[:count])
    return np.concatenate([chosen, np.full(wanted - count, chosen[-1])])


def read_frames(video: Video, config: VideoConfig, draw: np.random.Generator) -> list[Image.Image]:
    """The RGB frames that stand for a video: a file PyAV reads, a GIF, or a folder of frames.

    Raises:
        BadImage: it is missing, cannot be decoded, or ends before the part that is meant.
    """
    if video.path.endswith(os.sep):
        return _folder_frames(video, config, draw)
    if video.path.endswith(".gif"):
        return _gif_frames(video, config, draw)
    return _decoded_frames(video, config, draw)


def with_frames(sample: Sample, counts: Sequence[int], label: str) -> Sample:
    """The sample with every `<video>` mark turned into a line per frame.

    Args:
        counts: frames of each of its videos.
        label: the line of a frame; {} is its number, from 1.

    Raises:
        BadImage: the marks do not match the videos.
    """
    reason = wrong_marks(sample.messages, VIDEO_MARK, len(counts))
    if reason is None and has_marks(sample.messages, IMAGE_MARK):
        remedy = f"write one mark where each video belongs, and no {IMAGE_MARK} but \\{IMAGE_MARK}"
        reason = f"it has videos, and {IMAGE_MARK} in a question; {remedy} for the word"
    if reason is not None:
        raise BadImage(reason)
    left = list(counts)

    def lines() -> str:
        return "\n".join(label.format(number) for number in range(1, left.pop(0) + 1))

    messages = tuple(
        Message(m.role, fill_marks(m.content, VIDEO_MARK, lines)) if m.role == "user" else m
        for m in sample.messages
    )
    return Sample(sample.name, messages, sample.images, sample.videos, sample.extra)


def _part(video: Video, num_frames: int, fps: float) -> tuple[int, int]:
    """(first frame, number of frames) of the part that is meant."""
    if video.start_s is None or video.end_s is None:
        return 0, num_frames
    first, count = int(video.start_s * fps), int((video.end_s - video.start_s) * fps)
    if count < 1 or first + count > num_frames + 1:
        raise BadImage(
            f"{video.path}: `clip` is {video.start_s:g} to {video.end_s:g} s, but the video lasts "
            f"{num_frames / fps:.2f} s"
        )
    return first, min(count, num_frames - first)


def _decoded_frames(
    video: Video, config: VideoConfig, draw: np.random.Generator
) -> list[Image.Image]:
    av = _av()
    source = io.BytesIO(read_address(video.path)) if is_address(video.path) else video.path
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise BadImage(f"{video.path} has no video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or 0)
            if not math.isfinite(fps) or fps <= 0:
                raise BadImage(f"{video.path} does not say how many frames a second it has")
            num_frames = stream.frames or _count_frames(container, stream)
            first, count = _part(video, num_frames, fps)
            wanted = choose_frames(count, fps, config, draw) + first
            return _pick(container, stream, wanted, video.path)
    except FileNotFoundError:
        raise BadImage(f"there is no video {video.path}") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(f"{video.path} cannot be decoded ({error})") from None


def _count_frames(container: Any, stream: Any) -> int:
    count = sum(1 for packet in container.demux(stream) if packet.size)
    container.seek(0)
    return count


def _pick(container: Any, stream: Any, wanted: np.ndarray, path: str) -> list[Image.Image]:
    """The frames of these numbers, decoded in order until the last one."""
    found: dict[int, Image.Image] = {}
    needed, last = set(wanted.tolist()), int(wanted[-1])
    for number, frame in enumerate(container.decode(stream)):
        if number in needed:
            found[number] = frame.to_image()
        if number == last:
            break
    missing = needed - found.keys()
    if missing:
        raise BadImage(f"{path} ends before frame {min(missing)}; the file is truncated")
    return [found[number] for number in wanted.tolist()]


def _gif_frames(video: Video, config: VideoConfig, draw: np.random.Generator) -> list[Image.Image]:
    try:
        with Image.open(video.path) as image:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
            duration_ms = image.info.get("duration", 100) or 100
    except FileNotFoundError:
        raise BadImage(f"there is no video {video.path}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage(f"{video.path} cannot be decoded ({error})") from None
    fps = 1000 / duration_ms
    first, count = _part(video, len(frames), fps)
    return [frames[i] for i in choose_frames(count, fps, config, draw) + first]


def _folder_frames(
    video: Video, config: VideoConfig, draw: np.random.Generator
) -> list[Image.Image]:
    """Frames `…_<number>.jpg` in the order of their numbers, chosen from only if too many."""
    try:
        names = os.listdir(video.path)
    except OSError as error:
        raise BadImage(f"the frame folder {video.path} cannot be read ({error})") from None
    numbered = sorted(
        (int(match[1]), name) for name in names if (match := re.search(r"(\d+)\.\w+$", name))
    )
    if not numbered:
        raise BadImage(f"{video.path} holds no frame named like frame_1.jpg")
    wanted = int(draw.integers(config.min_frames, config.max_frames, endpoint=True))
    chosen = np.arange(len(numbered))
    if len(numbered) > wanted:
        exact = VideoConfig(min_frames=wanted, max_frames=wanted, sampling=config.sampling)
        chosen = choose_frames(len(numbered), 1.0, exact, draw)
    return [open_rgb(os.path.join(video.path, numbered[i][1])) for i in chosen]


def _av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise BadImage("reading videos needs PyAV: pip install 'internvl[video]'") from None
