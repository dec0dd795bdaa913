"""Fetches the media of a request and encodes its prompt, in threads."""

import asyncio
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internvl.data.images import as_rgb, stored_size
from internvl.data.messages import IMAGE_MARK
from internvl.data.records import Message
from internvl.data.video import read_video
from internvl.errors import BadImage, ImageTooLarge, UserError
from internvl.inference.chat import Chat
from internvl.inference.requests import Prompt, Request, encode
from internvl.models import configs
from internvl.serve import media as web
from internvl.serve.chat_request import ChatRequest
from internvl.serve.errors import ApiError
from internvl.serve.messages import Medium
from internvl.serve.options import Limits

_FETCHING, _ENCODING = 32, 12
"""Threads that wait for hosts, and most threads that decode."""
_NUM_FRAMES = 8
_MAGIC = {b"GIF8": ".gif", b"RIFF": ".webp", b"\x89PNG": ".png"}
"""First bytes of an animation -> the suffix by which its reader knows it."""


class Fetcher:
    """Fetches images and videos by address."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = ThreadPoolExecutor(_FETCHING, thread_name_prefix="fetch")

    async def image(self, url: str, param: str) -> bytes:
        """Returns the bytes of an image, whose header has been checked.

        Raises:
            ApiError: not allowed, not reachable, no image, or too large.
        """
        content = await self._fetch(url, param, self.limits.image_bytes, self.limits.fetch_s)
        # Before it waits with others: a small file can be a huge image.
        check_pixels(content, param, self.limits)
        return content

    async def video(self, url: str, param: str) -> bytes:
        """Returns the bytes of a video. Raises ApiError."""
        return await self._fetch(url, param, self.limits.video_bytes, 3 * self.limits.fetch_s)

    async def _fetch(self, url: str, param: str, most: int, seconds: int) -> bytes:
        def work() -> bytes:
            return web.fetch(url, param, self.limits, most=most, seconds=seconds)

        task = asyncio.get_running_loop().run_in_executor(self.pool, work)
        try:
            # Names are looked up without a time-out of their own.
            return await asyncio.wait_for(task, seconds + 2)
        except TimeoutError:
            raise ApiError(f"{param}: it was not here in time", param=param) from None

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def check_pixels(content: bytes, param: str, limits: Limits) -> None:
    """Raises ApiError for bytes that are no image or decode to too many pixels."""
    try:
        width, height = stored_size(content)
    except ImageTooLarge:
        # Its own limit is above the server's, which is the one to keep to.
        raise ApiError(
            f"{param}: the image has more than {limits.image_pixels:,} pixels; send a smaller "
            "image",
            param=param,
            code="image_too_large",
        ) from None
    except BadImage as error:
        raise ApiError(f"{param}: {error}", param=param, code="invalid_image") from None
    if width * height > limits.image_pixels:
        raise ApiError(
            f"{param}: {width} x {height} pixels are more than {limits.image_pixels:,}; send a "
            "smaller image",
            param=param,
            code="image_too_large",
        )


class Prompts:
    """Encodes requests to prompts for one chat model."""

    def __init__(self, chat: Chat, fetcher: Fetcher) -> None:
        self.chat = chat
        self.encoder = chat.encoder
        self.fetcher = fetcher
        config = configs.chat_settings(chat.model.config)
        self.image_settings = {key: config[key] for key in ("exif", "normalize")}
        threads = max(1, min(_ENCODING, os.cpu_count() or 1))
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    async def read(
        self, turns: Sequence[Message], media: Sequence[Medium], asked: ChatRequest
    ) -> Prompt:
        """Fetches the media and encodes the prompt.

        Raises:
            ApiError: a medium that cannot be had or read, or turns that training would refuse.
        """
        # All at once: each waits for its host.
        contents = await asyncio.gather(*(self._fetch(medium) for medium in media))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self.pool, self._encode, turns, list(zip(media, contents, strict=True)), asked
        )

    async def _fetch(self, medium: Medium) -> bytes:
        if medium.mark == IMAGE_MARK:
            return await self.fetcher.image(medium.url, medium.param)
        return await self.fetcher.video(medium.url, medium.param)

    def _encode(
        self, turns: Sequence[Message], media: Sequence[tuple[Medium, bytes]], asked: ChatRequest
    ) -> Prompt:
        images = [content for medium, content in media if medium.mark == IMAGE_MARK]
        videos = [
            _frames(medium, content, asked.num_frames or _NUM_FRAMES)
            for medium, content in media
            if medium.mark != IMAGE_MARK
        ]
        try:
            request = Request(turns, images, videos, max_tiles=self._max_tiles(media, asked))
            return encode(request, self.encoder, self.chat.tiles, **self.image_settings)
        # What training would refuse; there is no name of a request to show.
        except UserError as error:
            _raise_undecodable(media)
            raise ApiError(str(error).removeprefix("request: "), param="messages") from None

    def _max_tiles(
        self, media: Sequence[tuple[Medium, bytes]], asked: ChatRequest
    ) -> list[int] | None:
        """Returns the most tiles of each image; None if they share the model's, as in training."""
        limits = [
            medium.max_tiles or asked.max_dynamic_patch
            for medium, _ in media
            if medium.mark == IMAGE_MARK
        ]
        if not any(limits):
            return None
        # One image with a limit of its own leaves the others the model's.
        return [limit or self.chat.tiles.max for limit in limits]

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def _raise_undecodable(media: Sequence[tuple[Medium, bytes]]) -> None:
    """Raises ApiError for the first image that cannot be decoded."""
    for medium, content in media:
        if medium.mark != IMAGE_MARK:
            continue
        try:
            as_rgb(content)
        except BadImage as error:
            raise ApiError(
                f"{medium.param}: {error}", param=medium.param, code="invalid_image"
            ) from None


def _frames(medium: Medium, content: bytes, num_frames: int) -> list[Any]:
    suffix = _MAGIC.get(content[:4], ".mp4")
    with tempfile.TemporaryDirectory() as folder:
        # A file: PyAV seeks in it, and animations are known by their suffix.
        file = Path(folder) / f"video{suffix}"
        file.write_bytes(content)
        try:
            return read_video(file, medium.num_frames or num_frames, medium.param)
        except BadImage as error:
            # The name of the temporary file tells nobody anything.
            reason = str(error).replace(str(file), "the video")
            raise ApiError(reason, param=medium.param, code="invalid_video") from None
