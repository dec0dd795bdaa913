"""Commands of a conversation: what they do, and which lines are questions."""

import subprocess
import sys

import pytest
from PIL import Image

from internvl.errors import BadImage, UserError
from internvl.inference import commands
from internvl.inference.conversation import Conversation


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "my dog.jpg", "it's.jpg"):
        Image.new("RGB", (8, 8)).save(name)
    return tmp_path


@pytest.fixture
def talk():
    """A conversation that is never asked anything, so it needs no model."""
    return Conversation(None)


@pytest.mark.parametrize(
    ("line", "paths"),
    [
        ("/image cat.jpg", ["cat.jpg"]),
        ("  /image   cat.jpg ", ["cat.jpg"]),
        ("/image my dog.jpg", ["my dog.jpg"]),
        ("/image 'my dog.jpg' cat.jpg", ["my dog.jpg", "cat.jpg"]),
        (r"/image my\ dog.jpg", ["my dog.jpg"]),
        ("/image it's.jpg", ["it's.jpg"]),
    ],
)
def test_images_by_name(folder, talk, line, paths):
    message = commands.run(line, talk)
    assert message == f"{', '.join(paths)}: shown with your next question"
    assert talk._next_images == paths


def test_a_video_by_name(folder, talk):
    (folder / "frames").mkdir()
    Image.new("RGB", (8, 8)).save("frames/f_0.png")
    assert commands.run("/video frames", talk) == "frames: shown with your next question"
    assert [len(frames) for frames in talk._next_videos] == [1]


def test_reset_help_and_exit(folder, talk):
    commands.run("/image cat.jpg", talk)
    assert commands.run("/reset", talk) == "the conversation starts again, as it was opened"
    assert talk._next_images == []
    text = commands.run("/help", talk)
    assert [line.split()[0] for line in text.splitlines()] == [f"/{n}" for n in commands.COMMANDS]
    with pytest.raises(EOFError):
        commands.run("/exit", talk)


@pytest.mark.parametrize("line", ["What is this?", "/home/me/cat.jpg is what?", "/", "a /reset"])
def test_other_lines_are_questions(line, talk):
    assert commands.run(line, talk) is None


@pytest.mark.parametrize(
    ("line", "error", "sentence"),
    [
        ("/imge cat.jpg", UserError, "there is no command /imge; did you mean /image"),
        ("/zzz", UserError, "there is no command /zzz; /help lists them"),
        ("/image", UserError, "/image needs a file: /image FILE"),
        ("/image nope.jpg", BadImage, "there is no image nope.jpg"),
        ("/video nope.mp4", BadImage, "there is no video nope.mp4"),
    ],
)
def test_what_cannot_be_followed(folder, talk, line, error, sentence):
    with pytest.raises(error, match=sentence):
        commands.run(line, talk)


def test_the_greeting_waits_for_no_library():
    code = "import sys; from internvl.inference import commands; print(commands.greeting('m'))"
    code += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("chat with m", "/image FILE", "/reset", "/exit", "/help"):
        assert name in done.stdout
