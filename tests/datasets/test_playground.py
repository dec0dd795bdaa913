"""The chat data of the releases: where they lie, from archives, what is missing."""

import json
import zipfile
from pathlib import Path

import pytest
from dataset_trees import chat, missing, touch, write

from internvl.datasets import checklist, playground, prepare
from internvl.datasets import download as fetch

pytestmark = pytest.mark.usefixtures("small")

PUBLISHED = checklist.EXPECTED


def sft(base: Path) -> None:
    for folder in playground.SFT_IMAGES:
        touch(base / "data" / folder, "1.jpg")
    images = {"": "gqa/images/1.jpg", "coco": "train2017/1.jpg", "docvqa": "train/1.jpg"}
    images["chartqa"] = "test/1.jpg"
    for name, folder in playground.SFT_FOLDERS.items():
        image = images.get(folder, "images/1.jpg")
        write(base / f"opensource/{name}.jsonl", chat(image) + chat(None))


@pytest.mark.parametrize("place", ["playground", "", "InternVL-Chat-V1-2-SFT-Data"])
def test_sft_where_it_may_lie(tmp_path: Path, place: str) -> None:
    base = tmp_path / place
    sft(base)
    done = prepare.run("sft-v1.2", tmp_path)
    assert done.ready, done.missing
    assert done.counts["samples in all"] == 18
    meta = json.loads(done.files[-1].read_text())
    assert list(meta) == list(playground.SFT_FOLDERS)
    assert meta["geoqa+"] == {
        "root": f"{base}/data/geoqa+/",
        "annotation": f"{base}/opensource/geoqa+.jsonl",
        "data_augment": False,
        "repeat_time": 1,
        "length": 2,
    }


def test_sft_folders_that_lack_are_listed_once(tmp_path: Path) -> None:
    base = tmp_path / "playground"
    sft(base)
    (base / "data/gqa/images/1.jpg").unlink()
    (base / "opensource/geoqa+.jsonl").unlink()
    done = prepare.run("sft-v1.2", tmp_path)
    assert missing(done) == ["images", "geoqa+.jsonl"]
    assert done.missing[0].address.endswith("gqa/images.zip")
    assert not (base / "internvl_1_2_finetune.json").exists()


def test_sft_from_archives_as_they_come(tmp_path: Path) -> None:
    base = tmp_path / "playground"
    sft(base)
    (base / "data/ai2d/abc_images/1.jpg").unlink()
    (base / "data/chartqa/val/1.jpg").unlink()
    (base / "opensource/geoqa+.jsonl").unlink()
    for path, name in (
        ("data/ai2d.zip", "ai2d/abc_images/1.jpg"),
        ("data/chartqa/ChartQA Dataset.zip", "ChartQA Dataset/val/1.jpg"),
    ):
        with zipfile.ZipFile(base / path, "w") as file:
            file.writestr(name, "")
    with zipfile.ZipFile(tmp_path / "playground.zip", "w") as file:
        file.writestr("playground/opensource/geoqa+.jsonl", chat("images/1.jpg"))
    done = prepare.run("sft-v1.2", tmp_path)
    assert done.ready, done.missing


def test_sft_is_fetched_whole_where_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, Path]] = []

    def snapshot(repository: str, folder: Path) -> None:
        fetched.append((repository, folder))
        sft(folder)

    monkeypatch.setattr(fetch, "fetch_snapshot", snapshot)
    assert prepare.run("sft-v1.2", tmp_path, download=True).ready
    assert fetched == [("OpenGVLab/InternVL-Chat-V1-2-SFT-Data", tmp_path / "playground")]


def test_the_published_total() -> None:
    published = [PUBLISHED[f"{name}.jsonl"]["samples"] for name in playground.SFT_FOLDERS]
    assert sum(published) == 1_267_819
    assert len(published) == 9
