"""Evaluation inside a run, of its folder, and of what was exported: the same numbers."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import tiny_run
from tiny_run import recipe_of

from internvl import evaluate, export, train
from internvl.errors import UserError


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe of a project whose start model all tests of this file share."""
    return tiny_run.make(tmp_path_factory.mktemp("project"))


def test_an_evaluation_cut_off_by_a_kill_is_made_up_for(project, tmp_path):
    folder = project.parent
    spec = f"{{annotations: {folder}/captions.json, images: {folder}, prompt: Name it, "
    spec += "metrics: exact, limit: 3, max_new_tokens: 3, every: 5, before: true}"
    recipe = recipe_of(project, tmp_path, "steps=7", f"evals.shapes={spec}")
    train.run(recipe)
    made = sorted(path.name for path in (recipe.run / "evals").glob("*.json"))
    assert made == ["000000.json", "000005.json", "000007.json"]
    # As a kill within the evaluation at step 5 leaves it.
    for name in ("finished.json", "evals/000005.json", "evals/000007.json"):
        (recipe.run / name).unlink()
    for name in ("000007",):
        shutil.rmtree(recipe.run / "checkpoints" / name)
    train.run(recipe)
    assert sorted(path.name for path in (recipe.run / "evals").glob("*.json")) == made


def evaluated(project):
    folder = project.parent
    captions = (
        f"{{annotations: {folder / 'captions.json'}, images: {folder}, prompt: 'What is this?'"
    )
    loss = f"{{type: loss, annotations: {folder / 'train.jsonl'}, images: {folder}}}"
    return [
        f"evals.captions={captions}, metrics: exact, max_new_tokens: 8, batch_size: 5}}",
        f"evals.held={loss}",
    ]


def answers_of(folder):
    return {file.name: file.read_text() for file in folder.glob("*.jsonl")}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_measures_the_same_inside_and_outside(project, tmp_path, dtype, method):
    lora = ["model.train=[]", "model.lora={rank: 4}", "compute.attention=eager"]
    overrides = [*evaluated(project), f"dtype={dtype}", *(lora if method == "lora" else [])]
    run = train.run(recipe_of(project, tmp_path, "steps=2", *overrides))
    inside = json.loads((run / "evals/000002.json").read_text())
    to = tmp_path / "outside"
    outside = evaluate.measure(run, device="cpu", to=to)
    assert outside.metrics == inside
    assert json.loads((to / "result.json").read_text()) == inside
    assert answers_of(to / "result") == answers_of(run / "evals/000002")
    inner = "bfloat16 autocast" if dtype == "bfloat16" else dtype
    assert outside.computed.startswith(f"{inner}, cpu, attention")
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    outer = "bfloat16 autocast" if other == "bfloat16" else other
    said = f"{outer}; inside the run: {inner}"
    found = evaluate.measure(run, ["held"], device="cpu", dtype=other, to=to)
    assert found.computed == said
    written = json.loads((to / "result.json").read_text())
    assert written["held/computed"] == said
    assert "captions/computed" not in written
    assert found.metrics["held/loss"] != inside["held/loss"]
    # The file with that text is read by the next evaluation, which removes it.
    evaluate.measure(run, ["held"], device="cpu", to=to)
    assert json.loads((to / "result.json").read_text()) == inside


@pytest.mark.parametrize("format", ["hf", "official"])
def test_an_export_measures_what_its_run_measured(project, tmp_path, format):
    run = train.run(recipe_of(project, tmp_path, "steps=2", *evaluated(project)))
    inside = json.loads((run / "evals/000002.json").read_text())
    export.run(run, tmp_path / "export", format)
    folder = project.parent
    found = evaluate.measure(
        tmp_path / "export",
        device="cpu",
        to=tmp_path / "outside",
        annotations=folder / "captions.json",
        images=folder,
        prompt="What is this?",
        metrics="exact",
        max_new_tokens=8,
        batch_size=5,
    )
    names = ("exact", "average_length")
    assert [found.metrics[f"caption-file/{n}"] for n in names] == [
        inside[f"captions/{n}"] for n in names
    ]
    answers = tmp_path / "outside/result/caption-file.jsonl"
    assert answers.read_text() == (run / "evals/000002/captions.jsonl").read_text()
    assert found.computed == "float32"
    # The same of the answers alone.
    texts = {"annotations": folder / "captions.json", "metrics": "exact", "to": tmp_path / "scored"}
    assert evaluate.score(answers, **texts).metrics == found.metrics
    (original,) = (tmp_path / "outside/result").glob("captions_*.json")
    assert evaluate.score(original, **texts).metrics == found.metrics
    half = evaluate.measure(
        tmp_path / "export",
        device="cpu",
        dtype="bfloat16",
        to=tmp_path / "half",
        annotations=folder / "captions.json",
        images=folder,
        limit=2,
        metrics="exact",
    )
    assert half.computed == "bfloat16; the folder's weights: float32"


