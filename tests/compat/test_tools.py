"""The original's tools."""

import json

import pytest
from original_trees import chat_model

from internvl import compat
from internvl.compat import tools
from internvl.errors import ConfigError


def test_merge_lora_takes_the_originals_code_along(tmp_path):
    folder = chat_model(tmp_path / "base")
    done = tools.merge_lora([f"{folder}/", "out"], {})
    words = (*("merge", str(folder), "--to", "out", "--format", "official"), "--code-from")
    assert done.commands == ((*words, str(folder)),)
    (folder / "modeling_internvl_chat.py").unlink()
    assert tools.merge_lora([str(folder), "out/"], {}).commands == (words[:-1],)
    with pytest.raises(ConfigError, match="an input and an output"):
        tools.merge_lora(["one"], {})


def test_conversions(tmp_path):
    words = ["--custom_path", "a", "--hf_path", "b", "--save_path", "c"]
    assert tools.custom2hf(words, {}).commands == (("export", "a", "--to", "c", "--format", "hf"),)
    back = tools.hf2custom(words, {})
    assert back.commands == (("export", "b", "--to", "c", "--format", "official"),)
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({}))
    (folder / "code.py").touch()
    words[1] = str(folder)
    assert tools.hf2custom(words, {}).commands[0][-2:] == ("--code-from", str(folder))
    with pytest.raises(ConfigError, match="--save_path: missing"):
        tools.custom2hf(words[:4], {})


@pytest.mark.parametrize("name", tools.without_command())
def test_a_tool_without_a_command_tells_why(name):
    with pytest.raises(ConfigError, match=f"{name}.py: "):
        compat.translate(f"{name}.py", [], {})
