"""The chat verb: a conversation on a terminal, marks, settings, a video."""

import os
import subprocess
import sys

import pytest
import tiny_run
from chat_folders import shared
from command_line import call

from internvl import cli
from internvl.inference import generate
from internvl.inference.chat import Chat


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def test_a_conversation_streams_to_a_terminal(capsys, project, monkeypatch):
    """The same text as without one, and the history reaches the next question."""
    start, image = project.parent / "start", project.parent / "red-circle.png"
    typed = iter(["What is this?", "Sure?"])

    def ask(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    words = ["chat", str(start), "--image", str(image), "--max-new-tokens", "5"]
    plain = call(capsys, *words, "--prompt", "What is this?")[1]
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(SystemExit):
        cli.main(words)
    said = capsys.readouterr().out.splitlines()
    assert said[: len(plain.splitlines())] == plain.splitlines()
    assert len(said) >= 2


def converse(capsys, monkeypatch, project, questions, *words):
    """(exit code, answers, sentences) of a conversation with the red circle; every answer is how
    many turns its request has, and its last question."""
    typed, asked = iter(questions), []

    def ask(_: str) -> str:
        try:
            text = next(typed)
        except StopIteration:
            raise EOFError from None
        if isinstance(text, Exception):
            raise text
        return text

    def answer(self, requests, **settings):
        encoded = generate.encode(requests[0], self.encoder, self.tiles)
        asked.append((requests[0].messages, len(encoded.input_ids), settings))
        return [f"{len(requests[0].messages)}: <image>" if "hush" not in str(requests) else ""]

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(Chat, "answer", answer)
    code, out, err = call(capsys, "chat", project.parent / "start", *words)
    return code, out.splitlines(), [line for line in err.splitlines() if "internvl:" in line], asked


def test_a_bad_question_does_not_end_a_conversation(capsys, project, monkeypatch):
    image = project.parent / "red-circle.png"
    questions = ["What are <image> and <image>?", "  ", "What is this?", "What is the tag <image>?"]
    questions += [
        "Half \ud83d.",
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        r"\<image>?",
    ]
    questions += ["And <video>?", "Say <IMG_CONTEXT>.", "Bye."]
    code, said, wrong, asked = converse(
        capsys, monkeypatch, project, questions, "--image", image, "--temperature", 0
    )
    assert (code, said) == (0, ["1: <image>", "3: <image>", "5: <image>"])
    texts = [turn["content"] for turn in asked[-1][0]]
    assert texts == [
        *("<image>\nWhat is this?", "1: <image>", r"\<image>?", "3: <image>", "Bye."),
    ]
    assert asked[0][2]["temperature"] == 0
    for sentence, says in zip(
        wrong,
        (
            r"2 <image> marks in the questions, but 1 image",
            r"\<image> (in JSON \\<image>) where the word is meant",
            "half of a character",
            "codec can't decode",
            "1 <video> mark",
            "must not contain <IMG_CONTEXT>",
        ),
        strict=True,
    ):
        assert says in sentence


def test_an_empty_answer_is_not_kept(capsys, project, monkeypatch):
    image = project.parent / "red-circle.png"
    code, said, wrong, asked = converse(
        capsys, monkeypatch, project, ["hush", "What is this?"], "--image", image
    )
    assert (code, said) == (0, ["", "1: <image>"])
    assert "the answer is empty; the question is dropped" in wrong[0]
    assert asked[1][0] == [{"role": "user", "content": "<image>\nWhat is this?"}]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--temperature", -1), "temperature must be a number above 0, not -1.0"),
        (("--top-p", 0), "top_p must be a number above 0 and at most 1"),
        (("--max-new-tokens", 0), "max_new_tokens must be a whole number of at least 1"),
        (("--image", "nowhere.png"), "there is no image nowhere.png"),
    ],
)
def test_what_is_wrong_before_any_question_is_said_before_the_model_loads(capsys, words, says):
    code, _, err = call(capsys, "chat", "no-such-model", *words)
    assert code == 1
    assert says in err


def test_commands_of_a_conversation(capsys, project, monkeypatch):
    image = project.parent / "red-circle.png"
    typed = ["What?", f"/image {image}", "Is it <image>?", "/imge x", "/help", "/reset", "Again?"]
    code, said, wrong, asked = converse(capsys, monkeypatch, project, [*typed, "/exit", "No."])
    assert (code, said) == (0, ["1: <image>", "3: <image>", "1: <image>"])
    assert ["did you mean /image?" in sentence for sentence in wrong] == [True]
    texts = [[turn["content"] for turn in messages] for messages, _, _ in asked]
    assert texts == [["What?"], ["What?", "1: <image>", "Is it <image>?"], ["Again?"]]


def test_a_conversation_greets_before_it_looks_for_the_model(capsys):
    code, out, err = call(capsys, "chat", "no-such-model")
    assert (code, out) == (1, "")
    first, *_, last = err.splitlines()
    assert first.startswith("chat with no-such-model: /image FILE, /video FILE, /reset, /help, ")
    assert "no-such-model: no such folder" in last


def test_ctrl_c_stops_an_answer_and_keeps_it(capsys, project, monkeypatch):
    typed, asked = iter(["Tell me.", "More."]), []

    def ask(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    def stream(self, request, **settings):
        asked.append(request.messages)
        yield "Once upon"
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(Chat, "stream", stream)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["chat", str(project.parent / "start")])
    assert stopped.value.code == 0
    assert "stopped" in capsys.readouterr().err
    assert [turn["content"] for turn in asked[1]] == ["Tell me.", "Once upon", "More."]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_keeps_the_questions_for_the_arrow_keys(project, tmp_path):
    import pty

    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "internvl", "chat", str(project.parent / "start")]
    chat = subprocess.Popen(
        [*words, "--max-new-tokens", "3"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"},
    )
    os.close(follower)
    image = str(project.parent / "red-circle.png").encode()
    typed = [b"What is this?\n", b"/image " + image[:-6] + b"\t\n", b"/exit\n"]
    shown = b""
    while True:
        try:
            shown += os.read(leader, 1024)
        except OSError:  # the other end is closed
            break
        if shown.endswith(b"> ") and typed:
            os.write(leader, typed.pop(0))
    assert chat.wait() == 0
    assert b"chat with " in shown
    assert image + b": shown with your next question" in shown
    history = tmp_path / "internvl" / "chat_history"
    assert "What is this?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("options", [("--num-beams", 2), ("--temperature", 0.7, "--top-p", 0.9)])
def test_chat_takes_settings(capsys, project, options):
    words = ("chat", project.parent / "start", "--prompt", "Hi", "--max-new-tokens", 3)
    assert call(capsys, *words, *options)[0] == 0


def test_chat_about_a_video(capsys, project):
    pytest.importorskip("av")
    video = shared("data/video/realshort.mp4")
    words = ("chat", project.parent / "start", "--prompt", "What happens?", "--max-new-tokens", 3)
    assert call(capsys, *words, "--video", video, "--frames", 2)[0] == 0
