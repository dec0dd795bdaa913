"""The original's evaluate.sh."""

import pytest
from dual_folders import dual_folder
from original_trees import chat_model

from internvl.compat import evaluation
from internvl.errors import ConfigError, ModelFolderError


@pytest.fixture
def chat(tmp_path):
    return str(chat_model(tmp_path / "pretrained/InternVL2-2B"))


def command(*words, **environment):
    (command,) = evaluation.translate(words, environment).commands
    return " ".join(command[2:])


def test_the_tutorials_line(chat):
    assert command(chat, "caption-coco", "--dynamic", GPUS="4") == (
        "caption-coco --tiles 6 --to results/pretrained_InternVL2-2B "
        "--output results/pretrained_InternVL2-2B.txt"
    )
    assert "--tiles 12 " in command(chat, "caption-coco", "--dynamic", "--max-num", "12")
    assert command(chat, "caption", "--auto", "--load-in-8bit", "--out-dir", "o").split() == [
        *("caption-coco", "caption-flickr30k", "caption-nocaps", "--tiles", "one"),
        *("--quantize", "8bit", "--to", "o/pretrained_InternVL2-2B"),
        *("--output", "o/pretrained_InternVL2-2B.txt", "--device-map", "auto"),
    ]


def test_one_tile_without_dynamic_is_warned_of(chat):
    notes = evaluation.translate([chat, "caption-coco", "--max-num", "9"], {}).notes
    assert any("every image is one tile" in note for note in notes)
    assert any("--max-num: changes nothing without --dynamic" in note for note in notes)


def test_flags_without_effect_say_so(chat):
    words = [chat, "caption-coco", "--dynamic", "--batch-size", "1", "--seed", "3"]
    notes = evaluation.translate(words, {}).notes
    assert any("assert args.batch_size == 1" in note for note in notes)
    assert any("--seed: changes nothing" in note for note in notes)
    assert "--num-beams 3" in command(chat, "caption-coco", "--dynamic", "--num-beams", "3")


def test_the_checkpoint_decides_the_family(tmp_path):
    folder = str(dual_folder(tmp_path / "InternVL-14B-224px"))
    done = evaluation.translate([folder, "caption-coco", "--dynamic"], {})
    assert "--tiles" not in done.commands[0]
    assert done.notes == ("--dynamic: changes nothing for InternVL-14B",)
    evaluated = [
        key for key, names in evaluation.keys().items() if set(names) <= evaluation.tasks()
    ]
    for key in evaluated:
        if not key.startswith("caption"):
            with pytest.raises(ConfigError, match="is for chat models"):
                evaluation.translate([folder, key], {})


def test_every_key_is_a_task_or_refused_by_its_name(chat):
    assert len(evaluation.keys()) == 71
    for key, names in evaluation.keys().items():
        if set(names) <= evaluation.tasks():
            assert names[0] in command(chat, key, "--dynamic")
        else:
            with pytest.raises(ConfigError, match="internvl evaluate has no task"):
                command(chat, key, "--dynamic")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption-coca"], "did you mean caption-coco"),
        ([], "CHECKPOINT and KEY"),
        (["caption-coco", "--few-shot", "2"], "examples before"),
        (["caption-coco", "--dynamics"], "no such flag; remove it"),
        (
            ["caption-coco", "--limit", "5"],
            "type `internvl evaluate CHECKPOINT TASK --limit …`, or",
        ),
        (["caption-coco", "--cot"], "is no option of caption-coco"),
    ],
)
def test_refused(chat, words, message):
    with pytest.raises(ConfigError, match=message):
        evaluation.translate([chat, *words], {})


def test_gpus_is_a_number(chat):
    with pytest.raises(ConfigError, match="GPUS=four"):
        command(chat, "caption-coco", GPUS="four")


def test_the_subtask_of_mme_realworld(chat):
    words = [chat, "mme—realworld", "--dynamic", "--subtask", "OCR with Complex Context"]
    (line,) = evaluation.translate(words, {}).commands
    assert line[line.index("--subtask") + 1] == "OCR with Complex Context"
    assert line[2] == "mme-realworld"


def test_a_released_model_that_was_not_fetched(chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "internvl models InternVL2-8B --download --to pretrained/InternVL2-8B"
    with pytest.raises(ConfigError, match=command):
        evaluation.translate(["pretrained/InternVL2-8B", "caption-coco"], {})
    with pytest.raises(ModelFolderError, match=r"did you mean pretrained/InternVL2-2B\?"):
        evaluation.translate(["pretrained/InternVL2-2C", "caption-coco"], {})