def test_a_second_evaluation_leaves_the_first_ones_results(project, tmp_path, monkeypatch):
    """A folder for each call: another task, other options, another model of the same name."""
    monkeypatch.chdir(tmp_path)
    folder = project.parent
    for name in ("one", "two"):
        shutil.copytree(folder / "start", tmp_path / name / "a/model")
    texts = {"annotations": folder / "captions.json", "images": folder, "metrics": "exact"}

    def folder_of(model, *tasks, **options):
        keys = {**texts, "limit": 2, "max_new_tokens": 2, **options}
        return evaluate.measure(model, tasks, device="cpu", **keys).folder

    first = folder_of("one/a/model")
    assert first == Path("out/evaluate/a-model/caption-file-captions")
    results = json.loads((first / "result.json").read_text())
    assert sorted(path.name for path in first.iterdir() if path.suffix != ".json") == [
        *("report.html", "result", "result.jsonl"),
    ]
    # The same call, and other names of the same files.
    assert folder_of("one/a/model") == first
    assert folder_of("one/../one/a/model", "caption-file") == first
    assert len((first / "result.jsonl").read_text().splitlines()) == 3
    others = [folder_of("one/a/model", limit=1), folder_of("two/a/model")]
    assert [other.name for other in others] == [f"{first.name}-2", f"{first.name}-3"]
    assert json.loads((first / "result.json").read_text()) == results
    assert json.loads((others[0] / "call.json").read_text())["limit"] == 1
    # Needs a GPU to be measured; its results are others in any case.
    with suppress(UserError):
        folder_of("one/a/model", quantize="4bit")
    call = first.with_name(f"{first.name}-4") / "call.json"
    assert json.loads(call.read_text())["quantize"] == "4bit"
    other = tmp_path / "words.json"
    shutil.copy(folder / "captions.json", other)
    assert folder_of("one/a/model", annotations=other).name == "caption-file-words"


def test_a_run_has_a_folder_for_each_step(project, tmp_path):
    spec = f"{{annotations: {project.parent}/captions.json, images: {project.parent}, "
    spec += "prompt: Name it, metrics: exact, limit: 1, max_new_tokens: 1, every: 0}"
    for steps in (1, 2):
        run = recipe_of(project, tmp_path, f"steps={steps}", f"evals.shapes={spec}")
        shutil.rmtree(run.run, ignore_errors=True)
        train.run(run)
        expected = run.run / f"evals/evaluate/{steps:06d}/shapes"
        assert evaluate.measure(run.run, device="cpu").folder == expected
        assert (expected / "result.json").exists()


def test_a_name_of_no_run_or_model_is_said_before_all_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name, said in {
        "runs/nope": "runs/nope: there is no such run or model; `ls runs` shows others",
        "runs/min": "runs/min: there is no such run or model; did you mean runs/mine?",
        "work_dirs/nope": "work_dirs/nope: there is no such run or model; `internvl train RECI",
        "./pretrained/X": "./pretrained/X: no such folder; fetch a release into it with `intern",
        "nope": "nope: no such folder, and not a hub id of the form owner/name",
        "./no/folder": "./no/folder: no such folder",
        "owner/nope": "owner/nope: there is no such run; to evaluate a model of the hub, name a",
    }.items():
        with pytest.raises(UserError) as refused:
            evaluate.run(name)
        assert str(refused.value).startswith(said)
        with pytest.raises(UserError) as refused:
            evaluate.run(name, "no-task")
        assert str(refused.value).startswith(said if "owner" not in name else "there is no task")
