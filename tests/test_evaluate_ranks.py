"""`internvl evaluate` on several ranks: killed, gone on with on others, and refused."""

import json
import re
from pathlib import Path

import pytest
import tiny_run
import yaml
from chat_folders import prompt_folder
from dual_folders import add_small_tokenizer, dual_folder
from photos import COLORS, photo
from ranks import run_ranks

from internvl import evaluate, train
from internvl.config import recipes

TASKS = ["caption-file", "retrieval-folder"]

MEASURE = """
import os
import signal
import threading
import time
from pathlib import Path

from internvl import dist, evaluate

folder, last_words = Path({to!r}), {kill!r}
rank = int(os.environ["RANK"])


def progress():
    names = ("captions", "answers")
    files = [f for name in names for f in folder.glob(f"features/*/{{name}}-*/*.jsonl")]
    lines = sum(file.read_bytes().count(b"\\n") for file in files)
    return lines + len([*folder.glob("features/*/*/*.safetensors")])


def watch(end):
    while progress() < end:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


if rank in last_words:
    end = progress() + last_words[rank]
    threading.Thread(target=watch, args=(end,), daemon=True).start()
measured = evaluate.measure({model!r}, {tasks!r}, to=folder, device="cpu", **{options!r})
print(measured.ranks, measured.counts)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A small InternVL-14B, thirty images, and captions of them."""
    folder = tmp_path_factory.mktemp("project")
    add_small_tokenizer(dual_folder(folder / "InternVL-tiny"))
    tree: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for n in range(30):
        photo(folder / f"{n}.jpg", n, (60 + 5 * n, 80))
        tree["images"].append({"id": n, "file_name": f"{n}.jpg"})
        text = f"Something {COLORS[n % len(COLORS)]}, {n}."
        tree["annotations"].append({"id": n, "image_id": n, "caption": text})
    (folder / "captions.json").write_text(json.dumps(tree))
    for n in range(6):
        for k in range(1 + n % 2):
            photo(folder / f"classes/n{n}/{k}.jpg", 10 * n + k, (50 + 60 * k, 90))
    return folder


def pairs_recipe(project: Path) -> dict:
    """A recipe of one step with every evaluation that InternVL-14B has, before the step too."""
    files = {"annotations": str(project / "captions.json"), "images": str(project)}
    texts = {"metrics": "exact", "max_new_tokens": 4, "batch_size": 4, "num_beams": 2}
    classes = str(project / "classes")
    return {
        "model": {"id": str(project / "InternVL-tiny"), "train": ["heads"]},
        "data": {
            "sources": [{"name": "pairs", "type": "captions", **files}],
            "tiles": {"size": 84, "max": 1},
            "max_tokens": 80,
            "workers": 0,
        },
        "objective": {"name": "retrieval"},
        "evals": {
            "texts": {**files, **texts, "before": True},
            "pairs": {**files, "type": "retrieval", "batch_size": 2, "rerank": 2, "before": True},
            "classes": {
                "type": "classify",
                "annotations": classes,
                "batch_size": 1,
                "before": True,
            },
        },
        "global_batch": 6,
        "steps": 1,
        "dtype": "float32",
        "device": "cpu",
    }


def options_of(project: Path) -> dict:
    return {
        "annotations": str(project / "captions.json"),
        "images": str(project),
        "metrics": "exact",
        "max_new_tokens": 4,
        "batch_size": 1,
        "rerank": 3,
    }


def results(folder: Path) -> dict[str, str]:
    """Name of a result file, without the time in it -> its content."""
    files = [folder / "result.json", *(folder / "result").iterdir()]
    return {re.sub(r"_\d{12}", "_time", file.name): file.read_text() for file in files}


KILLS = [(2, {0: 3}), (2, {1: 1}), (1, {0: 4}), (4, {3: 1}), (2, {0: 5, 1: 5})]
"""Ranks, and rank -> after how many more answers and features it is killed."""


def kill_five_times(tmp_path: Path, model: str, tasks: list[str], options: dict) -> list[str]:
    """Kills an evaluation again and again and holds what it ends with to one left alone; returns
    what its two last ranks print."""
    evaluate.measure(model, tasks, to=tmp_path / "alone", device="cpu", **options)
    to = tmp_path / "killed"
    keys = {"to": str(to), "model": model, "tasks": tasks, "options": options}
    for num_ranks, kill in KILLS:
        with pytest.raises(AssertionError, match="failed"):
            run_ranks(MEASURE.format(kill=kill, **keys), num_ranks=num_ranks)
    torn = next(
        f for f in to.rglob("*.jsonl") if f.parent.name.startswith(("captions-", "answers-"))
    )
    with torn.open("a") as file:
        file.write('{"item": 0, "answer": "hal')
    printed = run_ranks(MEASURE.format(kill={}, **keys))
    assert results(to) == results(tmp_path / "alone")
    assert not (to / "features").exists()
    return printed


