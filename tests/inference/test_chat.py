"""One call for one question, the text of a handle, and tiles as the original's pages make them."""

import numpy as np
import pytest
import torch
from chat_folders import PROMPT_RUNS, golden_tensors, prompt_folder
from dual_folders import dual_folder
from PIL import Image

import internvl
from internvl.errors import BadImage, BadSample, UserError
from internvl.inference import load as loading
from internvl.inference import requests
from internvl.inference.requests import Request

CHAT = "internlm2.internlm2-chat"


def noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return loading.load(prompt_folder(CHAT, tmp_path_factory.mktemp("chat") / "m"), device="cpu")


@pytest.fixture
def cat(tmp_path, monkeypatch):
    """The folder where cat.jpg and dog.jpg are."""
    monkeypatch.chdir(tmp_path)
    noise(200, 90, 1).save("cat.jpg")
    noise(90, 90, 2).save("dog.jpg")
    return tmp_path


def golden(name):
    """(tiles, returned text) of a question to the original's `chat`."""
    run = PROMPT_RUNS[CHAT]["runs"][name]
    pixels = golden_tensors("chat_internlm2")["input.pixel_values"]
    returned = run["returned"]
    answer = returned if isinstance(returned, str) else returned[0]
    return pixels[run["pixel_value_rows"] or []], answer


def test_one_call_gives_the_originals_answers(chat):
    """Tiles, several images, text alone and history, each against the original's `chat`."""
    tiles, answer = golden("single_image_2tiles_no_placeholder")
    assert chat.ask(tiles, "What is it?", max_new_tokens=8) == answer
    tiles, answer = golden("two_images_num_patches_list")
    question = "Image-1: <image>\nImage-2: <image>\nCompare."
    assert chat.ask(list(tiles.split([2, 1])), question, max_new_tokens=8) == answer
    _, answer = golden("text_only")
    assert chat.ask("Hello", max_new_tokens=8) == answer
    assert chat.ask(None, "Hello", max_new_tokens=8) == answer
    tiles, answer = golden("second_turn_history")
    history = [("<image>\nWhat is it?", "A dog.")]
    assert chat.ask(tiles, "And then?", history=history, max_new_tokens=8) == answer
    messages = [{"role": "user", "content": history[0][0]}]
    messages += [{"role": "assistant", "content": "A dog."}]
    assert chat.ask(tiles, "And then?", history=messages, max_new_tokens=8) == answer


def test_one_call_is_a_request_of_one(chat, cat):
    turns = [{"role": "user", "content": "What is this?"}]
    (answer,) = chat.answer(Request(turns, ["cat.jpg"]), max_new_tokens=6)
    for image in ("cat.jpg", cat / "cat.jpg", ["cat.jpg"], Image.open("cat.jpg")):
        assert chat.ask(image, "What is this?", max_new_tokens=6) == answer
    assert chat.ask(chat.pixel_values("cat.jpg"), "What is this?", max_new_tokens=6) == answer
    two = chat.answer(Request(turns, ["cat.jpg", "dog.jpg"], max_tiles=2), max_new_tokens=6)
    images = ["cat.jpg", "dog.jpg"]
    assert [chat.ask(images, "What is this?", max_tiles=2, max_new_tokens=6)] == two


def test_texts_alone_are_questions(chat):
    alone = chat.ask("Hello", max_new_tokens=5)
    assert chat.answer("Hello", max_new_tokens=5) == [alone]
    assert chat.answer(["Hello", Request("Hello")], max_new_tokens=5) == [alone, alone]
    assert "".join(chat.stream("Hello", max_new_tokens=5)) == alone


def test_one_image_to_caption_needs_no_list(chat, cat):
    settings = {"max_new_tokens": 8, "min_new_tokens": 1}
    assert chat.caption("cat.jpg", **settings) == chat.caption(["cat.jpg"], **settings)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (("cat.jpg",), UserError, "ask needs a question about cat.jpg: ask('cat.jpg', 'What"),
        ((["cat.jpg"],), UserError, r"ask needs a question: ask(images, question)"),
        (("What is this?", "cat.jpg"), UserError, "images come first: ask('cat.jpg', 'What is"),
        (("nope.jpg", "What?"), BadImage, "image 0: there is no image nope.jpg"),
        ((5, "What?"), UserError, "images must be a list, not int"),
        (("cat.jpg", ["What?"]), BadSample, "turn 1 has a part of type None; known: text, image"),
        (("cat.jpg", 5), BadSample, "turn 1 has no text under `content`"),
        (("cat.jpg", "What?", "Hi"), UserError, "history holds a str (H); it is a list of"),
        (("cat.jpg", "What?", [("a", None)]), BadSample, "turn 2 has no text under `content`"),
        (("cat.jpg", "What?", [("a", "b", "c")]), UserError, "history holds a tuple"),
    ],
)
def test_what_is_wrong_with_a_call_is_one_sentence(chat, cat, call, error, sentence):
    images, question, history = (*call, None, None)[:3]
    with pytest.raises(error) as caught:
        chat.ask(images, question, history=history)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no setting 'temprature'; did you mean temperature"):
        chat.ask("cat.jpg", "What?", temprature=1)


def test_pixel_values_are_the_tiles_of_a_request(chat, cat):
    pixels = chat.pixel_values("cat.jpg")
    prompt = requests.encode(Request("What?", "cat.jpg"), chat.encoder, chat.tiles)
    assert pixels.dtype == torch.float32
    assert pixels.shape == prompt.tiles.shape
    ready = requests.encode(Request("What?", pixels), chat.encoder, chat.tiles)
    assert ready.input_ids.tolist() == prompt.input_ids.tolist()
    assert chat.pixel_values("cat.jpg", max_tiles=1).shape[0] == 1
    with pytest.raises(UserError, match="pixel_values takes one image, not 2"):
        chat.pixel_values(["cat.jpg", "dog.jpg"])


def test_a_handle_prints_in_five_lines(chat, tmp_path):
    for handle in (chat, loading.load(dual_folder(tmp_path / "dual"), device="cpu")):
        lines = repr(handle).splitlines()
        assert len(lines) <= 5
        assert max(map(len, lines[1:])) <= 100
        assert str(handle.folder) in lines[0]
        assert " M parameters, float32, on cpu" in lines[1]
    assert "internlm2-chat; an image is 1 to 6 tiles of 84 px and a thumbnail" in repr(chat)


def test_dir_is_the_public_surface():
    assert dir(internvl) == sorted(internvl.__all__)
    assert {"load", "Request", "Conversation", "errors"} < set(dir(internvl))
    for name in dir(internvl):
        assert getattr(internvl, name) is not None
