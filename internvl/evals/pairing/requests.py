"""The requests to the model: a question several times, or the beginning of an answer."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from internvl.data.images import as_rgb
from internvl.data.messages import IMAGE_MARK, VIDEO_MARK, count_marks, fill_marks
from internvl.data.records import Message
from internvl.data.video import read_video
from internvl.evals import asking
from internvl.evals.pairing.forms import form
from internvl.evals.pairing.options import PairOptions
from internvl.evals.pairing.plans import Plan
from internvl.evals.pairing.questions import Question
from internvl.inference.chat import Chat
from internvl.inference.requests import Request
from internvl.models import configs


class Asker:
    """Makes the requests; index -> question and sample."""

    def __init__(self, chat: Chat, options: PairOptions, asks: Sequence[tuple[Plan, int]]) -> None:
        self.chat = chat
        self.options = options
        self.asks = asks
        self.most = asking.tiling(chat, options.tiles or "checkpoint", chat.tiles.max).most
        self._opened: tuple[str, list[Any], list[Any]] | None = None

    def key(self, weights: Any) -> str:
        """Returns a hash of all that decides the answers; `weights` tells the model's apart."""
        options = self.options
        asked = [(plan.question.key, plan.prefix, sample) for plan, sample in self.asks]
        samples = (plan.question.sample for plan, _ in self.asks)
        images = asking.key_of_images(image for sample in samples for image in sample.media)
        form_name = options.form
        precision = str(self.chat.model.dtype)
        settings = options.settings()
        return asking.key_of(
            asked, images, weights, precision, settings, self.most, form_name, options.frames,
            options.seed,
        )  # fmt: skip

    def question(self, index: int) -> asking.Question:
        """Decodes images and frames of a request. Raises BadImage."""
        plan, sample = self.asks[index]
        messages = _asked_messages(plan, self.options)
        # Of the question, not of its line: rows may be added and moved.
        seed = seed_of(self.options.seed, plan.question.key, sample)
        images, videos = ([], []) if plan.rule is None else self._media(plan.question)
        request = Request(
            messages, images, videos, self.options.frames, self.most, prefix=plan.prefix
        )
        return asking.Question(messages[-1].content, request, seed)

    def _media(self, question: Question) -> tuple[list[Any], list[Any]]:
        # The answers of a question follow each other: its images are decoded once.
        if self._opened is None or self._opened[0] != question.name:
            exif = configs.chat_settings(self.chat.model.config)["exif"]
            sample = question.sample
            images = [as_rgb(image, exif) for image in sample.images]
            videos = [
                read_video(video, self.options.frames, question.name, exif)
                for video in sample.videos
            ]
            self._opened = (question.name, images, videos)
        return self._opened[1], self._opened[2]


def _asked_messages(plan: Plan, options: PairOptions) -> list[Message]:
    """Returns the turns that the model gets."""
    messages = list(plan.question.sample.messages[:-1])
    if plan.rule is not None:
        messages[-1] = Message("user", form(options.form).asked(plan.question.text))
        return messages
    return [
        Message(message.role, _without_marks(message.content))
        if message.role == "user"
        else message
        for message in messages
    ]


def _without_marks(text: str) -> str:
    # As the original, which leaves the words around a mark; white space only goes with a mark.
    for mark in (IMAGE_MARK, VIDEO_MARK):
        if count_marks(text, mark):
            text = fill_marks(text, mark, lambda: "").strip()
    return text


def seed_of(seed: int, key: str, sample: int) -> int:
    # Hashed: seeds that follow each other may give generators that resemble each other.
    digest = blake2b(f"{seed} {key} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
