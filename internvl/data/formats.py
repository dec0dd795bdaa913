"""Rows of annotation files -> samples: official chat, OpenAI-style chat, captions, preferences.

A row is a JSON object; what is wrong with it is a BadSample that says so.
"""

import base64
import binascii
import sys
from typing import Any

from internvl.config import SourceConfig
from internvl.data.chat import IMAGE_MARK, VIDEO_MARK
from internvl.data.images import BadImage, FileSlice, Picture, join_inside
from internvl.data.records import BadSample, Message, Sample, Video

_OFFICIAL_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_ROLES = {role: role for role in ("system", "user", "assistant")}
_USED = {"conversations", "messages", "image", "images", "video", "videos", "clip"}


def chat(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """`conversations` with `image` or `video`, or `messages` with `images` or `videos`."""
    if "messages" in row and "conversations" not in row:
        messages, parts = _openai_messages(name, row["messages"])
    else:
        messages, parts = _official_messages(name, row.get("conversations")), []
    images = [*_listed(name, row, "image"), *_listed(name, row, "images")]
    images += [value for kind, value in parts if kind == IMAGE_MARK and value is not None]
    videos = [*_listed(name, row, "video"), *_listed(name, row, "videos")]
    videos += [value for kind, value in parts if kind == VIDEO_MARK and value is not None]
    if images and videos:
        raise BadSample(name, "it has images and videos; only one kind can be in a sample")
    start_s, end_s = _clip(name, row)
    sample = Sample(
        name,
        messages,
        tuple(_picture(name, image, config) for image in images),
        tuple(Video(_path(name, video, config), start_s, end_s) for video in videos),
        {key: value for key, value in row.items() if key not in _USED},
    )
    return _with_mark(sample) if config.insert_image_mark else sample


def caption(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """`image` and `caption`: the source's prompt is the question; without one there is only the
    answer, which is enough for a pair."""
    text = row.get("caption")
    if not isinstance(text, str) or not text.strip():
        raise BadSample(name, "the caption is empty; write it or remove the row")
    if not row.get("image"):
        raise BadSample(name, "no image is named")
    messages = [Message("assistant", text.strip())]
    if config.prompt is not None:
        messages.insert(0, Message("user", f"{IMAGE_MARK}\n{config.prompt}"))
    return Sample(name, tuple(messages), (_picture(name, row["image"], config),))


def sliced_caption(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """`caption` of a row that is ours, its `image` the fields of FileSlice."""
    return caption(name, {**row, "image": FileSlice(*row["image"])}, config)


def preference(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """`question, chosen, rejected`: the chosen answer is the sample's, the other one is kept."""
    for key in ("question", "chosen", "rejected"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise BadSample(name, f"`{key}` must be a text that is not empty")
    turns = [
        {"from": "human", "value": row["question"]},
        {"from": "gpt", "value": row["chosen"]},
    ]
    media: dict[str, Any] = {k: row[k] for k in ("image", "video", "clip") if k in row}
    sample = chat(name, {**media, "conversations": turns}, config)
    return Sample(
        name, sample.messages, sample.images, sample.videos, {"rejected": row["rejected"]}
    )


def table_row(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """A row of a table: chat columns, or an image and a `caption` or `text` column."""
    row = {key: value for key, value in row.items() if value is not None}
    if "conversations" in row or "messages" in row:
        return chat(name, row, config)
    if not row.keys() & {"caption", "text"}:
        found = ", ".join(row)
        raise BadSample(
            name, f"no column `conversations`, `messages` or `caption` (there are: {found})"
        )
    return caption(name, {"caption": row.get("caption", row.get("text")), **row}, config)


def shard_row(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """A sample of a webdataset tar: its pictures, and a JSON row or a caption."""
    slices = [FileSlice(*values) for values in row["slices"]]
    if row.get("row") is not None:
        if not isinstance(row["row"], dict):
            raise BadSample(name, "its .json is not an object")
        if "conversations" in row["row"] or "messages" in row["row"]:
            kept = {k: v for k, v in row["row"].items() if k not in ("image", "images")}
            return chat(name, {**kept, "images": slices}, config)
    text = (row.get("row") or {}).get("caption", row.get("caption"))
    if text is None:
        raise BadSample(name, "neither a conversation nor a caption in it")
    return caption(name, {"image": slices[0] if slices else None, "caption": text}, config)


def _official_messages(name: str, turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        found = "missing" if turns is None else f"a {type(turns).__name__}"
        raise BadSample(name, f"`conversations` must be a list of turns; it is {found}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        role = _role(name, number, turn, "from", _OFFICIAL_ROLES)
        if not isinstance(turn.get("value"), str):
            raise BadSample(name, f"turn {number} has no text under `value`")
        messages.append(Message(role, turn["value"]))
    return tuple(messages)


def _openai_messages(name: str, turns: Any) -> tuple[tuple[Message, ...], list[tuple[str, Any]]]:
    """The messages, and (mark, picture or None) of every part that is no text."""
    if not isinstance(turns, list):
        raise BadSample(name, f"`messages` must be a list; it is a {type(turns).__name__}")
    messages, parts = [], []
    for number, turn in enumerate(turns, start=1):
        role = _role(name, number, turn, "role", _ROLES)
        content = turn.get("content")
        if isinstance(content, list):
            read = [_part(name, number, part) for part in content]
            parts += [(mark, value) for mark, value, _ in read if mark]
            content = "".join(text for _, _, text in read)
        if not isinstance(content, str):
            raise BadSample(name, f"turn {number} has no text under `content`")
        messages.append(Message(role, content))
    return tuple(messages), parts


def _part(name: str, number: int, part: Any) -> tuple[str, Any, str]:
    """(mark or "", picture or None, text) of one part of a message."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "", None, part["text"]
    for mark, word in ((IMAGE_MARK, "image"), (VIDEO_MARK, "video")):
        if kind in (word, f"{word}_url"):
            value = part.get(word, part.get(f"{word}_url", part.get("path", part.get("url"))))
            return mark, value.get("url") if isinstance(value, dict) else value, f"{mark}\n"
    raise BadSample(name, f"turn {number} has a part of type {kind!r}; known: text, image, video")


def _role(name: str, number: int, turn: Any, key: str, roles: dict[str, str]) -> str:
    role = turn.get(key) if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in roles:
        raise BadSample(name, f"turn {number} is from {role!r}; known: {', '.join(roles)}")
    return roles[role]


def _listed(name: str, row: dict[str, Any], key: str) -> list[Any]:
    """The media under a key: one, a list, or none."""
    value = row.get(key)
    if value is None or value == "":
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str | bytes | dict | FileSlice) for v in values):
        said = f", not {value!r}" if isinstance(value, int | float) else ""
        raise BadSample(name, f"`{key}` must be a path or a list of paths{said}")
    return values


def _picture(name: str, value: Any, config: SourceConfig) -> Picture:
    """A path inside the source's folder, or encoded bytes (tables, data: addresses)."""
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    if isinstance(value, bytes | FileSlice):
        return value
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadSample(name, f"an image is not base64 ({error})") from None
    return _path(name, value, config)


def _path(name: str, value: Any, config: SourceConfig) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        raise BadSample(name, "an image or video has neither a path nor bytes")
    if "\0" in path:
        raise BadSample(name, f"the path {path!r} holds a NUL character; write the file's name")
    try:
        return join_inside(config.images, path)
    except BadImage as bad:
        raise BadSample(name, str(bad)) from None


def _clip(name: str, row: dict[str, Any]) -> tuple[float | None, float | None]:
    clip = row.get("clip")
    if clip is None:
        return None, None
    numbers = isinstance(clip, list) and all(isinstance(t, int | float) for t in clip)
    if not numbers or len(clip) != 2 or not 0 <= clip[0] < clip[1] <= sys.float_info.max:
        raise BadSample(name, f"`clip` must be [start, end] in seconds, not {clip!r}")
    return float(clip[0]), float(clip[1])


def _with_mark(sample: Sample) -> Sample:
    """The original's rule: a single image or video without a mark stands before the question."""
    media = len(sample.images) + len(sample.videos)
    mark = IMAGE_MARK if sample.images else VIDEO_MARK
    for index, message in enumerate(sample.messages):
        if message.role == "user":
            if media == 1 and mark not in message.content:
                marked = Message("user", f"{mark}\n{message.content}")
                messages = (*sample.messages[:index], marked, *sample.messages[index + 1 :])
                return Sample(sample.name, messages, sample.images, sample.videos, sample.extra)
            break
    return sample
