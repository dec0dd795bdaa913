"""The scripts behind the figures run: on a CPU, with tiny models, through the real loop."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from data_files import picture

ROOT = Path(__file__).parent.parent


def run(script, *words):
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_training_rates():
    (row,) = run("train.py", "--tiny", "2b_coco_shared")
    assert row["samples_per_step"] == 10
    assert len(row["loss"]) == 4
    assert 0 < row["fill"] <= 1


def test_memory_table():
    (row,) = run("memory.py", "--tiny", "2b_lora_selective")
    assert row["error"]["states"] == pytest.approx(0, abs=1e-3)
    assert len(row["step_s"]) == 3
    assert row["predicted"]["total_gib"] > row["predicted"]["allocated_gib"] > 0


def test_learning_goes_on_where_it_stopped(tmp_path):
    captions = {}
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as packed:
        for split, count in (("train", 4), ("val", 2)):
            for number in range(count):
                name = f"{split}/{number}.jpg"
                packed.write(picture(tmp_path / name, (128, 128)), name)
                texts = {"en": [f"A photo {number} ."] * 5, "zh": [f"照片{number}。"] * 5}
                captions[name] = {"split": split, **texts}
        packed.writestr("captions.json", json.dumps(captions))
    words = [str(tmp_path / "photos.zip"), "--to", str(tmp_path / "to"), "--tiny", "--seeds", "0"]
    ran, arms = run("learning.py", *words, "--arms", "shared")
    assert ran["samples"] == 640
    assert {"loss", "en_cider", "zh_bleu_4"} <= ran.keys()
    tree = json.loads((tmp_path / "to" / "learning.json").read_text())
    losses = tree["results"]["shared-0"]["train_loss"]
    assert losses[-1] < losses[0]
    assert run("learning.py", *words, "--arms", "shared") == [arms]  # not again


def test_exactness_of_shared_rows():
    (row,) = run("exactness.py", "--cpu", "--methods", "lora", "--only", "shared")
    assert row["within"]
    assert row["loss"] < 1e-6


def test_recall_beside_the_dense_matrix():
    chunked, dense = run("recall.py", "--small")
    assert (chunked["method"], dense["method"]) == ("chunked", "dense")
    assert chunked["metrics"] == dense["metrics"]
    assert 0 < chunked["metrics"]["image_retrieval_recall@1"] < 1
