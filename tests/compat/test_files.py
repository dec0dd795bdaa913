"""Every shell file of the original is answered, and the product does what the answer says."""

import re
import shlex
from pathlib import Path

import pytest
from dual_folders import dual_folder
from original_trees import chat_model

from internvl import compat
from internvl.compat import files
from internvl.config import released
from internvl.errors import ConfigError

# As the original's repository lists them.
PATHS = Path(__file__).with_name("shell_files.txt").read_text(encoding="utf-8").split()
OUTCOMES = {path: files.answer(path).outcome for path in PATHS}
REFUSED = [path for path in PATHS if OUTCOMES[path] == "refused"]
TRANSLATED = [path for path in PATHS if OUTCOMES[path] == "translated"]
BENCHMARKS = [path for path in PATHS if path.startswith("clip_benchmark/")]
NODES = {"WORLD_SIZE": "1", "RANK": "0"}


def test_all_are_there():
    assert len(PATHS) == 191
    assert list(files.paths()) == sorted(PATHS)
    assert (len(TRANSLATED), len(REFUSED)) == (122, 58)
    assert PATHS.sort() is None
    assert [path for path in PATHS if OUTCOMES[path] == "works"] == sorted(
        [*BENCHMARKS, *files.EVALUATIONS]
    )


@pytest.mark.parametrize("path", REFUSED)
def test_a_file_is_refused_with_its_sentence(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        compat.translate("shell", [path, "--dry-run"], NODES)
    assert str(error.value) == f"{path}: {files.answer(path).text}"


def test_training_scripts_are_translated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in TRANSLATED:
        translation = compat.translate("shell", [path, "--dry-run"], NODES)
        (command,) = translation.commands
        assert command[:2] in (("train", str(translation.file)), ("launch", "train"))
        # The same script by its name: its values are compared in zoo/test_recipe_table.py.
        recipe = shlex.split(files.answer(path).text)[-1]
        assert released.locate(Path(path).stem) == released.paths()[recipe]


def test_evaluations_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat_model(tmp_path / "chat")
    dual_folder(tmp_path / "dual")
    for path, folder in zip(files.EVALUATIONS, ("chat", "dual"), strict=True):
        words = [path, folder, "caption-coco"]
        translation = compat.translate("shell", words, {"GPUS": "1"})
        assert translation == compat.translate("evaluate.sh", words[1:], {"GPUS": "1"})
        dry = compat.translate("shell", [*words, "--dry-run"], {"GPUS": "1"})
        assert (dry.commands, dry.runs) == (translation.commands, False)
        assert translation.commands[0][:3] == ("evaluate", folder, "caption-coco")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("c_classification", 21),
        ("g_classification", 21),
        ("c_imagenet", 10),
        ("g_imagenet", 10),
        ("c_retrieval", 4),
        ("g_retrieval", 4),
        ("c_xtd", 8),
        ("g_xtd", 8),
        ("g_retrieval_finetune", 4),
    ],
)
def test_a_file_of_clip_benchmark_is_its_lines(name, count):
    path = f"clip_benchmark/test_internvl_{name}.sh"
    commands = compat.translate("shell", [path], {}).commands
    assert len(commands) == count
    assert all(command[0] == "evaluate" for command in commands)
    if name.endswith("finetune"):
        assert {command[command.index("--mode") + 1] for command in commands} == {"c", "g"}
        assert all(command[1].startswith("./work_dirs/") for command in commands)
        return
    mode, start, output = {
        "c": ("c", "./pretrained/internvl_c_13b_224px.pth", "result.json"),
        "g": ("g", "./pretrained/internvl_14b_224px", "result_g.json"),
    }[name[0]]
    for command in commands:
        assert command[1] == start
        assert command[command.index("--mode") + 1] == mode
        assert command[-2:] == ("--output", output)
    if name.endswith("xtd"):
        languages = [command[command.index("--language") + 1] for command in commands]
        assert languages == ["en", "es", "fr", "zh", "it", "ko", "ru", "jp"]


def test_a_misspelled_file_gets_the_nearest_of_all():
    with pytest.raises(ConfigError, match="did you mean clip_benchmark/test_internvl_g_retrieval"):
        compat.translate("shell", ["test_internvl_g_retrival.sh"], {})


def test_words_that_a_file_does_not_take_are_refused(tmp_path, monkeypatch):
    path = "clip_benchmark/test_internvl_c_xtd.sh"
    with pytest.raises(ConfigError, match="takes no words, not optim.lr=1"):
        compat.translate("shell", [path, "optim.lr=1"], {})
    monkeypatch.chdir(tmp_path)
    # A file of the user's goes first, whatever its name.
    Path("train_in1k.sh").write_text("GPUS=1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape("train_in1k.sh")) as error:
        compat.translate("shell", ["train_in1k.sh"], {})
    assert "probes" not in str(error.value)
