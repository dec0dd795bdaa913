"""Frames of MVBench's videos, by the rules of its own script.

Original: `internvl_chat/eval/mvbench/evaluate_mvbench.py`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvl.data import video as videos
from internvl.data.images import open_rgb
from internvl.errors import BadImage

_FRAME_RATE = 3.0  # of the folders of frames


@dataclass(frozen=True)
class VideoTask:
    """One of MVBench's twenty tasks."""

    name: str
    file: str
    folder: str
    """Below data/MVBench/video."""
    has_bounds: bool = False
    """Its questions are about a part of the video."""


def _task(name: str, folder: str, has_bounds: bool = False) -> VideoTask:
    file = f"{name.lower().replace(' ', '_').replace('-', '_')}.json"
    return VideoTask(name, file, folder, has_bounds)


_CLEVRER, _STAR = "clevrer/video_validation", "star/Charades_v1_480"
TASKS = (
    _task("Action Sequence", _STAR, True),
    _task("Action Prediction", _STAR, True),
    _task("Action Antonym", "ssv2_video"),
    _task("Fine-grained Action", "Moments_in_Time_Raw/videos"),
    _task("Unexpected Action", "FunQA_test/test"),
    _task("Object Existence", _CLEVRER),
    _task("Object Interaction", _STAR, True),
    _task("Object Shuffle", "perception/videos"),
    _task("Moving Direction", _CLEVRER),
    _task("Action Localization", "sta/sta_video", True),
    _task("Scene Transition", "scene_qa/video"),
    _task("Action Count", "perception/videos"),
    _task("Moving Count", _CLEVRER),
    _task("Moving Attribute", _CLEVRER),
    _task("State Change", "perception/videos"),
    _task("Fine-grained Pose", "nturgbd"),
    _task("Character Order", "perception/videos"),
    _task("Egocentric Navigation", "vlnqa"),
    _task("Episodic Reasoning", "tvqa/frames_fps3_hq", True),
    _task("Counterfactual Inference", _CLEVRER),
)
"""In the order of the questions."""


def segment_indices(
    bound: Sequence[float] | None, fps: float, last: int, segments: int, first: int = 0
) -> list[int]:
    """Returns the middle frame of each of `segments` equal parts of a video or of its clip.

    Args:
        bound: begin and end of the clip, in seconds.
        last: index of the last frame.
        first: index of the first one.
    """
    # evaluate_mvbench.py:116 has these numbers for a whole video.
    begin, end = bound or (-100_000, 100_000)
    start = max(first, round(begin * fps))
    size = (min(round(end * fps), last) - start) / segments
    # numpy's rounding, half to even, and the truncation at the end: the original's frames.
    return [int(start + size / 2 + np.round(size * n)) for n in range(segments)]


def read_segments(path: Path, bound: Sequence[float] | None, segments: int) -> list[Any]:
    """Decodes `segments` frames of a video, or of a folder of frames 00001.jpg, ….

    Raises:
        BadImage: it is missing or cannot be decoded.
    """
    if path.is_dir():
        # Files of these folders are numbered from 1.
        indices = segment_indices(bound, _FRAME_RATE, len(os.listdir(path)), segments, first=1)
        return [open_rgb(path / f"{index:05d}.jpg") for index in indices]
    if not path.exists():
        raise BadImage(f"{path}: there is no such video")

    def choose(num_frames: int, fps: float) -> list[int]:
        return segment_indices(bound, fps, num_frames - 1, segments)

    return videos.read_frames_at(str(path), choose)
