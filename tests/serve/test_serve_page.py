"""The page of a chat server, driven in a real browser as a person would."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft_folders
import pytest
from http_server import image_bytes, running
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

pytestmark = pytest.mark.slow

SHOTS = os.environ.get("INTERNVL_SHOTS")
"""Folder for screenshots to look at."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    work = tmp_path_factory.mktemp("models")
    base = peft_folders.hf_folder(work)
    adapter = peft_folders.write(base, work / "stamps")
    words = (f"--adapter=stamps={adapter}", "--slots", 4)
    with running(base, tmp_path_factory.mktemp("server"), *words) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page, whose console must stay empty and which loads nothing from elsewhere."""
    context = browser.new_context(locale="en-US", permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector("#model option", state="attached")
    yield page
    context.close()
    # The browser's own line about a request that was refused.
    assert [text for text in said if "400 (Bad Request)" not in text] == []
    own = re.compile(rf"http://127\.0\.0\.1:{server.port}/|blob:|data:")
    assert [url for url in asked if not own.match(url)] == []


def slide(page, name, value):
    page.evaluate(
        "([id, value]) => { const i = document.getElementById(id); i.value = value;"
        "i.dispatchEvent(new Event('input')); i.dispatchEvent(new Event('change')); }",
        [name, str(value)],
    )


def ask(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(".turn:last-child .answer .note")
    page.wait_for_selector("#stop:disabled")


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def test_a_conversation_with_an_image(page, server, tmp_path):
    slide(page, "max_tokens", 30)
    slide(page, "temperature", 0)
    (tmp_path / "my photo.png").write_bytes(image_bytes(600, 200))
    page.set_input_files("#file", tmp_path / "my photo.png")
    caption = page.locator("#waiting figcaption")
    expect(caption).to_contain_text("6 × 2 tiles + thumbnail, 117 tokens")
    ask(page, "What is <b>this</b>?")
    answer = page.locator(".turn:last-child .answer .text").text_content()
    body = {
        "model": "hf",
        "messages": [
            {"role": "system", "content": page.input_value("#system")},
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {
                            "url": page.evaluate("turns[0].media[0].url"),
                            "max_dynamic_patch": 12,
                        },
                    },
                    {"type": "text", "text": "What is <b>this</b>?"},
                ],
            },
        ],
        "max_tokens": 30,
        "temperature": 0,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "skip_special_tokens": False,
    }
    status, served = server.post(body)
    assert (status, served["choices"][0]["message"]["content"]) == (200, answer)
    assert page.locator(".asked b").count() == 0
    assert "tokens · first token" in page.locator(".answer .note").text_content()
    shoot(page, "image")
    # The same again, then a second question about the same image.
    page.click("#again")
    page.wait_for_selector("#stop:disabled")
    page.wait_for_selector(".turn:last-child .answer .note")
    assert page.locator(".turn:last-child .answer .text").text_content() == answer
    ask(page, "And now?")
    assert page.locator(".turn").count() == 2
    with page.expect_download() as download:
        page.click("#training")
    row = json.loads(Path(download.value.path()).read_text())
    assert row["image"] == "my photo.png"
    assert [turn["from"] for turn in row["conversations"]] == [
        *("system", "human", "gpt", "human", "gpt")
    ]
    assert row["conversations"][1]["value"] == "<image>\nWhat is <b>this</b>?"
    page.click("#python")
    python = page.evaluate("navigator.clipboard.readText()")
    compile(python, "copied", "exec")
    assert 'read("my_photo.png")' in python
    page.click("#curl")
    curl = page.evaluate("navigator.clipboard.readText()")
    assert "data:image/png;base64,$(base64 -w0 'my_photo.png')" in curl
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_a_copied_command_asks_the_same(page, server, tmp_path):
    slide(page, "max_tokens", 8)
    slide(page, "temperature", 0)
    (tmp_path / "a.png").write_bytes(image_bytes())
    page.set_input_files("#file", tmp_path / "a.png")
    page.wait_for_selector("#waiting figure")
    ask(page, 'Why "$5" and `that`, \\ too?')
    answer = page.locator(".answer .text").text_content()
    page.click("#curl")
    command = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == answer
    page.click("#python")
    script = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.removesuffix("\n") == answer


def test_an_answer_is_stopped(page, server):
    slide(page, "max_tokens", 400)
    page.fill("#question", "Tell me all")
    page.press("#question", "Enter")
    expect(page.locator(".answer .text")).to_have_text(re.compile("...."))
    page.click("#stop")
    page.wait_for_selector("#stop:disabled")
    assert "stopped" in page.locator(".answer .note").text_content()
    server.wait_for(lambda: server.metric("internvl_running") == 0, 5)


def test_two_columns(page):
    slide(page, "max_tokens", 12)
    slide(page, "temperature", 0)
    page.select_option("#beside", "stamps")
    ask(page, "Compare")
    expect(page.locator(".answer .note")).to_have_count(2)
    assert page.locator(".answer h2").all_text_contents() == ["hf", "stamps"]
    first, second = page.locator(".answer .text").all_text_contents()
    assert first != second
    shoot(page, "columns")


def test_files_are_dropped_and_a_broken_one_is_named(page):
    drop = """([name, type, values]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(values)], name, {type}));
        window.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));
    }"""
    page.evaluate(drop, ["a.png", "image/png", list(image_bytes())])
    page.wait_for_selector("#waiting figure")
    page.evaluate(drop, ["notes.txt", "text/plain", [104, 105]])
    expect(page.locator("#message")).to_have_text("notes.txt is no image or video.")
    page.click("#waiting figure button")
    assert page.locator("#waiting figure").count() == 0
    paste = """(images) => {
        const clipboardData = new DataTransfer();
        for (const values of images)
            clipboardData.items.add(
                new File([new Uint8Array(values)], 'image.png', {type: 'image/png'}));
        window.dispatchEvent(new ClipboardEvent('paste', {clipboardData, bubbles: true}));
    }"""
    page.evaluate(paste, [list(image_bytes(color=color)) for color in ((9, 9, 200), (9, 200, 9))])
    expect(page.locator("#waiting figure")).to_have_count(2)


def test_boxes_are_drawn_in_both_forms(page, server):
    """The answer is written by hand: a small model writes no boxes."""
    page.evaluate(
        """async (url) => {
            const image = await loadImage(url);
            const media = [{type: 'image', name: 'a', url, image}];
            turns.push({text: 'x', media, answers: {}});
            const card = document.createElement('div');
            document.getElementById('log').replaceChildren(card);
            drawBoxes(card, turns[0], '<ref>a cat</ref><box>[[100, 200, 500, 900], ' +
                '[600, 0, 999, 400]]</box> and <ref>高</ref><box>[[0.1,0.5,0.3,1]]</box>');
        }""",
        "data:image/png;base64," + base64.b64encode(image_bytes(400, 300)).decode(),
    )
    assert page.get_attribute(".boxes canvas", "data-boxes") == "3"
    assert page.evaluate("boxesIn('<box>[[0.1,0.5,0.3,1]]</box>')[0].sides") == [0.1, 0.5, 0.3, 1]
    assert page.evaluate("boxesIn('<box>[[100,500,300,1000]]</box>')[0].sides") == [
        *(0.1, 0.5, 0.3, 1)
    ]
    shoot(page, "boxes")


def test_languages_and_a_phone(page):
    for language, word in (("zh", "发送"), ("ko", "보내기"), ("en", "Send")):
        page.select_option("#language", language)
        assert page.text_content("#send") == word
        assert page.get_attribute("html", "lang") == language
        shoot(page, language)
    page.set_viewport_size({"width": 390, "height": 800})
    slide(page, "max_tokens", 8)
    assert not page.is_visible("#system")
    page.click("#toggle")
    assert page.is_visible("#system")
    page.click("#toggle")
    ask(page, "Hello")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shoot(page, "phone")


def test_a_model_that_refuses_says_why(page):
    page.evaluate("document.getElementById('question').value = 'word '.repeat(900)")
    page.click("#send")
    page.wait_for_selector(".answer .wrong")
    assert "together they may have" in page.text_content(".answer .wrong")


def test_a_video_shows_its_frames(page, tmp_path):
    av = pytest.importorskip("av")
    file = tmp_path / "clip.webm"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for n in range(20):
            image = Image.open(io.BytesIO(image_bytes(96, 64, (12 * n, 80, 90)))).convert("RGB")
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    slide(page, "num_frames", 4)
    slide(page, "max_tokens", 8)
    page.set_input_files("#file", file)
    expect(page.locator("#waiting .strip canvas")).to_have_count(4)
    ask(page, "What moves?")
    assert page.locator(".answer .wrong").count() == 0
    shoot(page, "video")
