"""docs/original.md: every line of its tables stands for the command beside it."""

import re
import shlex
from pathlib import Path

import pytest
from dual_folders import dual_folder
from original_trees import chat_model

from internvl import compat

PAGE = (Path(__file__).parents[2] / "docs/original.md").read_text(encoding="utf-8")
PRE = re.search(r"`PRE` stands for `([^`]+)`", PAGE)[1]
ROWS = [
    (line.replace("PRE", PRE), ours.replace("PRE", PRE))
    for line, ours in re.findall(r"^\| `([^`]+)` \| `(internvl [^`]+)` \|", PAGE, re.MULTILINE)
    if re.search(r"\bevaluate\.sh p|shell/|tools/|cli\.py", line)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl_chat")
    chat_model(folder / "pretrained/InternVL2-2B")
    (folder / "pretrained/InternVL2-2B/modeling_internvl_chat.py").unlink()
    dual_folder(folder / "pretrained/InternVL-14B-224px")
    chat_model(folder / f"{PRE}_lora_coco")  # a model in place of the run, for its family alone
    (folder / f"{PRE}_lora_coco/modeling_internvl_chat.py").unlink()
    return folder


def test_the_tables_have_the_guides_lines():
    assert len(ROWS) == 22


@pytest.mark.parametrize(("line", "ours"), ROWS, ids=lambda text: text[-60:])
def test_a_line(folder, monkeypatch, line, ours):
    monkeypatch.chdir(folder)
    words = shlex.split(line)
    environment = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    if words[0] in ("sh", "bash", "python", "python3"):
        del words[0]
    script, *rest = words
    if script.startswith("shell/"):
        command, rest = "shell", words
    elif script.endswith("cli.py"):
        command = "clip_benchmark"
    else:
        command = Path(script).name
    translation = compat.translate(command, rest, environment)
    shown = [f"internvl {shlex.join(words)}" for words in translation.commands]
    # How many GPUs this machine has is no matter of the line.
    assert [re.sub(r" --gpus \d+", "", text) for text in shown] == [ours]
