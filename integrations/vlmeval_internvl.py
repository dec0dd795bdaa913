"""A model of VLMEvalKit: every InternVL chat model, run or adapter that `internvl.load` opens.

Put this file into `vlmeval/vlm/` of VLMEvalKit, and a line into its `vlmeval/config.py`:

    from vlmeval.vlm.vlmeval_internvl import InternVL
    supported_VLM["internvl-mine"] = partial(InternVL, model_path="runs/mine")

then `python run.py --model internvl-mine --data MMBench_DEV_EN --api-nproc 64`. VLMEvalKit asks one
question at a time but for APIs, which it asks from many threads; this model is one, and answers the
questions of all threads together.
"""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

from vlmeval.vlm.base import BaseModel

import internvl

_GATHER_S = 0.05
"""Time in which the questions of further threads are waited for, in seconds."""
_MOST = 256
"""Questions of one call of the model."""


class InternVL(BaseModel):
    """Answers the messages of VLMEvalKit; greedy."""

    INTERLEAVE = True
    allowed_types: ClassVar[list[str]] = ["text", "image", "video"]
    is_api = True

    def __init__(
        self,
        model_path: str,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        max_tiles: int | None = None,
        num_frames: int = 8,
        max_new_tokens: int = 1024,
        **settings: Any,
    ) -> None:
        """Loads the model.

        Args:
            model_path, device, dtype, device_map: see `internvl.load`.
            max_tiles: most tiles of the images of a question; by default the checkpoint's.
            num_frames: frames of a video.
            max_new_tokens, settings: of `Chat.answer`.
        """
        super().__init__()
        self.chat = internvl.load(model_path, device=device, dtype=dtype, device_map=device_map)
        self.max_tiles, self.num_frames = max_tiles, num_frames
        self.settings = {"max_new_tokens": max_new_tokens, **settings}
        self._questions: queue.SimpleQueue[tuple[internvl.Request, Future[str]]]
        self._questions = queue.SimpleQueue()
        # One thread has the model; VLMEvalKit's only wait.
        threading.Thread(target=self._answer_all, daemon=True).start()

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """Returns the answer to a message: parts with `type` and `value`."""
        return self.chat_inner([{"role": "user", "content": message}])

    def chat_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """Returns the answer to a conversation of several turns, the last from the user."""
        turns = [
            {"role": turn["role"], "content": [_part(part) for part in turn["content"]]}
            if turn["role"] == "user"
            else {
                "role": "assistant",
                "content": "".join(part["value"] for part in turn["content"]),
            }
            for turn in message
        ]
        question = internvl.Request(turns, num_frames=self.num_frames, max_tiles=self.max_tiles)
        answer: Future[str] = Future()
        self._questions.put((question, answer))
        return answer.result()

    def _answer_all(self) -> None:
        """Answers the questions that wait, as many as there are."""
        while True:
            waiting = [self._questions.get()]
            try:
                while len(waiting) < _MOST:
                    waiting.append(self._questions.get(timeout=_GATHER_S))
            except queue.Empty:
                pass
            self._answer(waiting)

    def _answer(self, waiting: Sequence[tuple[internvl.Request, Future[str]]]) -> None:
        try:
            texts = self.chat.answer([question for question, _ in waiting], **self.settings)
        except Exception as error:  # noqa: BLE001  # it is raised where the question was asked
            if len(waiting) == 1:
                waiting[0][1].set_exception(error)
                return
            # A broken image costs its own question.
            for pair in waiting:
                self._answer([pair])
            return
        for (_, answer), text in zip(waiting, texts, strict=True):
            answer.set_result(text)


def _part(part: dict[str, str]) -> dict[str, str]:
    """Returns a part of a message as `internvl.Request` takes it."""
    if part["type"] == "text":
        # In the text of a question <image> is a word.
        text = part["value"].replace("<image>", "\\<image>").replace("<video>", "\\<video>")
        return {"type": "text", "text": text}
    return {"type": part["type"], part["type"]: part["value"]}
