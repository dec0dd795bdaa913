"""Parses turns to messages and checks roles, order and image marks, in training and inference.

An unescaped mark in a question stands for an image or a video; `\\<image>` is the word. In answers
and system messages both are plain text, as in the original's `internvl2_5`.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from internvl.data.arguments import not_a_text
from internvl.data.images import read_data_address
from internvl.data.records import Message
from internvl.errors import BadImage, BadSample, counted

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"

Slot = tuple[str, Any]
"""(mark, the image or video of a content part, or None for the sample's next one)."""

OFFICIAL_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
ROLES = ("system", "user", "assistant")

_ESCAPED = re.compile(rf"\\({IMAGE_MARK}|{VIDEO_MARK})")
_UNESCAPED = {mark: re.compile(rf"(?<!\\){mark}") for mark in (IMAGE_MARK, VIDEO_MARK)}

_CHANGES_TRAINING = {"weight": (1, True), "loss": (1, True), "tool_calls": (), "function_call": ()}
"""Keys of a message that change what is trained, and the values that change nothing."""


def count_marks(text: str, mark: str) -> int:
    """Counts the unescaped marks of a question.

    >>> count_marks(r"<image> Is \\<image> a tag?", "<image>")
    1
    """
    return len(_UNESCAPED[mark].findall(text)) if mark in text else 0


def fill_marks(text: str, mark: str, fill: Callable[[], str]) -> str:
    """Replaces every unescaped mark of a question by what `fill` returns."""
    # A function as replacement: in a string, `sub` would expand backslashes.
    return _UNESCAPED[mark].sub(lambda _: fill(), text) if mark in text else text


def unescape(text: str) -> str:
    """Removes the backslash from escaped marks.

    >>> unescape(r"Is \\<image> a tag?")
    'Is <image> a tag?'
    """
    return _ESCAPED.sub(r"\1", text) if "\\" in text else text


def has_marks(messages: Sequence[Message], mark: str) -> bool:
    """True if any question of a conversation has the mark."""
    return any(count_marks(m.content, mark) for m in messages if m.role == "user")


def list_marks(messages: Sequence[Message]) -> list[str]:
    """Lists the unescaped image and video marks of the questions, in order."""
    return [mark for m in messages if m.role == "user" for mark, _ in _slots(m.content)]


def wrong_marks(messages: Sequence[Message], mark: str, num_media: int) -> str | None:
    """Returns problem and remedy if the questions do not have `num_media` marks, else None."""
    marks = sum(count_marks(m.content, mark) for m in messages if m.role == "user")
    if marks == num_media:
        return None
    noun = mark.strip("<>")
    remedy = f"write one mark where each {noun} belongs"
    # The original's files often have none: it puts a lone image first.
    if marks == 0 and num_media == 1:
        remedy += ", or set insert_image_mark: true for the source, which puts it first"
    # Too many usually means a question about HTML, which JSON escapes once more.
    if marks > num_media:
        remedy += f", and \\{mark} (in JSON \\\\{mark}) where the word is meant"
    counts = f"{counted(marks, f'{mark} mark')} in the questions, but {counted(num_media, noun)}"
    return f"{counts}; {remedy}"


def check_marks(name: str, messages: Sequence[Message], num_images: int) -> None:
    """Raises BadSample if marks and images differ in number, or a video mark is left."""
    # Videos have become frames, and their marks image marks, before this is called.
    reason = wrong_marks(messages, IMAGE_MARK, num_images) or wrong_marks(messages, VIDEO_MARK, 0)
    if reason is not None:
        raise BadSample(name, reason)


def from_official(name: str, turns: Any) -> tuple[Message, ...]:
    """Parses `conversations`: turns of `from` (human, gpt, system) and `value`.

    Raises:
        BadSample: not a list, an unknown role, or a value that is no text.
    """
    if not isinstance(turns, list):
        actual = "missing" if turns is None else f"a {type(turns).__name__}"
        raise BadSample(name, f"`conversations` must be a list of turns; it is {actual}")
    messages = []
    for turn_number, turn in enumerate(turns, start=1):
        role = OFFICIAL_ROLES[_role(name, turn_number, turn, "from", OFFICIAL_ROLES)]
        messages.append(Message(role, _text(name, turn_number, "value", turn.get("value"))))
    return tuple(messages)


def from_openai(
    name: str, turns: Any, *, strict: bool = False
) -> tuple[tuple[Message, ...], list[Slot]]:
    """Parses `messages`: turns of `role` and `content`, a text or a list of parts.

    An image part becomes `<image>` and a newline, a video part likewise.

    Args:
        turns: dicts, or `Message`.
        strict: refuse every unknown key with a value; False refuses only those that change what is
            trained.

    Returns:
        The messages, and the slots of all their marks in order.

    Raises:
        BadSample: not a list, an unknown role or part type, a media part outside a question, or a
            refused key.
    """
    # A text is a sequence too, of characters.
    if isinstance(turns, str | bytes | Mapping | Message) or not isinstance(turns, Sequence):
        reason = f"`messages` must be a list; it is a {type(turns).__name__}"
        raise BadSample(name, f'{reason}. Write [{{"role": "user", "content": …}}]')
    messages, slots = [], []
    for turn_number, turn in enumerate(turns, start=1):
        if isinstance(turn, Message):
            turn = {"role": turn.role, "content": turn.content}
        role = _role(name, turn_number, turn, "role", ROLES)
        _check_keys(name, turn_number, turn, strict)
        content = turn.get("content")
        if isinstance(content, list | tuple):
            parts = [_content_part(name, turn_number, role, entry) for entry in content]
            content = "".join(text for text, _ in parts)
            slots += [slot for _, part_slots in parts for slot in part_slots]
        elif role == "user" and isinstance(content, str):
            slots += _slots(content)
        messages.append(Message(role, _text(name, turn_number, "content", content)))
    return tuple(messages), slots


def in_order(slots: Sequence[Slot], mark: str, media: Sequence[Any]) -> list[Any]:
    """Lists the media of a sample in the order of their marks.

    A slot with a medium keeps it; the others take the next of `media`, the sample's list.
    """
    left = iter(media)
    placed = [
        next(left, None) if value is None else value
        for slot_mark, value in slots
        if slot_mark == mark
    ]
    # What no mark has taken follows, so that `check_marks` sees the difference and reports it.
    return [*(value for value in placed if value is not None), *left]


def check_order(name: str, messages: Sequence[Message], last: str) -> None:
    """Checks that questions and answers alternate, after an optional system message.

    Args:
        last: role of the last turn: "assistant" in training, "user" in inference.

    Raises:
        BadSample: it is empty, out of order, ends with the other role, or has an empty answer.
    """
    if not any(message.role != "system" for message in messages):
        raise BadSample(name, "the conversation is empty")
    if messages[-1].role != last and messages[-1].role != "system":
        ends = "a question; add the answer or remove it"
        if last == "user":
            ends = "an answer; add the question that is to be answered"
        raise BadSample(name, f"it ends with {ends}")
    for turn_number, (turn, following) in enumerate(pairwise(messages), start=1):
        # First, for a system turn between two questions would be called a missing answer.
        if following.role == "system":
            reason = f"turn {turn_number + 1} is from system; only the first turn may be"
            raise BadSample(name, reason)
        if turn.role == following.role:
            reason = f"turns {turn_number} and {turn_number + 1} are both from {turn.role}"
            raise BadSample(name, f"{reason}; questions and answers must alternate")
    for message in messages:
        if message.role == "assistant" and not message.content.strip():
            raise BadSample(name, "an answer is empty; write it or remove the sample")


def from_base64(name: str, address: str) -> bytes:
    """Decodes a `data:` address. Raises BadSample if it is not base64."""
    try:
        return read_data_address(address)
    except BadImage as bad:
        raise BadSample(name, str(bad)) from None


def _slots(text: str) -> Iterator[Slot]:
    """Yields a slot for every unescaped mark of a question, in order."""
    if IMAGE_MARK in text or VIDEO_MARK in text:
        for match in re.finditer(rf"(?<!\\)({IMAGE_MARK}|{VIDEO_MARK})", text):
            yield match[0], None


def _content_part(name: str, turn_number: int, role: str, part: Any) -> tuple[str, list[Slot]]:
    """Parses one part of a message to (text, its slots)."""
    part_type = part.get("type") if isinstance(part, Mapping) else None
    if part_type == "text" and isinstance(part.get("text"), str):
        return part["text"], list(_slots(part["text"])) if role == "user" else []
    for mark, word in ((IMAGE_MARK, "image"), (VIDEO_MARK, "video")):
        if part_type in (word, f"{word}_url"):
            if role != "user":
                reason = f"turn {turn_number} is from {role} and has a part of type {part_type!r}"
                raise BadSample(name, f"{reason}; only questions may")
            # Tables give every part every key, most of them None.
            keys = (word, f"{word}_url", "path", "url")
            value = next((part[key] for key in keys if part.get(key) is not None), None)
            # Two kinds of dictionaries: OpenAI's {"url": …}, and {"bytes": …, "path": …} of tables.
            inner = value.get("url", value) if isinstance(value, Mapping) else value
            return f"{mark}\n", [(mark, inner)]
    reason = f"turn {turn_number} has a part of type {part_type!r}"
    raise BadSample(name, f"{reason}; known: text, image, video")


def _role(name: str, turn_number: int, turn: Any, key: str, roles: Collection[str]) -> str:
    # The exact type first: `isinstance` of an abstract class is slow, and this runs for every turn.
    role = turn.get(key) if type(turn) is dict or isinstance(turn, Mapping) else None
    if isinstance(role, str) and role in roles:
        return role
    reason = f"turn {turn_number} is from {role!r}; known: {', '.join(roles)}"
    if not isinstance(turn, Mapping):
        reason += f"; it must be an object with the key `{key}`, not {type(turn).__name__}"
    elif key not in turn:
        reason += f"; it has no key `{key}`, but {', '.join(map(str, turn)) or 'none'}"
    raise BadSample(name, reason)


def _text(name: str, turn_number: int, key: str, text: Any) -> str:
    if isinstance(text, str) and text.isascii():  # cannot hold half a character
        return text
    if not isinstance(text, str):
        raise BadSample(name, f"turn {turn_number} has no text under `{key}`")
    reason = not_a_text(text)
    if reason is not None:
        raise BadSample(name, f"turn {turn_number} {reason}")
    return text


def _check_keys(name: str, turn_number: int, turn: Mapping[str, Any], strict: bool) -> None:
    """Refuses keys of a message that would be ignored but change its meaning."""
    if len(turn) <= 2 and "role" in turn and "content" in turn:
        return
    for key, value in turn.items():
        if key in ("role", "content") or value is None or value in ([], {}, ""):
            continue
        if key not in _CHANGES_TRAINING:
            if not strict:
                continue
        elif value in _CHANGES_TRAINING[key]:
            continue
        reason = f"turn {turn_number} has the key `{key}` ({value!r}), which would not be followed"
        raise BadSample(name, f"{reason}; remove it")
