"""Which files are named for their CPU seconds, and what is committed of a run."""

import json

import cpu_seconds
import pytest

COMMITTED = {"fast": {f"test_{n}.py": 10.0 for n in range(12)}}


def measured(slowness, **seconds):
    files = {path: usual * slowness for path, usual in COMMITTED["fast"].items()}
    return {"fast": files | {f"{name}.py": value for name, value in seconds.items()}}


@pytest.mark.parametrize("slowness", [0.5, 1.0, 7.0])
def test_a_file_is_over_its_budget_on_a_machine_of_any_speed(slowness):
    assert cpu_seconds.excesses(measured(slowness), COMMITTED) == []
    (line,) = cpu_seconds.excesses(measured(slowness, test_3=21 * slowness), COMMITTED)
    assert line.startswith("test_3.py (fast): ")
    assert cpu_seconds.excesses(measured(slowness, test_new=12 * slowness), COMMITTED) == []
    (line,) = cpu_seconds.excesses(measured(slowness, test_new=13 * slowness), COMMITTED)
    assert line.startswith("test_new.py (fast): ")


def test_a_few_files_are_not_judged():
    assert cpu_seconds.excesses({"fast": {"test_3.py": 1000.0}}, COMMITTED) == []


def test_a_run_replaces_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_seconds, "DURATIONS", tmp_path / "durations.json")
    (tmp_path / "data").mkdir()
    for name in ("data/test_a.py", "test_b.py"):
        (tmp_path / name).touch()
    committed = {"fast": {"test_b.py": 5.0, "test_gone.py": 9.0}, "slow": {"test_b.py": 50.0}}
    cpu_seconds.write({"fast": {"data/test_a.py": 1.26, "test_b.py": 4.0}}, committed)
    assert json.loads((tmp_path / "durations.json").read_text()) == {
        "fast": {"data/test_a.py": 1.3, "test_b.py": 4.0},
        "slow": {"test_b.py": 50.0},
    }
