"""A conversation with a chat model: keeps the turns, images and videos between questions."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from internvl.data.arguments import list_images
from internvl.data.images import as_rgb, rgb_at
from internvl.data.records import Message
from internvl.data.video import read_video
from internvl.errors import UserError, counted
from internvl.inference.generate import Settings
from internvl.inference.requests import Request, list_videos, with_marks

# For annotations only: `Chat.conversation` makes them, so chat.py comes above.
if TYPE_CHECKING:
    from internvl.inference.chat import Chat

Turns = Iterable[tuple[str, str] | Mapping[str, Any] | Message]
"""Earlier turns: pairs (question, answer), as the original's `history`, or messages."""


def list_turns(history: Any) -> list[dict[str, str]]:
    """Lists earlier turns as messages.

    Raises:
        UserError: neither pairs of texts nor messages.
    """
    turns: list[dict[str, str]] = []
    # None is the original's empty history.
    for turn in () if history is None else history:
        if isinstance(turn, Message):
            turns.append({"role": turn.role, "content": turn.content})
        elif isinstance(turn, Mapping):
            turns.append(dict(turn))
        elif isinstance(turn, tuple | list) and len(turn) == 2:
            question, answer = turn
            turns += _messages(question, answer)
        else:
            raise UserError(
                f"history holds a {type(turn).__name__} ({str(turn)[:40]}); it is a list of "
                "(question, answer) or of messages"
            )
    return turns


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class _Asked(NamedTuple):
    """A question with its marks, images and videos."""

    question: str
    images: list[Any]
    videos: list[list[Any]]


class Conversation:
    """A conversation with a chat model.

    Images and videos go with the next question that is answered. A question that cannot be answered
    raises and changes nothing.

    Args:
        chat: the model.
        images: one or several, for the first question.
        videos: likewise.
        num_frames: frames taken from each video.
        max_tiles: most tiles of all images together; None: the checkpoint's.
        system: system message; None takes the checkpoint's.
        settings: of every answer, as `Chat.answer` takes them.

    Raises:
        BadImage: a video cannot be read.
        UserError: an unknown setting, or a value out of range.
    """

    def __init__(
        self,
        chat: "Chat",
        images: Any = (),
        *,
        videos: Any = (),
        num_frames: int = 8,
        max_tiles: int | None = None,
        system: str | None = None,
        **settings: Any,
    ) -> None:
        Settings.from_kwargs(**settings)  # for its errors, before any question
        self.chat = chat
        self.settings = settings
        self.num_frames = num_frames
        self.max_tiles = max_tiles
        self.system = system
        Request("", num_frames=num_frames, max_tiles=max_tiles)  # for its errors
        self._first_images = [] if images is None else list_images(images)
        # Read once, not for every question.
        self._first_videos = [self._frames(video) for video in list_videos(videos)]
        self.reset()

    def reset(self) -> None:
        """Forgets all turns, and the images and videos that came after the first ones."""
        self._turns: list[dict[str, str]] = []
        self._images: list[Any] = []
        self._videos: list[list[Any]] = []
        self._next_images = list(self._first_images)
        self._next_videos = list(self._first_videos)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Answered turns, the system message first if the conversation has its own."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self._turns]

    @property
    def history(self) -> list[tuple[str, str]]:
        """Pairs (question, answer), marks included: the original's `history`."""
        texts = [turn["content"] for turn in self._turns]
        return list(zip(texts[::2], texts[1::2], strict=True))

    @property
    def images(self) -> list[Any]:
        """Images of the answered questions, in the order of their marks."""
        return list(self._images)

    def add_images(self, images: Any) -> None:
        """Adds one or several images to the next question.

        Raises:
            BadImage: one cannot be read.
        """
        new_images = list_images(images)
        # For their errors alone: the model reads them again, in its own way.
        if len(new_images) == 1:
            as_rgb(new_images[0])
        else:
            for index, image in enumerate(new_images):
                rgb_at(f"image {index}", image)
        self._next_images += new_images

    def add_videos(self, videos: Any) -> None:
        """Adds one or several videos to the next question.

        Raises:
            BadImage: one cannot be read.
        """
        self._next_videos += [self._frames(video) for video in list_videos(videos)]

    def ask(self, question: str, images: Any = (), *, videos: Any = (), **settings: Any) -> str:
        """Answers a question; the answer and the turns before it stay for the next one.

        An empty answer is returned, but not kept: training has none.

        Args:
            images: added to this question.
            settings: of this answer alone, over those of the conversation.

        Raises:
            BadImage, BadSample, UserError: as `Chat.answer`.
        """
        request, asked = self._request(question, images, videos)
        (answer,) = self.chat.answer([request], **self.settings | settings)
        self._keep(asked, answer)
        return answer

    def stream(
        self, question: str, images: Any = (), *, videos: Any = (), **settings: Any
    ) -> Generator[str, None, None]:
        """Yields the pieces of an answer while it is generated; otherwise as `ask`.

        If the iterator is closed early, the answer so far is kept.
        """
        request, asked = self._request(question, images, videos)
        pieces = self.chat.stream(request, **self.settings | settings)
        return self._kept_pieces(asked, pieces)

    def _kept_pieces(
        self, asked: _Asked, pieces: Generator[str, None, None]
    ) -> Generator[str, None, None]:
        answer = ""
        try:
            with closing(pieces):
                for piece in pieces:
                    answer += piece
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            # The reader has seen this text, and may ask about it.
            self._keep(asked, answer.strip())
            raise
        self._keep(asked, answer)

    def _request(self, question: str, images: Any, videos: Any) -> tuple[Request, _Asked]:
        """Returns (the request of the whole conversation, what is new in it)."""
        new_images = [*self._next_images, *(() if images is None else list_images(images))]
        new_videos = [*self._next_videos, *(self._frames(video) for video in list_videos(videos))]
        # Here, not by `encode`: marks of earlier questions would pass for this one's.
        if isinstance(question, str):
            message = Message("user", question)
            question = with_marks([message], len(new_images), len(new_videos))[0].content
        request = Request(
            [*self.messages, {"role": "user", "content": question}],
            [*self._images, *new_images],
            [*self._videos, *new_videos],
            max_tiles=self.max_tiles,
        )
        return request, _Asked(question, new_images, new_videos)

    def _keep(self, asked: _Asked, answer: str) -> None:
        """Appends an answered question with its images and videos to the conversation."""
        # A conversation with an empty answer is refused as a request.
        if not answer.strip():
            return
        self._turns += _messages(asked.question, answer)
        self._images += asked.images
        self._videos += asked.videos
        self._next_images, self._next_videos = [], []

    def _frames(self, video: Any) -> list[Any]:
        return read_video(video, self.num_frames)

    def __repr__(self) -> str:
        images, videos = counted(len(self._images), "image"), counted(len(self._videos), "video")
        answers = counted(len(self.history), "answer")
        return f"<Conversation with {self.chat.folder}: {answers}, {images}, {videos}>"
