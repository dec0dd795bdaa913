"""Fetches the media of a request, in threads, and has its prompt encoded."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from internvl.data.images import stored_size
from internvl.data.messages import IMAGE_MARK
from internvl.data.records import Message
from internvl.errors import BadImage, ImageTooLarge
from internvl.inference.requests import Prompt
from internvl.serve import media as web
from internvl.serve.chat_request import ChatRequest
from internvl.serve.encoding import Readers
from internvl.serve.errors import ApiError
from internvl.serve.messages import Medium
from internvl.serve.options import Limits

FETCHING = 32
"""Threads that wait for hosts."""


class Fetcher:
    """Fetches images and videos by address."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = ThreadPoolExecutor(FETCHING, thread_name_prefix="fetch")

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
    """Encodes requests to prompts for one name of a chat model."""

    def __init__(self, name: str, fetcher: Fetcher, readers: Readers) -> None:
        self.name = name
        self.fetcher = fetcher
        self.readers = readers

    async def read(
        self, turns: Sequence[Message], media: Sequence[Medium], asked: ChatRequest
    ) -> Prompt:
        """Fetches the media and encodes the prompt.

        Raises:
            ApiError: a medium that cannot be had or read, or turns that training would refuse.
        """
        # All at once: each waits for its host.
        contents = await asyncio.gather(*(self._fetch(medium) for medium in media))
        pairs = list(zip(media, contents, strict=True))
        return await self.readers.encode(self.name, turns, pairs, asked)

    async def _fetch(self, medium: Medium) -> bytes:
        # A video's header cannot be checked before it is a file.
        if medium.mark == IMAGE_MARK:
            return await self.fetcher.image(medium.url, medium.param)
        return await self.fetcher.video(medium.url, medium.param)
