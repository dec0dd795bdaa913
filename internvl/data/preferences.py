"""Parses rows of preference pairs, in the forms of the original, ms-swift, LLaMA-Factory and TRL.

    original        question, chosen, rejected
    ms-swift        messages (the last one is the chosen answer), rejected_response
    LLaMA-Factory   conversations or instruction, chosen, rejected
    TRL             prompt, chosen, rejected; or chosen and rejected with the prompt in both

Whatever the form, `as_chat` makes the chat row that ends with the chosen answer.
"""

from collections.abc import Mapping
from typing import Any

from internvl.data.messages import IMAGE_MARK, OFFICIAL_ROLES, count_marks
from internvl.data.records import Message
from internvl.errors import BadSample

_MEDIA = ("image", "images", "video", "videos", "clip")
_QUESTIONS = ("conversations", "messages", "prompt", "question", "instruction")
"""Keys that may hold what comes before the answers, the first that is there."""
_REJECTED = ("rejected", "rejected_response", "rejected_messages")
_NOT_FOLLOWED = ("rejected_images", "rejected_videos", "chosen_images", "tools")

Turns = list[Any]
"""Messages of a role and a content, as `messages.from_openai` takes them."""


def is_pair(row: Mapping[str, Any]) -> bool:
    """Returns True for a row with two answers, False for a conversation beside other keys."""
    if not any(row.get(key) is not None for key in _REJECTED):
        return False
    turns = row.get("conversations") or row.get("messages")
    # A conversation that ends with its answer may have keys of any name besides.
    return not _ends_with_answer(turns) or "rejected" not in row


def as_chat(name: str, row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns (a row of `messages` and media that ends with the chosen answer, rejected answer).

    Raises:
        BadSample: an answer is missing or empty, both are equal, or the form is unknown.
    """
    # Silently left out, a pair would be compared on another image than its author meant.
    ignored = [key for key in _NOT_FOLLOWED if row.get(key)]
    if ignored:
        raise BadSample(name, f"the key `{ignored[0]}` would not be followed; remove it")
    turns, is_prompt = _question(name, row)
    chosen_key = next((key for key in ("chosen", "chosen_response") if key in row), None)
    rejected_key = next((key for key in _REJECTED if row.get(key) is not None), "rejected")
    if chosen_key is None and _ends_with_answer(turns):
        turns, last = turns[:-1], turns[-1]
        chosen = _answer(name, "messages", last)
    else:
        if _ends_with_answer(turns):
            reason = f"its conversation ends with an answer, and `{chosen_key}` is another"
            raise BadSample(name, f"{reason}; remove one of the two")
        chosen = _answer(name, chosen_key or "chosen", row.get(chosen_key or "chosen"))
    rejected = _answer(name, rejected_key, row.get(rejected_key))
    if chosen.strip() == rejected.strip():
        raise BadSample(name, "its chosen and rejected answers are equal; change or remove one")
    media = {key: row[key] for key in _MEDIA if row.get(key) is not None}
    # In the other forms a missing mark is a mistake, which the encoder names.
    if is_prompt:
        turns = _with_marks(turns, media)
    return {**media, "messages": [*turns, Message("assistant", chosen)]}, rejected


def _question(name: str, row: Mapping[str, Any]) -> tuple[Turns, bool]:
    """Returns (turns before the answers, True for TRL's form, which needs no marks)."""
    key = next((key for key in _QUESTIONS if row.get(key) is not None), None)
    if key is None:
        return _common_turns(name, row), True
    value = row[key]
    if isinstance(value, list):
        turns = [_message(turn) for turn in value]
        return _with_system(row, turns), key == "prompt"
    if not isinstance(value, str) or not value.strip():
        raise BadSample(name, f"`{key}` must be a text that is not empty, or a list of turns")
    # Alpaca rows: the task, and what it is about in a key of its own.
    text = f"{value}\n{row['input']}" if key == "instruction" and row.get("input") else value
    turns = []
    for pair in row.get("history") or [] if key == "instruction" else []:
        turns += [Message("user", str(pair[0])), Message("assistant", str(pair[1]))]
    return _with_system(row, [*turns, Message("user", text)]), key == "prompt"


def _with_system(row: Mapping[str, Any], turns: Turns) -> Turns:
    system = row.get("system")
    return [Message("system", system), *turns] if isinstance(system, str) and system else turns


def _common_turns(name: str, row: Mapping[str, Any]) -> Turns:
    """Returns the turns with which both answers begin, in TRL's form without a prompt."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        keys = ", ".join(row) or "none"
        raise BadSample(name, f"`question` must be a text that is not empty; its keys are {keys}")
    common = 0
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if ours != theirs:
            break
        common += 1
    if common != len(chosen) - 1 or common != len(rejected) - 1:
        reason = "its chosen and rejected conversations differ before the last answer"
        raise BadSample(name, f"{reason}; write the turns that both have under `prompt`")
    return [_message(turn) for turn in chosen[:-1]]


def _message(turn: Any) -> Any:
    """Returns a turn of `from` and `value` as one of `role` and `content`; others as they are."""
    if not isinstance(turn, Mapping) or "from" not in turn or "role" in turn:
        return turn
    return {"role": OFFICIAL_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}


def _ends_with_answer(turns: Any) -> bool:
    if not isinstance(turns, list) or not turns:
        return False
    return _role(_message(turns[-1])) == "assistant"


def _answer(name: str, key: str, value: Any) -> str:
    """Returns the text of an answer: a text, a turn, or a list of turns of which it is the last."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = _content(_message(value))
        # TRL's content of parts.
        if isinstance(value, list):
            value = "".join(
                entry.get("text") or "" for entry in value if isinstance(entry, Mapping)
            )
    if not isinstance(value, str) or not value.strip():
        raise BadSample(name, f"`{key}` must be a text that is not empty")
    return value


def _with_marks(turns: Turns, media: Mapping[str, Any]) -> Turns:
    """Puts the images before the first question if no question has marks, as TRL does."""
    images = media.get("images", media.get("image"))
    num_images = len(images) if isinstance(images, list) else int(images is not None)
    first = next((i for i, t in enumerate(turns) if _role(t) == "user"), None)
    if not num_images or first is None or any(map(_has_mark, turns)):
        return turns
    content = _content(turns[first])
    marks = f"{IMAGE_MARK}\n" * num_images
    # In front of a list of parts as well, which is TRL's other form of a content.
    marked: Any = [{"type": "text", "text": marks}, *content] if isinstance(content, list) else None
    if isinstance(content, str):
        marked = marks + content
    return [*turns[:first], {"role": "user", "content": marked}, *turns[first + 1 :]]


def _role(turn: Any) -> Any:
    if isinstance(turn, Message):
        return turn.role
    return turn.get("role") if isinstance(turn, Mapping) else None


def _content(turn: Any) -> Any:
    if isinstance(turn, Message):
        return turn.content
    return turn.get("content") if isinstance(turn, Mapping) else None


def _has_mark(turn: Any) -> bool:
    content = _content(turn)
    if isinstance(content, list):
        types = [entry.get("type") for entry in content if isinstance(entry, Mapping)]
        return "image" in types or "image_url" in types
    return isinstance(content, str) and count_marks(content, IMAGE_MARK) > 0
