"""Encodes messages and tiles to `input_ids` and `labels` for training, or to a prompt.

One encoder for every template: labels come from the segments that produced the ids, never from
searching the text. Originals: the `preprocess_*` functions of
`internvl_chat/internvl/train/dataset.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from internvl.data.messages import (
    IMAGE_MARK,
    check_marks,
    check_order,
    fill_marks,
    unescape,
)
from internvl.data.records import IGNORE, Example, Message, Sample
from internvl.data.templates import Template
from internvl.errors import BadSample, counted

IMAGE_START, IMAGE_CONTEXT, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
_BLOCK = IMAGE_START + IMAGE_CONTEXT + IMAGE_END


class ChatEncoder:
    """Encodes conversations with one tokenizer and one template.

    Args:
        tokenizer: a `transformers` tokenizer that knows `<img>`, `<IMG_CONTEXT>`, `</img>`.
        template: the segments of text around turns.
        tokens_per_tile: visual tokens of a tile (K).
        system_message: default of conversations without a system turn; None takes the template's.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        tokens_per_tile: int,
        system_message: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.tokens_per_tile = tokens_per_tile
        self.system_message = template.system_message if system_message is None else system_message
        self.context_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        # From an empty text, not `bos_token`: a BOS for InternLM2 and Llama, nothing for Qwen.
        self.bos = list(tokenizer("").input_ids)

    @property
    def settings(self) -> tuple[Template, str, int]:
        """Settings that change the ids, besides the tokenizer."""
        return self.template, self.system_message, self.tokens_per_tile

    def encode(
        self, sample: Sample, tiles_per_image: Sequence[int], max_tokens: int | None = None
    ) -> Example:
        """Encodes a training example; answers and their end token are supervised.

        A sample longer than `max_tokens` is truncated at its end, as in the original, but not
        within an image and not before its first supervised token.

        Raises:
            BadSample: turns out of order, an empty or missing answer, marks that do not match the
                images, or nothing supervised within `max_tokens`.
        """
        # First: the errors below would blame the mark or the order, not the source.
        if sample.images and [m.role for m in sample.messages if m.role != "system"] == [
            "assistant"
        ]:
            reason = "no question before the caption; set its source's prompt"
            raise BadSample(sample.name, reason)
        messages = self.ordered(sample.name, sample.messages, last="assistant")
        check_marks(sample.name, messages, len(tiles_per_image))
        ids, labels = self._labelled(self._pieces(messages))
        row, supervised = self._expand(sample.name, ids, labels, tiles_per_image)
        if max_tokens is not None and len(row) > max_tokens:
            row, supervised = self._truncate(sample.name, row, supervised, max_tokens)
        if not (supervised != IGNORE).any():
            raise BadSample(sample.name, "no token of it is supervised; check its answers")
        return Example(sample.name, row, supervised, tuple(tiles_per_image))

    def prompt(
        self,
        messages: Sequence[Message],
        tiles_per_image: Sequence[int],
        name: str = "request",
        prefix: str = "",
    ) -> np.ndarray:
        """Encodes a conversation up to the answer to generate, or its `prefix`: int64 (T,)."""
        check_marks(name, messages, len(tiles_per_image))
        text = "".join(text for text, _ in self._pieces(messages)) + self.template.open + prefix
        row, _ = self._expand(name, self.bos + self._ids(text), None, tiles_per_image)
        return row

    def ordered(self, name: str, messages: Sequence[Message], last: str) -> Sequence[Message]:
        """Checks the order of turns as `check_order`; drops a leading answer if the template has
        none."""
        check_order(name, messages, last)
        head = int(messages[0].role == "system")
        # As the original does in training, for all templates but `internvl2_5`.
        if messages[head].role == "assistant" and not self.template.leading_answer:
            return [*messages[:head], *messages[head + 1 :]]
        return messages

    def _ids(self, text: str) -> list[int]:
        # Not verbose: transformers warns of texts above the tokenizer's `model_max_length`.
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _labelled(self, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Tokenizes the joined pieces: (ids, labels); a token is supervised if it starts in a
        supervised piece."""
        # At once, as all originals but one do, and as a prompt is: in pieces, a SentencePiece
        # tokenizer would put spaces where a release has none.
        text = "".join(text for text, _ in pieces)
        # One longer than the text: an empty token may start at its end.
        is_supervised = np.zeros(len(text) + 1, dtype=bool)
        start = 0
        for piece, supervised in pieces:
            is_supervised[start : start + len(piece)] = supervised
            start += len(piece)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        labels = [
            token if is_supervised[first] else IGNORE
            for token, (first, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
        ]
        return self.bos + encoded.input_ids, [IGNORE] * len(self.bos) + labels

    def _pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """Splits a conversation into (text, supervised), the system turn first."""
        template = self.template
        system = self.system_message
        if messages and messages[0].role == "system":
            system, messages = messages[0].content, messages[1:]
        pieces = [(template.system[0] + system + template.system[1], False)]
        for turn_number, message in enumerate(messages, start=1):
            content = message.content.strip() if template.strip else message.content
            if message.role == "user":
                # Only questions hold marks; in answers `<image>` is text, as in the original.
                content = unescape(fill_marks(content, IMAGE_MARK, lambda: _BLOCK))
                pieces.append((template.user[0] + content + template.user[1], False))
            else:
                inner = template.end_before_more if turn_number < len(messages) else ""
                answer = template.lead + content + (inner or template.end)
                pieces += [(template.assistant, False), (answer, True), (template.after, False)]
        return pieces

    def _expand(
        self,
        name: str,
        ids: list[int],
        labels: list[int] | None,
        tiles_per_image: Sequence[int],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Repeats every placeholder K x tiles times, labels alike: two int64 (T,)."""
        row = np.asarray(ids, dtype=np.int64)
        supervised = np.asarray(ids if labels is None else labels, dtype=np.int64)
        positions = np.flatnonzero(row == self.context_id)
        if len(positions) != len(tiles_per_image):
            placeholders = counted(len(positions), "image placeholder")
            raise BadSample(
                name,
                f"{placeholders} after tokenization, but {counted(len(tiles_per_image), 'image')}; "
                f"the text must not contain {IMAGE_CONTEXT}",
            )
        # After tokenization: thousands of placeholders in the text would only cost time.
        repeats = np.ones(len(row), dtype=np.int64)
        repeats[positions] = np.asarray(tiles_per_image, dtype=np.int64) * self.tokens_per_tile
        return np.repeat(row, repeats), np.repeat(supervised, repeats)

    def _truncate(
        self, name: str, row: np.ndarray, labels: np.ndarray, max_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        # The model needs all visual tokens of a tile, so an image is whole or the sample is bad.
        cut_image = (row[max_tokens:] == self.context_id).any()
        if cut_image or not (labels[:max_tokens] != IGNORE).any():
            lost = "part of an image" if cut_image else "every answer"
            raise BadSample(
                name,
                f"{len(row)} tokens; cutting it to data.max_tokens = {max_tokens} would lose "
                f"{lost}. Raise data.max_tokens or lower data.tiles.max (of a video "
                "data.video.max_frames)",
                {"data.max_tokens": len(row)},
            )
        return row[:max_tokens], labels[:max_tokens]


def spans(example: Example, encoder: ChatEncoder) -> Iterator[tuple[str, bool]]:
    """Yields (text, supervised) of an example's runs; a run of placeholders becomes its length."""
    ids, labels = example.input_ids, example.labels != IGNORE
    # 0 ignored, 1 supervised, 2 placeholder: a run ends where this changes.
    classes = np.where(ids == encoder.context_id, 2, labels.astype(np.int64))
    bounds = [0, *(np.flatnonzero(np.diff(classes)) + 1).tolist(), len(ids)]
    for start, end in pairwise(bounds):
        if classes[start] == 2:
            yield f"[{end - start} visual tokens]", False
        else:
            yield encoder.tokenizer.decode(ids[start:end].tolist()), bool(classes[start])


def marked(parts: Iterable[tuple[str, bool]]) -> str:
    """Formats spans as text: a bar before every line, ⟦brackets⟧ around supervised text."""
    text = "".join(f"⟦{text}⟧" if supervised else text for text, supervised in parts)
    return "\n".join("  | " + line for line in text.split("\n"))
