"""A chat completion's messages as turns with marks, rendered as in training.

Where the client writes no mark, a message's images come first, one a line, as the original's `chat`
puts them; only images that stand between texts keep their places, as content parts do in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internvl.data.messages import IMAGE_MARK, VIDEO_MARK, count_marks
from internvl.data.records import Message
from internvl.errors import counted
from internvl.serve.chat_request import MOST_TILES
from internvl.serve.errors import ApiError
from internvl.serve.fields import Field, Refused, as_it_is, choice, read_fields, text, whole_from
from internvl.serve.options import Limits

DETAILS = {"low": 6, "medium": 12, "high": 24}
"""OpenAI's `detail` -> most tiles, as LMDeploy has them; `auto` is the server's default."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_IMAGE = {
    "url": Field(text),
    "detail": Field(choice("auto", *DETAILS)),
    "max_dynamic_patch": Field(whole_from(1, MOST_TILES)),
}
_VIDEO = {"url": Field(text), "num_frames": Field(whole_from(1, 128))}
_EMPTY = Refused(([], {}, ""), "it is not rendered in training either; leave it out")
_MESSAGE_REFUSED = {
    **dict.fromkeys(("name", "tool_calls", "function_call", "audio", "refusal"), _EMPTY),
    **dict.fromkeys(("annotations", "reasoning_content", "reasoning", "tool_call_id"), _EMPTY),
}
_PART_REFUSED = {"uuid": Refused((), "nothing is cached"), "cache_control": _EMPTY}


_MESSAGE = {"role": Field(text), "content": Field(as_it_is)}


@dataclass(frozen=True)
class Medium:
    """An image or video of a message, not fetched yet."""

    mark: str
    url: str
    param: str
    """The field that names it."""
    max_tiles: int | None = None
    """Most tiles of the image; None: the server's default."""
    num_frames: int | None = None


