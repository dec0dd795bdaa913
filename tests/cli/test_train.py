"""The train verb: what a person reads while it trains, in the log file and at the end."""

import os
import re
import signal

import pair_runs
import pytest
import tiny_run
from command_line import call, on_terminal
from tiny_run import command, recipe_of

from internvl import log, train
from internvl.data import workers
from internvl.errors import DataError
from internvl.training import run_folder

STEP = r"of 4 steps \(\d+%\), (took )?[\d:]+( left)?, loss \d\.\d{4}, lr \d\.\d\de[-+]\d\d, "
STEP += r"[\d,.]+ (samples/s|s/sample), [\d,.]+ (steps/s|s/step)$"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def test_lines_of_training_and_the_next_commands(capsys, project, tmp_path):
    run = tmp_path / "my run"
    words = ["train", project, f"run={run}", "steps=4", "checkpoint.every=3"]
    code, out, err = call(capsys, *words)
    assert code == 0
    assert out.splitlines() == [
        "To use the trained model:",
        f"  internvl evaluate '{run}' --annotations FILE",
        f"  internvl chat '{run}' --image FILE",
        f"  internvl export '{run}' --to '{run}-exported'",
    ]
    assert len(re.findall(rf"1 {STEP}", err, re.M)) == len(re.findall(rf"4 {STEP}", err, re.M)) == 1
    for step in (3, 4):
        folder = run / f"checkpoints/{step:06d}"
        assert re.search(rf"step {step}: checkpoint {folder} written \(\d+ MiB, \d+\.\d s\)", err)
    # The file has the same lines, and the day before the time.
    saved = (run / "train.log").read_text(encoding="utf-8")
    undated = re.sub(r"^\d{4}-\d\d-\d\d ", "", saved, flags=re.M)
    assert {*undated.splitlines()} <= {*err.splitlines()}
    assert undated.splitlines()[-1] == err.splitlines()[-1]
    call(capsys, *words)
    appended = (run / "train.log").read_text(encoding="utf-8")
    assert appended.startswith(saved)
    assert "is finished" in appended.removeprefix(saved)


def test_a_terminal_shows_a_bar_and_its_last_line_stays(project, tmp_path):
    out = on_terminal(command(project, tmp_path / "run", "steps=4"), tmp_path)
    # Drawn over, the bar leaves spaces before the next line.
    assert re.search(rf"4 {STEP}", out.replace("\r", "\n"), re.M), out
    assert "1 of 4 steps" not in out
    assert "1 of 4 steps (25%)" in (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert out.rstrip().endswith("-exported")


def test_an_interrupted_run_names_its_commands_too(capsys, project, tmp_path, monkeypatch):
    train_step = train.train_step

    def interrupted(state, batches):
        step_metrics = train_step(state, batches)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step_metrics

    run = tmp_path / "run"
    words = ["train", project, f"run={run}", "steps=4"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        code, out, err = call(capsys, *words)
    last = "stopped at step 2 of 4; checkpoint written. The same command goes on from there"
    assert (code, err.splitlines()[-1]) == (1, f"internvl: {last}")
    assert f"  internvl chat {run} --image FILE" in out
    log_file = run / "train.log"
    assert log_file.read_text(encoding="utf-8").endswith(f"{last}\n")
    code, out, err = call(capsys, *words)
    assert (code, "3 of 4 steps (75%)" in err) == (0, True)
    assert log_file.read_text(encoding="utf-8").count("4 of 4 steps (100%)") == 1


def test_a_run_that_failed_before_its_first_step_may_be_changed(project, tmp_path):
    failed = recipe_of(project, tmp_path, "steps=1")
    with run_folder.owned(failed), pytest.raises(DataError), log.also_to(failed.run / "train.log"):
        raise DataError("a.jsonl: cut; fetch it again")
    with run_folder.owned(recipe_of(project, tmp_path, "steps=2")):
        assert "cut; fetch it again" in (failed.run / "train.log").read_text(encoding="utf-8")


def test_too_many_workers_are_warned_of_once(capsys, project, tmp_path, recwarn):
    cores = len(os.sched_getaffinity(0))
    workers.warn_of_idle_workers.cache_clear()
    many = f"data.workers={cores + 1}"
    code, _, err = call(capsys, "train", project, f"run={tmp_path / 'run'}", "steps=2", many)
    assert code == 0
    sentence = rf"data\.workers = {cores + 1}, but this process has {cores} CPU cores?: more"
    assert len(re.findall(sentence, err)) == 1
    assert not [w for w in recwarn if "worker" in str(w.message)]


def test_retrieval_is_a_table_while_training_and_has_its_commands(capsys, tmp_path):
    pairs = tmp_path / "pairs"
    spec = f"{{type: retrieval, annotations: {pairs}/captions.txt, images: {pairs}, limit: 6, "
    spec += "recall_k: [1, 5]}"
    recipe = pair_runs.make(pairs)
    code, out, err = call(capsys, "train", recipe, "steps=1", f"evals.shapes={spec}")
    assert code == 0
    lines = err.splitlines()
    start = next(n for n, line in enumerate(lines) if line.endswith("shapes at step 1: "))
    assert re.fullmatch(r"  recall in % +R@1 +R@5 *", lines[start + 1])
    assert [line[2:26] for line in lines[start + 2 : start + 6]] == [
        f"InternVL-{mode}  {direction}"
        for mode in "CG"
        for direction in ("text → image", "image → text")
    ]
    assert lines[start + 3].split()[-2] == "mean"
    assert "_retrieval_recall@" not in err
    assert f"  internvl evaluate {pairs / 'run'}" in out.splitlines()
    assert f"  internvl evaluate {pairs / 'run'} retrieval-folder --annotations FILE" in out
    assert "internvl chat" not in out
