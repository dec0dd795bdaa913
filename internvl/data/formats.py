"""Parses rows of annotation files to samples: official and OpenAI chat, captions, preferences.

A row is a JSON object; every function raises BadSample that says what is wrong with it.
"""

from dataclasses import replace
from typing import Any

from internvl.config import SourceConfig
from internvl.data import preferences
from internvl.data.images import FileSlice, ImageRef, join_inside
from internvl.data.messages import (
    IMAGE_MARK,
    VIDEO_MARK,
    Slot,
    from_base64,
    from_official,
    from_openai,
    has_marks,
    in_order,
)
from internvl.data.records import Message, Sample, Video, check_clip
from internvl.errors import BadImage, BadSample

_USED = {"conversations", "messages", "image", "images", "video", "videos", "clip"}


def chat(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """Parses `conversations` with `image` or `video`, `messages` with `images` or `videos`, or a
    preference pair."""
    # Sources of a meta file have no type: the original's preference data are listed in one.
    if preferences.is_pair(row):
        return preference(name, row, config)
    return _conversation(name, row, config)


def _conversation(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    slots: list[Slot] = []
    if "messages" in row and "conversations" not in row:
        messages, slots = from_openai(name, row["messages"])
    else:
        if row.get("conversations") is None:
            keys = ", ".join(map(repr, row)) or "none"
            reason = f"`conversations` must be a list of turns; it is missing (its keys: {keys})"
            raise BadSample(name, reason)
        messages = from_official(name, row["conversations"])
    images = in_order(
        slots, IMAGE_MARK, [*_media(name, row, "image"), *_media(name, row, "images")]
    )
    videos = in_order(
        slots, VIDEO_MARK, [*_media(name, row, "video"), *_media(name, row, "videos")]
    )
    # The original would read the images and drop the videos silently.
    if images and videos:
        raise BadSample(name, "it has images and videos; only one kind can be in a sample")
    start_s, end_s = _clip(name, row)
    sample = Sample(
        name,
        messages,
        tuple(_image(name, image, config) for image in images),
        tuple(Video(_path(name, video, config), start_s, end_s) for video in videos),
        {key: value for key, value in row.items() if key not in _USED},
    )
    return _with_mark(sample) if config.insert_image_mark else sample


def caption(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """Parses `image` and `caption`; the source's prompt becomes the question."""
    text = row.get("caption")
    if not isinstance(text, str) or not text.strip():
        raise BadSample(name, "the caption is empty; write it or remove the row")
    if not row.get("image"):
        raise BadSample(name, "no image is named; write its name")
    # Without a prompt the answer stands alone: enough for a pair, an error in chat training.
    messages = [Message("assistant", text.strip())]
    if config.prompt is not None:
        messages.insert(0, Message("user", f"{IMAGE_MARK}\n{config.prompt}"))
    return Sample(name, tuple(messages), (_image(name, row["image"], config),))


def sliced_caption(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """Parses a caption row converted by us, whose `image` holds the fields of FileSlice."""
    return caption(name, {**row, "image": FileSlice(*row["image"])}, config)


def preference(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """Parses a preference pair of any form of preferences.py; the messages end with the chosen
    answer."""
    pair, rejected = preferences.as_chat(name, row)
    return replace(_conversation(name, pair, config), rejected=rejected)


def table_row(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """Parses a table row: chat columns, or an image and a `caption` or `text` column."""
    # A table gives every row every column; null stands for what JSON would leave out.
    row = {key: value for key, value in row.items() if value is not None}
    if "conversations" in row or "messages" in row or preferences.is_pair(row):
        return chat(name, row, config)
    if not row.keys() & {"caption", "text"}:
        columns = ", ".join(row)
        raise BadSample(
            name, f"no column `conversations`, `messages` or `caption` (there are: {columns})"
        )
    return caption(name, {"caption": row.get("caption", row.get("text")), **row}, config)


def shard_row(name: str, row: dict[str, Any], config: SourceConfig) -> Sample:
    """Parses a sample of a webdataset tar: its images, and a JSON row or a caption."""
    slices = [FileSlice(*values) for values in row["slices"]]
    if row.get("row") is not None:
        if not isinstance(row["row"], dict):
            raise BadSample(name, "its .json is not an object; write one")
        is_pair = preferences.is_pair(row["row"])
        if is_pair or "conversations" in row["row"] or "messages" in row["row"]:
            # Its own paths are those of before the tar was made.
            fields = {k: v for k, v in row["row"].items() if k not in ("image", "images")}
            return chat(name, {**fields, "images": slices}, config)
    text = (row.get("row") or {}).get("caption", row.get("caption"))
    if text is None:
        raise BadSample(name, "neither a conversation nor a caption in it; add one")
    return caption(name, {"image": slices[0] if slices else None, "caption": text}, config)


def _media(name: str, row: dict[str, Any], key: str) -> list[Any]:
    """Lists the media under a key, which may hold one, a list, or none."""
    value = row.get(key)
    # "" means no image, as in the original.
    if value is None or value == "":
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str | bytes | dict | FileSlice) for v in values):
        # Only a number is short for certain; other values may fill the screen.
        shown = f", not {value!r}" if isinstance(value, int | float) else ""
        raise BadSample(name, f"`{key}` must be a path or a list of paths{shown}")
    for index, path in enumerate(values):
        if isinstance(path, str) and not path.strip():
            field = f"{key}[{index}]" if isinstance(value, list) else key
            raise BadSample(name, f"`{field}` is an empty path; write the file's name or remove it")
    return values


def _image(name: str, value: Any, config: SourceConfig) -> ImageRef:
    """Returns a path inside the source's folder, or encoded bytes (tables, data: addresses)."""
    if isinstance(value, dict) and value.get("bytes") is not None:
        return value["bytes"]
    if isinstance(value, bytes | FileSlice):
        return value
    if isinstance(value, str) and value.startswith("data:"):
        return from_base64(name, value)
    return _path(name, value, config)


def _path(name: str, value: Any, config: SourceConfig) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        raise BadSample(name, "an image or video has neither a path nor bytes; write one")
    # Python's `open` would raise a ValueError that names neither sample nor remedy.
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
    try:
        check_clip(clip)
    except BadImage as bad:
        raise BadSample(name, str(bad)) from None
    return float(clip[0]), float(clip[1])


def _with_mark(sample: Sample) -> Sample:
    """Puts the mark of a single image or video before the first question if no question has one."""
    mark = IMAGE_MARK if sample.images else VIDEO_MARK
    # The original looks at the first question only, and takes a mark in a later one for a word.
    if len(sample.images) + len(sample.videos) != 1 or has_marks(sample.messages, mark):
        return sample
    for index, message in enumerate(sample.messages):
        if message.role == "user":
            marked = Message("user", f"{mark}\n{message.content}")
            messages = (*sample.messages[:index], marked, *sample.messages[index + 1 :])
            return replace(sample, messages=messages)
    return sample