def read_messages(messages: Any, limits: Limits, length: int) -> tuple[list[Message], list[Medium]]:
    """Parses messages to turns with all their marks, and lists the media of the marks in order.

    Args:
        length: most tokens of a prompt and its answer.

    Raises:
        ApiError: a message or content part that is wrong or not followed, or too many media.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages must be a list of at least one message", param="messages")
    # Before their tokens are counted, which takes seconds of such a request.
    if len(messages) > length:
        raise _endless(counted(len(messages), "message"), length)
    turns, media = [], []
    for index, entry in enumerate(messages):
        turn, shown = _read_message(f"messages[{index}]", entry)
        turns.append(turn)
        media += shown
    size = sum(len(turn.content) for turn in turns)
    if size > _TOKEN_SIZE * length:
        raise _endless(counted(size, "character"), length)
    for mark, most, noun in (
        (IMAGE_MARK, limits.max_images, "image"),
        (VIDEO_MARK, limits.max_videos, "video"),
    ):
        # Counted before one is fetched.
        count = sum(medium.mark == mark for medium in media)
        if count > most:
            raise ApiError(
                f"{counted(count, noun)} in the messages, and a request may have {most} "
                f"(--max-{noun}s); send fewer",
                param="messages",
                code=f"too_many_{noun}s",
            )
    return turns, media


_TOKEN_SIZE = 128
"""Characters of InternLM2's longest token, a run of spaces: no prompt's are as long on average."""


def _endless(what: str, length: int) -> ApiError:
    return ApiError(
        f"{what}, more than a prompt of {length:,} tokens can have; send fewer",
        param="messages",
        code="context_length_exceeded",
    )


def _read_message(name: str, entry: Any) -> tuple[Message, list[Medium]]:
    values = read_fields(entry, _MESSAGE, _MESSAGE_REFUSED, name)
    role = _ROLES.get(values["role"])
    if role is None:
        raise ApiError(
            f"{name}.role is {values['role']!r}; known are {', '.join(_ROLES)}",
            param=f"{name}.role",
        )
    content = values["content"]
    # A text is a content of one part.
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise ApiError(
            f"{name}.content must be a text or a list of content parts", param=f"{name}.content"
        )
    pieces = [_read_piece(f"{name}.content[{i}]", piece) for i, piece in enumerate(content)]
    media = [piece for piece in pieces if isinstance(piece, Medium)]
    # The model has no place for them elsewhere, and training refuses them too.
    if media and role != "user":
        raise ApiError(
            f"{media[0].param}: only messages from the user show images and videos",
            param=media[0].param,
        )
    # Marks in other turns are plain text, as in training.
    if role != "user":
        said = "".join(map(str, pieces))
        if role == "assistant" and not said:
            raise ApiError(f"{name} is an empty answer; leave it out", param=f"{name}.content")
        return Message(role, said), []
    return Message(role, _with_marks(name, pieces, media)), _in_order_of_marks(media)


def _read_piece(name: str, piece: Any) -> str | Medium:
    """Reads one content part: a text, or a medium."""
    piece_type = piece.get("type") if isinstance(piece, Mapping) else None
    rest = {"type": Field(text)}
    if piece_type == "text":
        values = read_fields(piece, rest | {"text": Field(text)}, _PART_REFUSED, name)
        if values["text"] is None:
            raise ApiError(f"{name}.text is missing", param=f"{name}.text")
        return str(values["text"])
    if piece_type not in ("image_url", "video_url"):
        raise ApiError(
            f"{name}.type is {piece_type!r}; known are text, image_url, video_url",
            param=f"{name}.type",
        )
    fields = _IMAGE if piece_type == "image_url" else _VIDEO
    values = read_fields(piece, rest | {piece_type: Field(as_it_is)}, _PART_REFUSED, name)
    inner = values[piece_type]
    # Some clients send the address alone.
    inner = {"url": inner} if isinstance(inner, str) else inner
    param = f"{name}.{piece_type}"
    values = read_fields(inner, fields, {}, param)
    if values["url"] is None:
        raise ApiError(f"{param}.url is missing", param=f"{param}.url")
    if piece_type == "video_url":
        return Medium(VIDEO_MARK, values["url"], param, num_frames=values["num_frames"])
    # The number is exact, the word a class: the number wins.
    max_tiles = values["max_dynamic_patch"] or DETAILS.get(values["detail"])
    return Medium(IMAGE_MARK, values["url"], param, max_tiles=max_tiles)


def _with_marks(name: str, pieces: Sequence[str | Medium], media: Sequence[Medium]) -> str:
    """Joins the content parts of a question to its text with a mark for every medium."""
    written = "".join(piece for piece in pieces if isinstance(piece, str))
    lines = ""
    for mark in (IMAGE_MARK, VIDEO_MARK):
        shown = sum(medium.mark == mark for medium in media)
        marks = count_marks(written, mark)
        # Here, not in the encoder: with several turns it could not say which is wrong.
        if marks not in (0, shown):
            noun = mark.strip("<>")
            raise ApiError(
                f"{name} has {counted(marks, f'{mark} mark')} in its text, and "
                f"{counted(shown, noun)}; write one mark where each {noun} belongs or none, and "
                f"\\{mark} where the word is meant",
                param=name,
            )
        if not marks:
            lines += f"{mark}\n" * shown
    # Several texts around images are written so on purpose.
    if lines and _between_texts(pieces) and not any(count_marks(written, m) for m in _MARKS):
        return "".join(p if isinstance(p, str) else f"{p.mark}\n" for p in pieces)
    return lines + written


_MARKS = (IMAGE_MARK, VIDEO_MARK)


def _between_texts(pieces: Sequence[str | Medium]) -> bool:
    """True if any medium stands after one text and before another."""
    # Line breaks beside an image are no text.
    is_text = [isinstance(piece, str) and bool(piece.strip()) for piece in pieces]
    return any(
        isinstance(piece, Medium) and any(is_text[:i]) and any(is_text[i:])
        for i, piece in enumerate(pieces)
    )


def _in_order_of_marks(media: Sequence[Medium]) -> list[Medium]:
    """Lists images, then videos: each has its own marks, which they fill in order."""
    return sorted(media, key=lambda medium: medium.mark != IMAGE_MARK)
