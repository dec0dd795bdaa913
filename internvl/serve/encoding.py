"""Encodes requests to prompts: images are decoded and tiled in threads or processes."""

import asyncio
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internvl import log
from internvl.data.images import as_rgb
from internvl.data.messages import IMAGE_MARK
from internvl.data.records import Message
from internvl.data.video import read_video, stored_frame_size
from internvl.data.workers import usable_cores
from internvl.errors import BadImage, UserError
from internvl.inference.requests import Prompt, Request, encode
from internvl.serve.apart import end_with_parent
from internvl.serve.chat_request import ChatRequest
from internvl.serve.errors import ApiError
from internvl.serve.messages import Medium
from internvl.serve.rendering import Rendering

_THREADS, _PROCESSES = 12, 8
"""Most threads that decode, and most processes of an engine; each reads some 20 images a second."""
_OTHER_CORES = 4
"""Cores left to the server, the engine, and whatever else a GPU's machine runs."""
_NUM_FRAMES = 8
VIDEO_PIXELS = 300_000_000
"""Most pixels of all frames that are taken of a request's videos: 36 of 4K, some 2.5 GB."""
_MAGIC = {b"GIF8": ".gif", b"RIFF": ".webp", b"\x89PNG": ".png"}
"""First bytes of an animation -> the suffix by which its reader knows it."""

Shown = Sequence[tuple[Medium, bytes]]
"""Images and videos of a request, encoded, in order."""


def processes_for(on_gpu: bool, engines: int) -> int:
    """Returns how many processes should read the requests of some engines; 0: threads should."""
    # A CPU that also computes answers has no core left for them.
    if not on_gpu or "forkserver" not in multiprocessing.get_all_start_methods():
        return 0
    return max(0, min(_PROCESSES * engines, usable_cores() - _OTHER_CORES))


class Readers:
    """Threads that encode requests and, once they have started, processes in their place."""

    def __init__(self, renderings: Mapping[str, Rendering], processes: int) -> None:
        """
        Args:
            renderings: by the names that requests ask for.
            processes: how many; 0 for threads alone.
        """
        self._renderings = dict(renderings)
        threads = max(1, min(_THREADS, usable_cores()))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._processes: ProcessPoolExecutor | None = None
        self._closed = False
        if processes:
            # Beside: requests that come before they have started are read by threads.
            start = threading.Thread(target=self._start, args=(processes,), daemon=True)
            start.start()

    def _start(self, count: int) -> None:
        # Not forked from this process, whose threads may hold any lock.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        pool = ProcessPoolExecutor(
            count, mp_context=context, initializer=_begin, initargs=(self._renderings,)
        )
        try:
            for done in [pool.submit(os.getpid) for _ in range(count)]:
                done.result()
        except (BrokenProcessPool, EOFError, OSError) as error:
            log.get_logger().warning("images are read by threads, not processes: %s", error)
            return
        self._processes = pool
        # The server may have been told to stop meanwhile.
        if self._closed:
            self.close()

    async def encode(
        self, name: str, turns: Sequence[Message], shown: Shown, asked: ChatRequest
    ) -> Prompt:
        """Encodes a request to the model of this name.

        Raises:
            ApiError: an image or video that cannot be read, or turns that training would refuse.
        """
        loop = asyncio.get_running_loop()
        rendering = self._renderings[name]
        pool: Executor | None = self._processes
        # Text alone is encoded in less time than it takes to send it.
        if pool is not None and shown:
            try:
                ids, begun, tiles = await loop.run_in_executor(
                    pool, _encode_there, name, turns, shown, asked
                )
                return Prompt(ids, None if tiles is None else torch.from_numpy(tiles), begun)
            except BrokenProcessPool:
                # Killed from outside, as by a machine without memory: threads go on.
                log.get_logger().warning("a process that reads images was killed: threads go on")
                self._processes = None
        return await loop.run_in_executor(
            self._threads, encode_request, rendering, turns, shown, asked
        )

    def close(self) -> None:
        """Ends threads and processes."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._processes is not None:
            self._processes.shutdown(wait=False, cancel_futures=True)


_OF_PROCESS: dict[str, Rendering] = {}
"""Renderings by name, in a process that reads."""


def _begin(renderings: Mapping[str, Rendering]) -> None:
    """Begins the life of a process that reads."""
    # A signal for the whole group is for the server, which answers what is under way first.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    end_with_parent()
    # As many processes as cores to use: their own threads would be in each other's way.
    torch.set_num_threads(1)
    _OF_PROCESS.update(renderings)


def _encode_there(
    name: str, turns: Sequence[Message], shown: Shown, asked: ChatRequest
) -> tuple[np.ndarray, tuple[int, ...], np.ndarray | None]:
    prompt = encode_request(_OF_PROCESS[name], turns, shown, asked)
    # As plain bytes: torch would hand them over in shared memory, which a container has little of.
    tiles = None if prompt.tiles is None else prompt.tiles.numpy()
    return prompt.input_ids, prompt.begun, tiles


def encode_request(
    rendering: Rendering, turns: Sequence[Message], shown: Shown, asked: ChatRequest
) -> Prompt:
    """Encodes a request to a prompt.

    Raises:
        ApiError: an image or video that cannot be read, or turns that training would refuse.
    """
    images = [content for medium, content in shown if medium.mark == IMAGE_MARK]
    videos = _videos(shown, asked)
    try:
        most = _max_tiles(rendering, shown, asked)
        request = Request(turns, images, videos, max_tiles=most)
        return encode(
            request,
            rendering.encoder,
            rendering.tiles,
            exif=rendering.exif,
            normalize=rendering.normalize,
        )
    # What training would refuse; there is no name of a request to show.
    except UserError as error:
        raise_undecodable((m.param, file) for m, file in shown if m.mark == IMAGE_MARK)
        raise ApiError(str(error).removeprefix("request: "), param="messages") from None


def _max_tiles(rendering: Rendering, shown: Shown, asked: ChatRequest) -> list[int] | None:
    """Returns the most tiles of each image; None if they share the model's, as in training."""
    limits = [
        medium.max_tiles or asked.max_dynamic_patch
        for medium, _ in shown
        if medium.mark == IMAGE_MARK
    ]
    if not any(limits):
        return None
    # One image with a limit of its own leaves the others the model's.
    return [limit or rendering.tiles.max for limit in limits]


