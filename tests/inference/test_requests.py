"""Requests: what stands for a message, an image or a video, and where their marks go."""

import shutil

import pytest
import torch
from chat_folders import prompt_folder, shared
from PIL import Image

from internvl.config import VideoConfig
from internvl.data.records import Message, Video
from internvl.data.video import read_video
from internvl.errors import BadImage, BadSample, UserError
from internvl.inference import load as loading
from internvl.inference import requests
from internvl.inference.requests import Request


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = prompt_folder("qwen2.Hermes-2", tmp_path_factory.mktemp("requests") / "m")
    return loading.load(folder, device="cpu")


@pytest.fixture
def frames(tmp_path):
    """A folder of four frames, wide enough for two tiles."""
    (tmp_path / "frames").mkdir()
    for number, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (168, 84), color).save(tmp_path / "frames" / f"f_{number}.png")
    return tmp_path / "frames"


def encoded(chat, request):
    return requests.encode(request, chat.encoder, chat.tiles)


def text_of(chat, request):
    """The prompt as text, a mark for all visual tokens of an image."""
    ids = encoded(chat, request).input_ids
    text = chat.tokenizer.decode(ids[ids != chat.encoder.context_id])
    return text.replace("<img></img>", "<image>")


def test_a_text_or_a_message_is_a_conversation_of_one(chat):
    turns = [{"role": "user", "content": "Hello"}]
    ids = encoded(chat, Request(turns)).input_ids.tolist()
    for messages in ("Hello", turns[0], Message("user", "Hello")):
        assert encoded(chat, Request(messages)).input_ids.tolist() == ids


@pytest.mark.parametrize(
    ("question", "images", "videos", "marked"),
    [
        ("What?", 0, 0, "What?"),
        ("What?", 2, 0, "<image>\n<image>\nWhat?"),
        (r"Is \<image> a tag?", 1, 0, "<image>\n" + r"Is \<image> a tag?"),
        ("One <image>, two <image>?", 2, 0, "One <image>, two <image>?"),
        ("What?", 1, 1, "<image>\n<video>\nWhat?"),
        ("<video>\nWhat?", 1, 1, "<image>\n<video>\nWhat?"),
        (r"A \<video>?", 0, 1, "<video>\n" + r"A \<video>?"),
    ],
)
def test_marks_of_a_question(question, images, videos, marked):
    (message,) = requests.with_marks([Message("user", question)], images, videos)
    assert message.content == marked


def test_a_video_is_a_line_and_a_tile_per_frame(chat, frames):
    """The prompt of the original's pages; an image beside it keeps its tiles."""
    lines = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\n"
    video = Request("What happens?", videos=frames, num_frames=3)
    assert f"{lines}What happens?" in text_of(chat, video)
    prompt = encoded(chat, video)
    assert prompt.tiles.shape[0] == 3
    # The middle frames of three segments of four frames: 0, 1 and 2.
    assert [tile.float().mean((1, 2)).argmax().item() for tile in prompt.tiles] == [0, 1, 2]
    wide = Image.new("RGB", (168, 84))
    both = Request("What happens?", wide, frames, num_frames=3)
    assert f"<image>\n{lines}What happens?" in text_of(chat, both)
    alone = encoded(chat, Request("What?", wide)).tiles.shape[0]
    assert alone > 1
    assert encoded(chat, both).tiles.shape[0] == alone + 3


def test_the_same_video_however_a_request_gives_it(chat, frames):
    tiles = encoded(chat, Request("What?", videos=frames, num_frames=4)).tiles
    opened = [Image.open(file) for file in sorted(frames.iterdir())]
    parts = [{"type": "video", "video": f"{frames}/"}, {"type": "text", "text": "What?"}]
    for request in (
        Request("What?", videos=[str(frames)], num_frames=4),
        Request("<video>\nWhat?", videos=Video(f"{frames}/"), num_frames=4),
        Request("What?", videos=[opened]),
        Request({"role": "user", "content": parts}, num_frames=4),
    ):
        assert torch.equal(encoded(chat, request).tiles, tiles)
    twice = Request("One <video> and two <video>", videos=[frames, frames], num_frames=2)
    assert text_of(chat, twice).count("Frame2: <image>") == 2


def test_frames_of_a_file_are_the_middles_of_segments(chat):
    pytest.importorskip("av")
    file = shared("cases/trimmed-video/trim.mp4")
    read = read_video(file, 4)
    assert len(read) == 4
    clip = read_video(Video(str(file), 0, 0.1), 2)
    assert len(clip) == 2
    assert VideoConfig(min_frames=4, max_frames=4, sampling="middle").sampling == "middle"


def test_most_tiles_of_a_request(chat):
    wide = Image.new("RGB", (504, 84))
    assert encoded(chat, Request("What?", wide, max_tiles=1)).tiles.shape[0] == 1
    assert encoded(chat, Request("What?", wide, max_tiles=3)).tiles.shape[0] == 4  # a thumbnail
    # Several images share the tiles, as in training.
    assert encoded(chat, Request("What?", [wide] * 3, max_tiles=3)).tiles.shape[0] == 3


def test_what_is_wrong_with_a_video(chat, frames, tmp_path):
    with pytest.raises(BadImage, match="^request: video: there is no video .*nope.mp4"):
        encoded(chat, Request("What?", videos="nope.mp4"))
    with pytest.raises(BadImage, match="^request: video: the list of frames is empty"):
        encoded(chat, Request("What?", videos=[[]]))
    with pytest.raises(BadSample, match=r"2 <video> marks in the questions, but 1 video"):
        encoded(chat, Request("One <video>, two <video>", videos=frames))
    with pytest.raises(UserError, match="videos must be a list, not int"):
        Request("What?", videos=5)
    with pytest.raises(UserError, match="num_frames must be a whole number of at least 1"):
        Request("What?", videos=frames, num_frames=0)
    with pytest.raises(UserError, match="max_tiles must be a whole number of at least 1"):
        Request("What?", max_tiles=0)
    shutil.copy(shared("cases/trimmed-video/trim.mp4"), tmp_path / "walk.mp4")
    with pytest.raises(BadImage, match="walk.mp4: a video .*, not an image: name it as a video"):
        encoded(chat, Request("What?", tmp_path / "walk.mp4"))


def test_marks_are_checked_before_the_first_answer(chat, monkeypatch):
    monkeypatch.setattr(requests, "stack_tiles", lambda *_: pytest.fail("opened"))
    with pytest.raises(BadSample, match=r"requests\[1\]: 1 <image> mark"):
        chat.answer(["Hi", "What is <image>?"])


def test_a_message_is_not_a_request(chat):
    for message in ({"role": "user", "content": "Hi"}, Message("user", "Hi")):
        with pytest.raises(UserError, match=r"request is a \w+, not internvl.Request\(messages"):
            chat.answer(message)
