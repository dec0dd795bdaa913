"""`internvl compat`: what is printed, and what runs."""

import pytest
from command_line import call

from internvl import compat
from internvl.cli import compat as words
from internvl.errors import ConfigError

LORA = "shell/internvl2.0/2nd_finetune/internvl2_2b_internlm2_1_8b_dynamic_res_2nd_finetune_lora.sh"


def test_the_help_lists_every_command(capsys):
    assert set(words.COMMANDS) == set(compat.COMMANDS)
    code, out, _ = call(capsys, "compat", "--help")
    assert code == 0
    assert all(name in out for name in compat.COMMANDS)
    code, out, _ = call(capsys, "compat", "merge_lora", "--help")
    assert (code, out) == (0, "internvl compat merge_lora INPUT OUTPUT\n")


def test_a_dry_run_prints_recipe_and_command_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "compat", "shell", LORA, "--dry-run")
    assert code == 0
    assert "global_batch: 16" in out
    assert "\ninternvl train work_dirs/" in out
    assert "changes nothing" in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_with_its_own_errors(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "compat", "shell", LORA)
    assert code == 1
    assert "pretrained/InternVL2-2B: no such folder" in err
    assert (tmp_path / out.split("internvl train ")[-1].split()[0]).is_file()


def test_no_such_command():
    with pytest.raises(ConfigError, match="did you mean evaluate.sh"):
        compat.translate("evaluat.sh", [], {})
    with pytest.raises(ConfigError, match="known: evaluate.sh"):
        compat.translate("xyzzy", [], {})
