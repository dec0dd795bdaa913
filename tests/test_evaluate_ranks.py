"""`internvl evaluate` on several ranks: killed, gone on with on others, and refused."""

import json
from pathlib import Path

import pytest
from dual_folders import add_small_tokenizer, dual_folder
from photos import COLORS, photo
from ranks import run_ranks

from internvl import evaluate

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
    files = [*folder.glob("features/*/captions-*/*.jsonl")]
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
    return folder


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
    files = [folder / "result.json", *(folder / "result").iterdir()]
    return {file.name: file.read_text() for file in files}


@pytest.mark.slow
def test_an_evaluation_killed_five_times_is_an_undisturbed_one(project, tmp_path) -> None:
    model, options = str(project / "InternVL-tiny"), options_of(project)
    evaluate.measure(model, TASKS, to=tmp_path / "alone", device="cpu", **options)
    to = tmp_path / "killed"
    keys = {"to": str(to), "model": model, "tasks": TASKS, "options": options}
    # Ranks, and rank -> after how many more answers and features it is killed.
    kills = [(2, {0: 3}), (2, {1: 1}), (1, {0: 4}), (4, {3: 1}), (2, {0: 5, 1: 5})]
    for num_ranks, kill in kills:
        with pytest.raises(AssertionError, match="failed"):
            run_ranks(MEASURE.format(kill=kill, **keys), num_ranks=num_ranks)
        assert not (to / "result.jsonl").exists()
    torn = next(iter(to.glob("features/*/captions-*/*.jsonl")))
    with torn.open("a") as file:
        file.write('{"item": 0, "answer": "hal')
    counts = {
        "caption-file": {"images": 30, "texts": 30},
        "retrieval-folder": {"images": 30, "texts": 30},
    }
    assert run_ranks(MEASURE.format(kill={}, **keys)) == [f"2 {counts}\n"] * 2
    assert results(to) == results(tmp_path / "alone")
    assert not (to / "features").exists()
