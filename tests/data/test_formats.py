"""One line of each format becomes a sample, or a sentence."""

import base64
import json

import pytest
from data_files import chat_line, picture, turns, write_lines
from source_samples import good, opened, says

from internvl.data.records import Message, Video


def openai(content, **keys):
    answer = {"role": "assistant", "content": "Yes."}
    return {**keys, "messages": [{"role": "user", "content": content}, answer]}


def test_openai_chat(tmp_path):
    data = picture(tmp_path / "a.png", (8, 8)).read_bytes()
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    rows = [
        openai("<image>\nWhat?", images=["a.png"]),
        openai("<video>\nWhat?", videos=["a.mp4"]),
        openai([{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]),
        openai([{"type": "image_url", "image_url": {"url": address}}]),
        openai([{"type": "image"}, {"type": "text", "text": "What?"}], images=["a.png"]),
    ]
    source = opened(write_lines(tmp_path / "x.jsonl", rows), images=str(tmp_path))
    marks, video, parts, inline, separate = good(source)
    assert marks.images == parts.images == separate.images == (str(tmp_path / "a.png"),)
    assert video.videos == (Video(str(tmp_path / "a.mp4")),)
    assert parts.messages[0] == separate.messages[0] == Message("user", "<image>\nWhat?")
    assert inline.images == (data,)


CHAT_PROBLEMS = [
    (b"", "the line is blank"),
    (b"{", "not JSON"),
    (b"[1]", "a JSON object is expected, not list"),
    (b"\xff\xfe", "not UTF-8"),
    ({"image": "a.jpg"}, "`conversations` must be a list of turns; it is missing"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "from 'robot'; known: human, gpt"),
    ({"conversations": [{"from": "human"}]}, "turn 1 has no text under `value`"),
    ({"conversations": [5]}, "turn 1 is from None"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "from 'tool'; known: system, user"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of type 'audio'"),
    (chat_line("x", "y", image=3), "`image` must be a path"),
    (chat_line("x", "y", image="../a.jpg"), "leaves the image folder"),
    (
        chat_line("x", "y", image="https://h.org/a.jpg"),
        "https://h.org/a.jpg is an address, and files are named from the image folder '.' on; "
        "download it there and write its path",
    ),
    (chat_line("x", "y", image="file:///d/a.jpg"), "write its path without `file://`"),
    (chat_line("x", "y", video="s3://d/a.mp4"), "s3://d/a.mp4 is an address, and files are"),
    (chat_line("x", "y", image=["a.jpg", " "]), "`image[1]` is an empty path; write the file's"),
    (chat_line("x", "y", image="  "), "`image` is an empty path; write the file's name or remove"),
    (
        json.dumps(chat_line("x", "y")).encode() + b",",
        "not JSON (a comma stands after it; JSON Lines has none between lines, remove it)",
    ),
    (chat_line("x", "y", image="a.jpg", video="b.mp4"), "images and videos"),
    (chat_line("x", "y", video="b.mp4", clip=[3, 1]), "`clip` must be [start, end] in seconds"),
    (openai([{"type": "image", "image": "data:image/png;base64,?"}]), "is not base64"),
]


@pytest.mark.parametrize(("row", "problem"), CHAT_PROBLEMS)
def test_bad_lines(row, problem, tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line("a", "b"), row])
    assert problem in says(opened(file), 1)
    assert f"{file} line 2: " in says(opened(file), 1)


def test_a_mark_is_put_only_where_the_source_says_so(tmp_path):
    rows = [chat_line("What?", "A.", image="a.jpg"), chat_line("What?", "A.", video="a.mp4")]
    file = write_lines(tmp_path / "x.jsonl", rows)
    plain, _ = good(opened(file))
    assert plain.messages[0].content == "What?"
    image, video = good(opened(file, insert_image_mark=True))
    assert image.messages[0].content == "<image>\nWhat?"
    assert video.messages[0].content == "<video>\nWhat?"


@pytest.mark.parametrize(
    ("questions", "keys", "marked"),
    [
        (["Hello", "<image>\nWhat?"], {"image": "a.jpg"}, None),  # it has one, in a later question
        (["Hello", "<video>\nWhat?"], {"video": "a.mp4"}, None),
        (["Hello", "And?"], {"image": "a.jpg"}, "<image>\nHello"),
        (["Hello", "And?"], {"image": ["a.jpg"]}, "<image>\nHello"),
        ([r"Is \<image> a tag?", "And?"], {"image": "a.jpg"}, "<image>\n" + r"Is \<image> a tag?"),
        (["Hello", "<image>"], {"video": "a.mp4"}, "<video>\nHello"),
        (["Hello", "And?"], {"image": ["a.jpg", "b.jpg"]}, None),
        (["Hello", "And?"], {}, None),
    ],
)
def test_a_mark_is_put_only_where_no_question_has_one(questions, keys, marked, tmp_path):
    texts = [questions[0], "An answer with <image>.", questions[1], "Yes."]
    row = {**chat_line(*texts[:2]), "conversations": turns(*texts), **keys}
    row["conversations"].insert(0, {"from": "system", "value": "Be <image> short."})
    file = write_lines(tmp_path / "x.jsonl", [row])
    (plain,) = good(opened(file))
    (found,) = good(opened(file, insert_image_mark=True))
    assert found.messages[1].content == (marked or questions[0])
    assert [*found.messages[:1], *found.messages[2:]] == [*plain.messages[:1], *plain.messages[2:]]


def test_preferences(tmp_path):
    row = {"image": "a.jpg", "question": "<image>\nWhat?", "chosen": "A cat.", "rejected": "No."}
    file = write_lines(tmp_path / "x.jsonl", [row, {**row, "chosen": ""}])
    source = opened(file, "preference")
    (sample,) = source.samples([0])
    assert sample.messages[1] == Message("assistant", "A cat.")
    assert sample.rejected == "No."
    assert "`chosen` must be a text that is not empty" in says(source, 1)
