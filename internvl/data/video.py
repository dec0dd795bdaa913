"""Reads the frames of a video file with PyAV, by the original's rules.

Original: `internvl_chat/internvl/train/dataset.py`, `get_frame_indices`, `read_frames_decord`.
"""

import copy
import importlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from internvl import files
from internvl.config import VideoConfig
from internvl.data.arguments import list_images
from internvl.data.images import (
    HEAD,
    Exif,
    check_file,
    check_size,
    decoder_errors,
    is_address,
    name_of,
    open_checked,
    open_rgb,
    read_address,
    read_head,
    stored_size,
    undecodable,
)
from internvl.data.messages import (
    IMAGE_MARK,
    VIDEO_MARK,
    fill_marks,
    has_marks,
    wrong_marks,
)
from internvl.data.records import Message, Sample, Video
from internvl.errors import BadImage

MAX_FRAMES = 10_000_000
"""Most frames of a video, a day at 115 a second: edit lists can repeat a few without end."""

_TRUNCATED = "the file is truncated, copy or download it again"
_ANIMATIONS = (".gif", ".webp", ".png", ".apng")
_MICROSECONDS = 1_000_000
_LATE_S, _SAME_S = 0.1, 1e-6
_ATTACHED_PIC = 0x400
_MATRIX = struct.Struct("=9i")
_MAX_SKEW = 0.0175
"""Sine of the degree by which a display matrix may miss a right angle."""
_TRANSPOSES = {
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
"""Keys: (transposed, then mirrored left to right, then top to bottom)."""


def choose_frames(
    num_frames: int, fps: float, config: VideoConfig, draw: np.random.Generator
) -> np.ndarray:
    """Samples frames of a video of `num_frames` at `fps`: int64 indices, ascending.

    The count is drawn from min_frames…max_frames whatever the length, except for fps sampling; a
    shorter video repeats its last frame. `draw` decides the count and, for "rand", the frames.
    """
    if config.sampling.startswith("fps"):
        step_s = 1 / float(config.sampling.removeprefix("fps"))
        end_s = min(num_frames / fps, step_s * (config.max_frames + 1))  # a header may say years
        times = np.arange(step_s / 2, end_s + step_s / 2, step_s)
        indices = np.around(times * fps).astype(np.int64)
        indices = indices[indices < num_frames][: config.max_frames]
        # A video of less than half a step still is its middle frame.
        return indices if len(indices) else np.array([(num_frames - 1) // 2])
    num_chosen = int(draw.integers(config.min_frames, config.max_frames, endpoint=True))
    count = min(num_chosen, num_frames)
    bounds = np.linspace(0, num_frames, count + 1).astype(np.int64)
    first, last = bounds[:-1], bounds[1:] - 1
    if config.sampling == "middle":
        chosen = (first + last) // 2
    elif (last > first).all():
        # As in the original, a segment's last frame is never drawn.
        chosen = draw.integers(first, last)
    else:
        chosen = np.sort(draw.permutation(num_frames)[:count])
    return np.concatenate([chosen, np.full(num_chosen - count, chosen[-1])])


def read_frames(
    video: Video, config: VideoConfig, draw: np.random.Generator, exif: Exif = "ignore"
) -> list[Image.Image]:
    """Samples the RGB frames of a video: a file that PyAV reads, an animation that Pillow reads
    (GIF, WebP, APNG), or a folder of frames; `exif` is about the frames of a folder.

    Frames are those that a player shows, in their order: turned by the display matrix, without
    those that an edit list hides. Pixels stay as they are stored if they are not square, and both
    fields of interlaced frames together, as decord gives them.

    Raises:
        BadImage: it is missing, cannot be decoded, or ends before the clip.
    """
    if video.path.endswith(os.sep):
        return _folder_frames(video, config, draw, exif)
    if video.path.lower().endswith(_ANIMATIONS):
        return _animation_frames(video, config, draw)
    return _decoded_frames(video, config, draw)


def read_frames_at(path: str, choose: Callable[[int, float], Sequence[int]]) -> list[Image.Image]:
    """Decodes the RGB frames of a video file that `choose` names by index, in its order.

    Args:
        choose: called with the number of frames and the frames a second.

    Raises:
        BadImage: it is missing, cannot be decoded, or ends before one of them.
    """
    source, name = _read_source(path), name_of(path)
    with _open_stream(source, name) as (container, stream):
        timing = _read_timing(container, stream, name)
    last = len(timing.shown) - 1
    chosen = [min(max(index, 0), last) for index in choose(last + 1, timing.fps)]
    distinct = np.unique(np.array(chosen, np.int64))
    with _open_stream(source, name) as (container, stream):
        frames, _ = _decode(container, stream, distinct, name)
    if frames is None:
        raise BadImage(f"{name} ends before frame {int(distinct[-1])}; replace the file")
    by_index = dict(zip(distinct.tolist(), frames, strict=True))
    return [by_index[index] for index in chosen]


def read_video(
    video: Any, num_frames: int, label: str = "video", exif: Exif = "ignore"
) -> list[Any]:
    """Reads `num_frames` frames of a video, the middle ones of equal segments; returns those of a
    list of frames.

    Raises:
        BadImage: it cannot be read, or has no frames; begins with `label`.
    """
    if not isinstance(video, str | os.PathLike | Video):
        frames = list_images(video)
        if not frames:
            raise BadImage(f"{label}: the list of frames is empty; leave the video out")
        return frames
    try:
        # A folder of frames is marked by the slash at its end.
        folder_mark = os.sep if not isinstance(video, Video) and os.path.isdir(video) else ""
        clip = video if isinstance(video, Video) else Video(os.fspath(video) + folder_mark)
        spread = VideoConfig(min_frames=num_frames, max_frames=num_frames, sampling="middle")
        return list(read_frames(clip, spread, np.random.default_rng(0), exif))
    except BadImage as error:
        raise BadImage(f"{label}: {error}") from None


def stored_frame_size(path: str) -> tuple[int, int]:
    """Returns (width, height) of a video file's frames in px, from its header; 0 if only its frames
    say.

    Raises:
        BadImage: it is missing, or no video.
    """
    if path.lower().endswith(_ANIMATIONS):
        return stored_size(path)
    source, name = _read_source(path), name_of(path)
    with _open_stream(source, name) as (_, stream):
        return stream.width, stream.height


def with_frames(sample: Sample, counts: Sequence[int], label: str) -> Sample:
    """Replaces every `<video>` mark of a sample by a line per frame.

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
        # Called once per mark, in order, so the counts are taken from the front.
        return "\n".join(label.format(n) for n in range(1, left.pop(0) + 1))

    messages = tuple(
        Message(m.role, fill_marks(m.content, VIDEO_MARK, lines)) if m.role == "user" else m
        for m in sample.messages
    )
    return replace(sample, messages=messages)


@dataclass(frozen=True)
class _Timing:
    """Timestamps of a video's frames."""

    shown: Sequence[tuple[int | None, int]]
    """(begin, duration) of every frame, in units of `unit_s`; unknown ones are None and 0."""
    unit_s: float
    begins_s: float
    """The time at which a player shows 0:00."""
    fps: float
    """Average frames per second, 0 if unknown."""
    seek_pts: int | None = None
    """Timestamp to seek to for the first packet; None if seeking may not lead there."""

    def times_s(self) -> np.ndarray | None:
        """Returns when each frame begins and the last one ends, from 0:00 on: float64
        (frames + 1,), or None if unknown."""
        begins = [begin for begin, _ in self.shown if begin is not None]
        if len(begins) < len(self.shown):
            return None
        last, duration = max(
            (begin, duration) for begin, duration in self.shown if begin is not None
        )
        times_s = np.array([*sorted(begins), last + duration], dtype=np.float64) * self.unit_s
        if not duration and self.fps > 0:
            times_s[-1] += 1 / self.fps
        # A few hundredths are the sound's lead, not a wait for the first frame.
        late = times_s[0] - self.begins_s >= _LATE_S
        return times_s - (self.begins_s if late else times_s[0])


def _choose_indices(
    video: Video, timing: _Timing, config: VideoConfig, draw: np.random.Generator
) -> np.ndarray:
    """Samples frames of a video or of its clip: int64 indices, ascending."""
    num_frames, fps, times_s = len(timing.shown), timing.fps, timing.times_s()
    if times_s is not None:
        if fps <= 0 and times_s[-1] > times_s[0]:
            fps = num_frames / float(times_s[-1] - times_s[0])
        # Within half a frame of regular times the number of a frame says when it is shown.
        if np.all(np.abs(times_s[:-1] * fps - np.arange(num_frames)) < 0.5):
            times_s = None
    if fps <= 0:
        if num_frames > 1 and _needs_times(video, config):
            raise BadImage(f"{name_of(video.path)} does not say how many frames a second it has")
        fps = 1.0  # without times every frame counts alike, at any rate
    first, count = _clip_range(video, num_frames, fps, times_s)
    return choose_frames(count, fps, config, draw) + first


def _needs_times(video: Video, config: VideoConfig) -> bool:
    return video.start_s is not None or config.sampling.startswith("fps")


def _clip_range(
    video: Video, num_frames: int, fps: float, times_s: np.ndarray | None
) -> tuple[int, int]:
    """Returns (first frame, number of frames) of the clip, the whole video without one.

    Frames at regular times are counted by `fps`, as in the original; otherwise `times_s`, float
    (num_frames + 1,), says when each begins and the last one ends.
    """
    start_s, end_s = video.start_s, video.end_s
    if start_s is None or end_s is None:
        return 0, num_frames
    if times_s is None:
        lasts_s = num_frames / fps
        first = int(min(start_s, lasts_s) * fps)
        # A part shorter than a frame is the frame that is shown then.
        count = max(int(min(end_s - start_s, 2 * lasts_s + 2 / fps) * fps), 1)
        inside = first < num_frames and first + count <= num_frames + 1
    else:
        lasts_s = float(times_s[-1])
        # A frame is shown until the next one begins.
        first = max(int(np.searchsorted(times_s, start_s + _SAME_S, "right")) - 1, 0)
        count = max(int(np.searchsorted(times_s, end_s - _SAME_S, "left")) - first, 1)
        inside = first < num_frames and end_s <= lasts_s + 1 / fps
    if not inside:
        raise BadImage(
            f"{name_of(video.path)}: `clip` is {start_s:g} to {end_s:g} s, but the video lasts "
            f"{lasts_s:.2f} s"
        )
    return first, min(count, num_frames - first)


def _decoded_frames(
    video: Video, config: VideoConfig, draw: np.random.Generator
) -> list[Image.Image]:
    source = _read_source(video.path)
    try:
        return _decode_chosen(source, video, config, draw)
    except BadImage as bad:
        if bad.__cause__ is None:  # not PyAV's, but a sentence of our own
            raise
        meaning = _describe_unreadable(source)
        if meaning is None:
            raise
        raise BadImage(f"{name_of(video.path)}: {meaning}") from bad.__cause__


def _describe_unreadable(source: str | bytes) -> str | None:
    """Says what a file that PyAV cannot read really is and what to do; None if unknown."""
    head = source[:HEAD] if isinstance(source, bytes) else read_head(source)
    meaning = files.describe_media(head, "video")
    if meaning is not None:
        return meaning
    try:
        with open_checked(source, "video") as image:
            return f"an image ({image.format}), not a video: name it under `image`"
    except BadImage:
        return None


def _decode_chosen(
    source: str | bytes, video: Video, config: VideoConfig, draw: np.random.Generator
) -> list[Image.Image]:
    name, draw_again = name_of(video.path), copy.deepcopy(draw)
    with _open_stream(source, name) as (container, stream):
        if "matroska" in container.format.name:
            _check_matroska_size(source, name)
        timing = _read_timing(container, stream, name)
        indices = _choose_indices(video, timing, config, draw)
        if timing.seek_pts is not None:  # saves half of the time to open a short video twice
            with decoder_errors(name, "video"):
                container.seek(timing.seek_pts, stream=stream)
            frames, decoded = _decode(container, stream, indices, name)
    if timing.seek_pts is None:
        with _open_stream(source, name) as (container, stream):
            frames, decoded = _decode(container, stream, indices, name)
    if frames is None:
        # Some packets give no frame to show, as those that others only refer to, or that refer to
        # what was cut off. What can be decoded is then the measure.
        if not decoded:
            raise BadImage(f"{name}: the video cannot be decoded (not one frame); replace the file")
        indices = _choose_indices(video, replace(timing, shown=decoded), config, draw_again)
        with _open_stream(source, name) as (container, stream):
            frames, _ = _decode(container, stream, indices, name)
    if frames is None:
        raise BadImage(f"{name} ends before frame {int(indices[-1])}; replace the file")
    return frames


def _read_source(path: str) -> str | bytes:
    """Returns the path of a regular file, or the bytes at an address. Raises BadImage."""
    if is_address(path):
        return read_address(path, "video")
    check_file(path, name_of(path), "video")
    return path


@contextmanager
def _open_stream(source: str | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """Yields (container, stream) of the video that a player would show. Raises BadImage."""
    av = _import_av()
    with decoder_errors(name, "video"):
        # A title in another encoding is no reason to refuse a video.
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        container = av.open(file, metadata_errors="replace")
    with container:
        with decoder_errors(name, "video"):
            stream = container.streams.best("video")
            cover = stream is not None and bool(stream.disposition & _ATTACHED_PIC)
            size = (0, 0) if stream is None else (stream.width, stream.height)
        if stream is None or cover:
            raise BadImage(f"{name} has no video stream")
        if all(size):  # some streams say it in their frames only
            check_size(size, name)
        yield container, stream


def _checked_items(items: Iterable[Any], name: str) -> Iterator[Any]:
    """Yields PyAV's packets or frames. Raises BadImage for any exception of PyAV."""
    iterator = iter(items)
    while True:
        try:
            item = next(iterator, None)
        except Exception as error:  # of a decoder alone, see `decoder_errors`
            raise undecodable(name, "video", error) from error
        if item is None:
            return
        yield item


def _read_timing(container: Any, stream: Any, name: str) -> _Timing:
    """Reads the timing of the frames to be shown from packets: a hundredth of decoding's time.

    A header counts what is stored; what an edit list hides is marked in the packets only.

    Raises:
        BadImage: nothing is shown, or the file ends earlier than its header says.
    """
    # What is in a QuickTime file after its edit lists; other headers count packets.
    expected = len(stream.index_entries) if "mov" in container.format.name else stream.frames
    matroska = "matroska" in container.format.name  # which says how long it is, not how many
    shown: list[tuple[int | None, int]] = []
    num_packets, end_s, seek_pts = 0, 0.0, None
    for packet in _checked_items(container.demux(), name):
        if matroska and packet.pts is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        last = not packet.size and packet.pts is packet.dts is None  # of no content at all
        if packet.stream_index != stream.index or last:
            continue
        if not num_packets and packet.is_keyframe and _seeks_exactly(container):
            seek_pts = packet.pts if packet.dts is None else packet.dts
        num_packets += 1
        if packet.size and not packet.is_discard:
            shown.append((packet.pts, packet.duration or 0))
        if num_packets > MAX_FRAMES:
            raise BadImage(f"{name} has more than {MAX_FRAMES:,} frames; cut it")
    declared_s = (container.duration or 0) / _MICROSECONDS
    if num_packets < expected or (matroska and end_s < 0.9 * declared_s):
        raise BadImage(f"{name} ends earlier than its header says; {_TRUNCATED}")
    if not shown:
        raise BadImage(f"{name} has no frame to show; replace the file")
    with decoder_errors(name, "video"):
        fps = float(stream.average_rate or stream.guessed_rate or 0)
    begins_s = (container.start_time or 0) / _MICROSECONDS
    fps = fps if 0 < fps < 1e6 else 0.0
    return _Timing(shown, float(stream.time_base or 0), begins_s, fps, seek_pts)


def _check_matroska_size(source: str | bytes, name: str) -> None:
    """Raises BadImage for a Matroska or WebM file that is shorter than its segment says.

    Counting and timing packets would miss a few lost ones, and frames would change in silence.
    """
    if isinstance(source, bytes):
        head, size = source[:HEAD], len(source)
    else:
        head, size = read_head(source), os.path.getsize(source)
    header = _ebml_end(head, 0)
    segment = None if header is None else _ebml_end(head, header)
    if segment is not None and size < segment:
        raise BadImage(f"{name} ends earlier than its header says; {_TRUNCATED}")


def _ebml_end(head: bytes, start: int) -> int | None:
    """Returns the offset at which an EBML element that begins at `start` ends; None if its size is
    unknown (all ones, as in a live stream).

    An identifier's and a size's leading zero bits count the bytes that follow their first one.
    """
    if start >= len(head):
        return None
    offset = start + 9 - head[start].bit_length()
    if offset >= len(head) or not head[offset]:
        return None
    length = 9 - head[offset].bit_length()
    unknown = (1 << 7 * length) - 1
    value = int.from_bytes(head[offset : offset + length], "big") & unknown
    return None if value == unknown else offset + length + value


def _seeks_exactly(container: Any) -> bool:
    """True if seeking is exact; MPEG-TS and others guess or cannot go back at all."""
    return "mov" in container.format.name or "matroska" in container.format.name


def _decode(
    container: Any, stream: Any, indices: np.ndarray, name: str
) -> tuple[list[Image.Image] | None, list[tuple[int | None, int]]]:
    """Decodes in order up to the last of `indices`: (their RGB frames, or None if the video has
    fewer; (begin, duration) of all decoded frames)."""
    chosen: dict[int, Image.Image] = {}
    decoded: list[tuple[int | None, int]] = []
    needed, last = set(indices.tolist()), int(indices[-1])
    for index, frame in enumerate(_checked_items(container.decode(stream), name)):
        decoded.append((frame.pts, frame.duration or 0))
        if index in needed:
            check_size((frame.width, frame.height), name)
            chosen[index] = _orient(frame, name)
        if index == last:
            return [chosen[i] for i in indices.tolist()], decoded
    return None, decoded


def _orient(frame: Any, name: str) -> Image.Image:
    """Converts a frame to RGB, turned and mirrored by its display matrix.

    A matrix between right angles is ignored, as players do.
    """
    with decoder_errors(name, "video"):
        image = frame.to_image()
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None or len(bytes(matrix)) != _MATRIX.size:
            return image
        a, b, _, c, d, *_ = _MATRIX.unpack(bytes(matrix))
    # x, y of the file are shown at a x + c y, b x + d y.
    largest = max(map(abs, (a, b, c, d)))
    if max(abs(b), abs(c)) < _MAX_SKEW * largest:
        method = _TRANSPOSES.get((False, a < 0, d < 0))
    elif max(abs(a), abs(d)) < _MAX_SKEW * largest:
        method = _TRANSPOSES.get((True, c < 0, b < 0))
    else:
        method = None
    return image if method is None else image.transpose(method)


def _animation_frames(
    video: Video, config: VideoConfig, draw: np.random.Generator
) -> list[Image.Image]:
    """Samples the RGB frames of an animation that Pillow reads, composed as they are shown."""
    name, num_stills = name_of(video.path), 0
    with open_checked(video.path, "video") as image:
        with decoder_errors(name, "video"):
            # An APNG's image for readers without animation is not one of its frames.
            num_stills = int(getattr(image, "default_image", False))
            num_frames = getattr(image, "n_frames", 1) - num_stills
        if num_frames > MAX_FRAMES:
            raise BadImage(f"{name} has more than {MAX_FRAMES:,} frames; cut it")
        shown: list[tuple[int | None, int]] = [(None, 0)] * num_frames
        if _needs_times(video, config):
            begin = 0
            for index in range(num_frames):
                with decoder_errors(name, "video"):
                    image.seek(index + num_stills)
                    image.load()
                    duration = int(image.info.get("duration") or 100)
                shown[index] = begin, duration
                begin += duration
        indices = _choose_indices(video, _Timing(shown, 1 / 1000, 0.0, 0.0), config, draw)
        chosen: dict[int, Image.Image] = {}
        for index in sorted(set(indices.tolist())):
            with decoder_errors(name, "video"):
                image.seek(index + num_stills)
                chosen[index] = image.convert("RGB")
    return [chosen[i] for i in indices.tolist()]


def _folder_frames(
    video: Video, config: VideoConfig, draw: np.random.Generator, exif: Exif
) -> list[Image.Image]:
    """Reads frames `…_<number>.jpg` by number; samples them only if there are too many."""
    try:
        names = os.listdir(video.path)
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half a surrogate pair
        raise BadImage(f"the frame folder {name_of(video.path)} cannot be read ({error})") from None
    numbered = sorted(
        (int(match[1]), name)
        for name in names
        # macOS may put a hidden `._` file with metadata next to every file.
        if not name.startswith(".") and (match := re.search(r"(\d+)\.\w+$", name))
    )
    if not numbered:
        raise BadImage(f"{name_of(video.path)} holds no frame named like frame_1.jpg")
    num_chosen = int(draw.integers(config.min_frames, config.max_frames, endpoint=True))
    chosen = np.arange(len(numbered))
    if len(numbered) > num_chosen:
        exact = VideoConfig(min_frames=num_chosen, max_frames=num_chosen, sampling=config.sampling)
        chosen = choose_frames(len(numbered), 1.0, exact, draw)
    return [open_rgb(os.path.join(video.path, numbered[i][1]), exif) for i in chosen]


def _import_av() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise BadImage("reading videos needs PyAV: pip install 'internvl[video]'") from None
