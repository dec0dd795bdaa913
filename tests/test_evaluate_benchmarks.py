"""Every benchmark through the product: a tiny model, drawn files, a score or a file to submit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_folders import prompt_folder
from drawn_benchmarks import Drawn

from internvl import evaluate
from internvl.datasets import published, tasks
from internvl.evals import benchmark
from internvl.report import results
from internvl.report.results.compare import compare

KEYS = [name for name, task in tasks.tasks().items() if task.sets]
FAST = ("vqa-chartqa-test", "mmbench-test-cn", "mmmu-val", "mirb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prompt_folder("internlm2.internlm2-chat", tmp_path_factory.mktemp("tiny") / "org/model")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Answers of at most 4 tokens: a tiny model never ends one, and some may have 4,096."""
    own = benchmark._settings

    def settings(dataset, config):
        asked = own(dataset, config)
        return replace(asked, max_new_tokens=4, min_new_tokens=min(asked.min_new_tokens, 4))

    monkeypatch.setattr(benchmark, "_settings", settings)


def measured(folder, keys, tmp_path, **options):
    root = tmp_path / "data"
    drawn = {dataset.name: dataset for key in keys for dataset in tasks.tasks()[key].sets.values()}
    for dataset in drawn.values():
        Drawn(dataset, root)
    return evaluate.measure(folder, keys, root=root, to=tmp_path / "out", device="cpu", **options)


def check(result, key):
    """A key gives rows, the original's files, and a number for every set that has a score."""
    counts = result.counts[key]
    rows = (result.folder / "result" / f"{key}.jsonl").read_text().splitlines()
    assert len(rows) == counts["questions"] > 0
    assert [row for row in map(json.loads, rows) if "reason" in row] == []
    own = {name: value for name, value in result.metrics.items() if name.startswith(f"{key}/")}
    for prefix, dataset in tasks.tasks()[key].sets.items():
        names = [name.partition("/")[2] for name in own]
        assert any(name.startswith(prefix) for name in names), key
        if not dataset.score:
            assert dataset.submit or dataset.judge or dataset.split == "dev"


def test_a_few_keys_come_to_their_score_or_file(folder, tmp_path):
    result = measured(folder, FAST, tmp_path, corrected=True)
    for key in FAST:
        check(result, key)
    files = [path.name for path in (result.folder / "result").rglob("*") if path.is_file()]
    assert any(name.startswith("mmbench_test_cn_20231003_") for name in files)
    assert "vqa-chartqa-test/accuracy" in result.metrics
    assert "mirb/corrected_accuracy" in result.metrics
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    settings = json.loads((result.folder / "settings.json").read_text())
    for key in FAST:
        assert f"<h2>{key}</h2>" in page
        assert settings["evaluations"][key]["counts"] == result.counts[key]
    # Images of tables and cells have small copies; those of files are read.
    for key in ("mmbench-test-cn", "mmmu-val"):
        assert [*(result.folder / f"result/{key}_images").glob("*.jpg")]
    assert page.count("data:image/jpeg") >= 4
    folder = results.read(result.folder)
    for of_name in compare(folder, folder):
        assert of_name.summary == "no item changed"
        assert {c.interval for c in of_name.changes} <= {None, (0.0, 0.0)}


@pytest.mark.slow  # 27 s on two cores
def test_every_key_comes_to_its_score_or_file(folder, tmp_path):
    result = measured(folder, KEYS, tmp_path, corrected=True)
    for key in KEYS:
        check(result, key)


@pytest.mark.slow
def test_reasoning_where_the_original_can_ask_for_it(folder, tmp_path):
    keys = [k for k in KEYS if any(d.cot for d in tasks.tasks()[k].sets.values())]
    assert set(keys) >= {"scienceqa", "pope", "mmhal", "mathvista-testmini"}
    result = measured(folder, keys, tmp_path, cot=True)
    for key in keys:
        check(result, key)


def test_the_guide_has_a_row_for_every_key():
    page = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    # The table of keys, not that of judges after it.
    table = page.partition("## Judges")[0].splitlines()
    rows = {line.split("`")[1]: line for line in table if line.startswith("| `")}
    for key in KEYS:
        for dataset in tasks.tasks()[key].sets.values():
            wanted = [f"`{file.path}`" for file in dataset.files.values()]
            wanted += ["judge"] * bool(dataset.judge)
            wanted += [f"]({dataset.submit.rpartition(' ')[2]})"] * bool(dataset.submit)
            assert [text for text in wanted if text not in rows[key]] == [], key


def test_the_originals_71_keys_are_there():
    names = {*tasks.tasks(), *(name for name in published.TASKS if name.startswith("caption-"))}
    assert len(names) == 71