def raise_undecodable(images: Iterable[tuple[str, bytes]]) -> None:
    """Raises ApiError for the first image, of (name, encoded), that cannot be decoded."""
    for name, content in images:
        try:
            as_rgb(content)
        except BadImage as error:
            raise ApiError(f"{name}: {error}", param=name, code="invalid_image") from None


def _videos(shown: Shown, asked: ChatRequest) -> list[list[Any]]:
    """Decodes the frames of a request's videos.

    Raises:
        ApiError: one that cannot be decoded, or frames of too many pixels together.
    """
    videos, pixels = [], 0
    for medium, content in shown:
        if medium.mark == IMAGE_MARK:
            continue
        with tempfile.TemporaryDirectory() as folder:
            # A file: PyAV seeks in it, and animations are known by their suffix.
            file = Path(folder) / f"video{_MAGIC.get(content[:4], '.mp4')}"
            file.write_bytes(content)
            num_frames = medium.num_frames or asked.num_frames or _NUM_FRAMES
            try:
                # Before one is decoded: a small file can hold huge frames.
                width, height = stored_frame_size(str(file))
                pixels += num_frames * width * height
                if pixels > VIDEO_PIXELS:
                    raise ApiError(
                        f"{medium.param}: {num_frames} frames of {width} x {height} pixels; those "
                        f"of a request may have {VIDEO_PIXELS:,} together; send a smaller video, "
                        "or fewer num_frames",
                        param=medium.param,
                        code="video_too_large",
                    )
                videos.append(read_video(file, num_frames))
            except BadImage as error:
                # The name of the temporary file tells nobody anything.
                reason = str(error).removeprefix("video: ").removeprefix(f"{file}: ")
                reason = f"{medium.param}: {reason.replace(str(file), 'the video')}"
                raise ApiError(reason, param=medium.param, code="invalid_video") from None
    return videos