@pytest.mark.slow
def test_an_evaluation_killed_five_times_is_an_undisturbed_one(project, tmp_path) -> None:
    counts = {
        "caption-file": {"images": 30, "texts": 30},
        "retrieval-folder": {"images": 30, "texts": 30},
    }
    model = str(project / "InternVL-tiny")
    printed = kill_five_times(tmp_path, model, TASKS, options_of(project))
    assert printed == [f"2 {counts}\n"] * 2


@pytest.mark.slow
def test_questions_to_a_chat_model_killed_five_times(project, tmp_path) -> None:
    # Many, for a rank that is not killed answers all of its share.
    rows = []
    for n in range(200):
        asked = {"from": "human", "value": f"<image>\nWhich color has {n}?"}
        answered = {"from": "gpt", "value": COLORS[n % len(COLORS)]}
        rows.append({"conversations": [asked, answered], "image": f"{n % 30}.jpg"})
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(prompt_folder("internlm2.internlm2-chat", tmp_path / "chat"))
    options = {"annotations": str(file), "images": str(project), "metric": "exact"}
    options |= {"max_new_tokens": 4, "batch_size": 1}
    printed = kill_five_times(tmp_path, model, ["qa-file"], options)
    assert printed == ["2 {'qa-file': {'questions': 200}}\n"] * 2


EVERYWHERE = """
import json
import os
from pathlib import Path

from internvl import evaluate, train
from internvl.config import recipes

os.chdir({folder!r})
for recipe in {recipes!r}:
    train.run(recipes.load_recipe(recipe, ["run=" + Path(recipe).stem]))
    evaluate.measure(Path(recipe).stem, device="cpu", to=Path(recipe).stem + "-outside")
for task, options in {tasks!r}.items():
    evaluate.measure({model!r}, task, device="cpu", **options)
"""


@pytest.mark.slow
def test_every_evaluation_is_that_of_one_process(project, tmp_path, tmp_path_factory) -> None:
    """Of captions, loss, retrieval and classes, in a run and by the verb, in folders of its own."""
    files = {"annotations": str(project / "captions.json"), "images": str(project), "before": True}
    texts = {**files, "metrics": "exact", "max_new_tokens": 4, "batch_size": 4}
    chat = tiny_run.make(
        tmp_path_factory.mktemp("chat"),
        steps=1,
        evals={"texts": texts, "held": {**files, "type": "loss", "prompt": "Name it"}},
    )
    classes = {"annotations": str(project / "classes"), "batch_size": 1}
    pairs = pairs_recipe(project)
    for name, tree in (("chat", yaml.safe_load(chat.read_text())), ("pairs", pairs)):
        (project / f"{name}.yaml").write_text(yaml.safe_dump({**tree, "run": name}))
    options = {key: files[key] for key in ("annotations", "images")}
    keys = {
        "recipes": [str(project / f"{name}.yaml") for name in ("chat", "pairs")],
        "model": str(project / "InternVL-tiny"),
        "tasks": {
            "retrieval-folder": {**options, "batch_size": 2},
            "caption-file": {**options, "metrics": "exact", "batch_size": 4},
            "classify-folder": {"annotations": classes["annotations"], "batch_size": 1},
        },
    }
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        run_ranks(EVERYWHERE.format(folder=str(folder), **keys), num_ranks=num_ranks)
    one, two = tmp_path / "1", tmp_path / "2"
    results = sorted(file.relative_to(one) for file in one.rglob("0000*.json"))
    results += sorted(file.relative_to(one) for file in one.rglob("result.json"))
    assert len(results) == 2 * 2 + 2 + 3
    for file in results:
        values, expected = (json.loads((folder / file).read_text()) for folder in (two, one))
        # After a step the weights differ by the rounding of a sum over ranks.
        trained = file.name == "000001.json" or "outside" in file.parts[0]
        assert values == (pytest.approx(expected, rel=1e-4) if trained else expected), file
    for name in ("chat", "pairs"):
        inside = json.loads((two / name / "evals/000001.json").read_text())
        assert json.loads((two / f"{name}-outside/result.json").read_text()) == inside


SHARDED = """
from internvl import train
from internvl.config import recipes

for settings in {cases!r}:
    train.run(recipes.load_recipe({recipe!r}, settings))
"""


@pytest.mark.slow
def test_a_model_in_shards_is_measured_as_a_whole_one(project, tmp_path) -> None:
    """InternVL-14B before the first step, to the last bit; a chat model is in test_train_ranks."""
    recipe = tmp_path / "recipe.yaml"
    tree = {**pairs_recipe(project), "run": str(tmp_path / "alone")}
    recipe.write_text(yaml.safe_dump(tree))
    alone = train.run(recipes.load_recipe(recipe))
    stages = ("zero1", "zero3")
    cases = [[f"parallel.shard={stage}", f"run={tmp_path / stage}"] for stage in stages]
    run_ranks(SHARDED.format(recipe=str(recipe), cases=cases))
    for stage in stages:
        for file in ("000000.json", *(f"000000/{n}.jsonl" for n in ("texts", "pairs", "classes"))):
            found = (tmp_path / stage / "evals" / file).read_text()
            assert found == (alone / "evals" / file).read_text(), (stage, file)
