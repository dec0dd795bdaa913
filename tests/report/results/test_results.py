"""Result folders are read, and what is none is named."""

import json
from pathlib import Path

import pytest
from result_folders import result_folder

from internvl.errors import ConfigError, UserError
from internvl.report import results


def test_a_folder_a_run_and_a_file_are_read(tmp_path: Path):
    folder = result_folder(tmp_path / "a", "my/vqa", [], {"accuracy": 0.5}, settings={"tiles": 6})
    result_folder(folder, "mme", [], {"perception": 1500.0, "computed": "float32"})
    read = results.read(folder)
    assert read.metrics == {"my/vqa": {"accuracy": 0.5}, "mme": {"perception": 1500.0}}
    assert read.model == "org/a"
    assert read.settings_of("my/vqa") == {"settings": {"tiles": 6}}
    # The folder of a model, with a single result.
    assert results.read(tmp_path).metrics == read.metrics
    run = tmp_path / "run"
    (run / "evals").mkdir(parents=True)
    for step, value in ((100, 0.1), (20, 0.9)):
        (run / f"evals/{step:06d}.json").write_text(json.dumps({"val/exact": value}))
    assert results.read(run).metrics == {"val": {"exact": 0.1}}
    assert results.read(run / "evals/000020.json").metrics == {"val": {"exact": 0.9}}
    assert results.read(run).model == str(run / "evals/000100")


def test_what_is_no_result_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is neither result.json"):
        results.read(tmp_path)
    for name in ("a", "b"):
        result_folder(tmp_path / name, "x", [], {"score": 1.0})
    with pytest.raises(ConfigError, match="holds several results: .*a, .*b; name one"):
        results.read(tmp_path)
    with pytest.raises(UserError, match=r"gone\.jsonl is missing"):
        results.read(tmp_path / "a").items("gone")
    (tmp_path / "a/result/x.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl line 1 is no row of an evaluation"):
        results.read(tmp_path / "a").items("x")
    (tmp_path / "a/settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        results.write_settings(tmp_path / "a", "m", {}, {})


def test_ratings_are_neither_right_nor_wrong(tmp_path: Path):
    rows = [
        {"images": [], "question": "?", "answer": f"{score}", "score": score} for score in (0, 1, 6)
    ]
    items = results.read(result_folder(tmp_path, "mmhal", rows, {"score": 7 / 3})).items("mmhal")
    assert [item.right for item in items] == [None] * 3
    items = results.read(result_folder(tmp_path, "x", rows[:2], {"score": 0.5})).items("x")
    assert [item.right for item in items] == [False, True]
