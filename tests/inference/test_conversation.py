"""Conversations: turns, images and videos stay for the next question."""

import pytest
import torch
from chat_folders import PROMPT_RUNS, golden_tensors, prompt_folder
from PIL import Image

from internvl.errors import BadImage, BadSample, UserError
from internvl.inference import load as loading
from internvl.inference.chat import Chat

CHAT = "internlm2.internlm2-chat"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return loading.load(prompt_folder(CHAT, tmp_path_factory.mktemp("talk") / "m"), device="cpu")


@pytest.fixture
def asked(monkeypatch):
    """The requests of a conversation whose every answer is "a", but that to "hush" empty."""
    requests = []

    def answer(self, batch, **settings):
        requests.append((batch[0], settings))
        return ["" if "hush" in batch[0].messages[-1]["content"] else "a"]

    monkeypatch.setattr(Chat, "answer", answer)
    return requests


def texts(request):
    return [turn["content"] for turn in request.messages]


RED, BLUE = Image.new("RGB", (84, 84), "red"), Image.new("RGB", (84, 84), "blue")


def test_the_history_is_the_originals(chat):
    run = PROMPT_RUNS[CHAT]["runs"]["return_history"]
    tiles = golden_tensors("chat_internlm2")["input.pixel_values"][run["pixel_value_rows"]]
    answer, history = run["returned"]
    talk = chat.conversation(tiles, max_new_tokens=8)
    assert talk.ask("What is it?") == answer
    assert [list(pair) for pair in talk.history] == history
    # A second question is the first one's conversation as one call.
    again = chat.ask(talk.images, "And then?", history=talk.history, max_new_tokens=8)
    assert talk.ask("And then?") == again
    assert len(talk.history) == 2


def test_a_stream_is_kept_too(chat):
    talk = chat.conversation(RED, max_new_tokens=8)
    answer = chat.ask(RED, "What?", max_new_tokens=8)
    assert "".join(talk.stream("What?")) == answer
    assert talk.history == [("<image>\nWhat?", answer)]
    pieces = talk.stream("More?")
    first = next(pieces)
    pieces.close()
    assert talk.history[1] == ("More?", first.strip())


def test_images_go_with_the_next_question(chat, asked):
    talk = chat.conversation(RED, temperature=0)
    talk.ask("One?")
    talk.ask("Two?", BLUE)
    talk.add_images([RED, BLUE])
    talk.ask("Three <image> or <image>?", top_p=0.5)
    request, settings = asked[-1]
    assert texts(request) == [
        *("<image>\nOne?", "a", "<image>\nTwo?", "a", "Three <image> or <image>?"),
    ]
    assert request.images == [RED, BLUE, RED, BLUE]
    assert settings == {"temperature": 0, "top_p": 0.5}
    talk.ask("Four?")
    assert "top_p" not in asked[-1][1]
    assert asked[-1][0].images == talk.images


def test_a_video_is_read_once_and_stays(chat, asked, tmp_path):
    (tmp_path / "frames").mkdir()
    for number in range(4):
        RED.save(tmp_path / "frames" / f"f_{number}.png")
    talk = chat.conversation(videos=tmp_path / "frames", num_frames=2)
    for file in (tmp_path / "frames").iterdir():
        file.unlink()
    talk.ask("What happens?")
    talk.ask("Sure?")
    assert texts(asked[-1][0])[0] == "<video>\nWhat happens?"
    assert [len(frames) for frames in asked[-1][0].videos] == [2]


def test_a_question_that_fails_changes_nothing(chat, tmp_path):
    talk = chat.conversation(RED, max_new_tokens=2)
    with pytest.raises(BadSample, match="2 <image> mark"):
        talk.ask("What are <image> and <image>?")
    with pytest.raises(BadImage, match="there is no image"):
        talk.ask("What?", tmp_path / "nope.png")
    with pytest.raises(BadImage, match="there is no image"):
        talk.add_images(tmp_path / "nope.png")
    with pytest.raises(BadImage, match="image 1: there is no image"):
        talk.add_images([RED, tmp_path / "nope.png"])
    with pytest.raises(BadSample, match="has no text"):
        talk.ask(5)
    assert (talk.messages, talk.images) == ([], [])
    talk.ask("What?")
    assert talk.history[0][0] == "<image>\nWhat?"
    assert "1 answer, 1 image, 0 videos" in repr(talk)


def test_an_empty_answer_is_not_kept(chat, asked):
    talk = chat.conversation(RED)
    assert talk.ask("hush") == ""
    talk.ask("What?")
    assert texts(asked[-1][0]) == ["<image>\nWhat?"]


def test_a_conversation_starts_again_as_it_was_opened(chat, asked):
    talk = chat.conversation(RED, system="Be brief.")
    talk.ask("One?", BLUE)
    talk.reset()
    talk.ask("Two?")
    assert texts(asked[-1][0]) == ["Be brief.", "<image>\nTwo?"]
    assert asked[-1][0].images == [RED]
    assert talk.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(talk.history) == 1


def test_a_conversation_checks_its_settings(chat):
    for settings, sentence in (
        ({"temprature": 1}, "no setting 'temprature'"),
        ({"num_frames": 0}, "num_frames must be"),
        ({"max_tiles": 0}, "max_tiles must be"),
        ({"videos": "nope.mp4"}, "there is no video nope.mp4"),
    ):
        with pytest.raises(UserError, match=sentence):
            chat.conversation(**settings)


def test_sampled_answers_repeat_with_the_seed(chat):
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        answers.append(chat.conversation(temperature=1.5, max_new_tokens=8).ask("Hello"))
    assert answers[0] == answers[1]
