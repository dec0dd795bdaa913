"""Data sets from small trees of the documented shape: what is written, counted, missing."""

import io
import json
import zipfile
from pathlib import Path

import pytest
from dataset_trees import chat, missing, touch, write
from labelled_trees import draw
from PIL import Image

from internvl.datasets import checklist, convert, prepare
from internvl.datasets import download as fetch
from internvl.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("small")


def turns(path: Path) -> list[list[str]]:
    """The texts of every line, its images being there."""
    found = []
    for _, row in convert.read_jsonl(path):
        assert (path_of_images(path) / row["image"]).exists()
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        found.append([turn["value"] for turn in row["conversations"]])
    return found


def path_of_images(annotations: Path) -> Path:
    return (
        annotations.parent.parent
        if annotations.parent.name == "annotations"
        else (annotations.parent)
    )


TRAIN, VAL = "train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000025.jpg"
REFERENCES = [{"id": i, "image_id": 25, "caption": f"giraffe {i}"} for i in range(5)]


def coco(root: Path) -> Path:
    folder = root / "data/coco"
    touch(folder, TRAIN, VAL)
    rows = [{"image_id": "coco_9", "image": TRAIN, "caption": f" food {i}\n"} for i in range(2)]
    write(folder / "annotations/coco_karpathy_train.json", rows)
    write(folder / "annotations/coco_karpathy_test.json", [{"image": VAL, "caption": []}])
    references = {"images": [{"id": 25}], "annotations": REFERENCES}
    write(folder / "annotations/coco_karpathy_test_gt.json", references)
    return folder


def test_coco_caption_from_karpathys_list(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    done = prepare.run("coco-caption", tmp_path)
    assert done.ready, done.missing
    train, test = done.files
    assert train == folder / "annotations/coco_karpathy_train_567k.jsonl"
    assert [texts[1] for texts in turns(train)] == ["food 0", "food 1"]
    written = json.loads(test.read_text())
    assert written["images"] == [{"id": 25, "file_name": VAL}]
    assert written["annotations"] == REFERENCES
    assert done.counts["coco_karpathy_test_gt.json captions"] == 5
    assert done.counts["images"] == 2


def test_coco_caption_from_the_official_archive(tmp_path: Path) -> None:
    annotations = coco(tmp_path) / "annotations"
    (annotations / "coco_karpathy_train.json").unlink()
    with zipfile.ZipFile(annotations / "coco_karpathy_train_567k.zip", "w") as file:
        file.writestr("coco_karpathy_train_567k.jsonl", chat(TRAIN) * 3)
    done = prepare.run("coco-caption", tmp_path)
    assert done.counts["coco_karpathy_train_567k.jsonl captions"] == 3
    assert done.ready


def test_pictures_are_unpacked_from_archives_that_lie_there(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    (folder / VAL).unlink()
    with zipfile.ZipFile(folder / "val2014.zip", "w") as file:
        file.writestr(VAL, "")
    assert prepare.run("coco-caption", tmp_path).ready
    assert (folder / VAL).exists()


def test_an_empty_place_lists_everything_with_its_address(tmp_path: Path) -> None:
    done = prepare.run("coco-caption", tmp_path)
    assert not done.ready
    assert done.files == ()
    assert [str(entry.path.relative_to(tmp_path / "data/coco")) for entry in done.missing] == [
        "train2014",
        "val2014",
        "annotations/coco_karpathy_train_567k.zip",
        "annotations/coco_karpathy_test.json",
        "annotations/coco_karpathy_test_gt.json",
    ]
    assert str(done.missing[0]).endswith(
        "train2014: from http://images.cocodataset.org/zips/train2014.zip"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_lacks_is_named(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    (folder / TRAIN).unlink()
    touch(folder, "train2014/other.jpg")
    (entry,) = prepare.run("coco-caption", tmp_path).missing
    assert entry.note == f"1 of 2 images are missing: {TRAIN}"


def test_a_wrong_count_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco(tmp_path)
    monkeypatch.setitem(checklist.EXPECTED, "coco_karpathy_train.json", {"captions": 566_747})
    with pytest.raises(DataError, match="holds 2 captions, expected 566,747"):
        prepare.run("coco-caption", tmp_path)


def test_paths_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    folder = coco(tmp_path)
    write(folder / "annotations/coco_karpathy_train_567k.jsonl", chat("../../secret.jpg"))
    with pytest.raises(DataError, match="leaves the image folder"):
        prepare.run("coco-caption", tmp_path)


def flickr(root: Path, names: tuple[str, ...]) -> Path:
    folder = root / "data/flickr30k"
    touch(folder, "Images/1.jpg", "Images/2.jpg")
    for name in names:
        write(folder / name, "image,caption\n1.jpg,A dog, running .\n2.jpg,一只猫\n")
    return folder


def test_flickr30k(tmp_path: Path) -> None:
    folder = flickr(
        tmp_path, tuple(f"flickr30k_{s}_karpathy.txt" for s in ("train", "val", "test"))
    )
    references = {
        "images": [{"id": 7, "image": "flickr30k-images/2.jpg"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "A cat"}],
    }
    write(folder / "flickr30k_test_karpathy.json", references)
    done = prepare.run("flickr30k", tmp_path)
    assert done.ready, done.missing
    assert [path.name for path in done.files] == [
        "flickr30k_train_karpathy.jsonl",
        "flickr30k_val_karpathy_captions.json",
        "flickr30k_test_karpathy_captions.json",
    ]
    assert turns(done.files[0])[0][1] == "A dog, running ."
    test = json.loads(done.files[2].read_text())
    assert test["images"] == [{"id": 1, "file_name": "Images/2.jpg"}]


def test_flickr30k_cn(tmp_path: Path) -> None:
    flickr(tmp_path, ("flickr30k_cn_train.txt", "flickr30k_cn_test.txt"))
    done = prepare.run("flickr30k-cn", tmp_path)
    assert done.ready, done.missing
    assert turns(done.files[0])[1] == [f"<image>\n{prepare.CHINESE_PROMPT}", "一只猫"]


def test_nocaps(tmp_path: Path) -> None:
    folder = tmp_path / "data/nocaps"
    touch(folder, "images/0a.jpg")
    rows = {
        "images": [{"id": 0, "file_name": "0a.jpg"}],
        "annotations": [{"id": i, "image_id": 0, "caption": "x"} for i in range(10)],
    }
    write(folder / "nocaps_val_4500_captions.json", rows)
    done = prepare.run("nocaps", tmp_path)
    assert done.ready, done.missing
    assert done.counts["nocaps_val_4500_captions.json captions"] == 10
    assert json.loads(done.files[0].read_text())["images"][0]["file_name"] == "images/0a.jpg"


def test_synthdog_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "green").save(buffer, "JPEG")
    truth = json.dumps({"gt_parse": {"text_sequence": "some words"}})
    folder = tmp_path / "playground/data/synthdog-en"
    folder.mkdir(parents=True)
    table = pyarrow.table(
        {"image": [{"bytes": buffer.getvalue()}] * 3, "ground_truth": [truth] * 3}
    )
    parquet.write_table(table, folder / "train-00000-of-00084.parquet")
    for _ in range(2):  # a second call finds what the first one made
        done = prepare.run("synthdog", tmp_path)
        assert done.ready, done.missing
        assert done.counts == {"images": 3}
        assert [texts[1] for texts in turns(done.files[0])] == ["some words"] * 3


def test_synthdog_without_anything(tmp_path: Path) -> None:
    done = prepare.run("synthdog", tmp_path)
    assert done.missing[0].address.endswith("/synthdog-en-images.zip")


def test_every_name_can_be_prepared(tmp_path: Path) -> None:
    for name, line in prepare.NAMES.items():
        assert not prepare.run(name, tmp_path).ready
        assert "\n" not in line


def test_an_unknown_name_says_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean coco-caption"):
        prepare.run("coco-captions", tmp_path)


def test_download_fetches_what_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def take(address: str, target: Path) -> Path:
        fetched.append(address)
        if target.suffix == ".zip":
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(target, "w") as file:
                file.writestr("images/1.jpg", "")
            return target
        return write(target, {"images": [], "annotations": []})

    monkeypatch.setattr(fetch, "fetch", take)
    done = prepare.run("nocaps", tmp_path, download=True)
    assert fetched == ["https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"]
    assert missing(done) == ["images"]  # a page for people, not an address of a file
    assert prepare.run("synthdog", tmp_path, download=True).ready
    assert fetched[1].endswith("synthdog-en-images.zip")


def test_mmpr_as_it_lies(tmp_path: Path) -> None:
    done = prepare.run("mmpr", tmp_path)
    assert [missing.path.name for missing in done.missing] == ["meta.json", "annotations", "images"]
    folder = tmp_path / "MMPR-v1.1"
    entry = {"root": "MMPR-v1.1/images/M3CoT", "annotation": "MMPR-v1.1/annotations/a.jsonl"}
    write(folder / "meta.json", {"m3cot": {**entry, "length": 2, "repeat_time": 0.5}})
    row = {"image": "1.png", "question": "Which?", "chosen": "A", "rejected": "B"}
    (folder / "annotations").mkdir()
    (folder / "annotations/a.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    (folder / "images.zip_aa").touch()
    (missing,) = prepare.run("mmpr", tmp_path).missing
    assert f"cat {folder}/images.zip_* > {folder}/images.zip" in str(missing)
    touch(folder / "images", "M3CoT/1.png")
    done = prepare.run("mmpr", tmp_path)
    assert done.ready, done.missing
    assert (done.files, done.counts) == ((folder / "meta.json",), {"m3cot pairs": 2})
    (folder / "annotations/a.jsonl").write_text(f"{json.dumps(row)}\n")
    with pytest.raises(DataError, match="holds 1 pairs, but m3cot of the meta file has 2"):
        prepare.run("mmpr", tmp_path)


def test_a_labelled_set(tmp_path: Path) -> None:
    absent = prepare.run("imagenet-1k", tmp_path)
    assert [str(missing.path) for missing in absent.missing] == [
        str(tmp_path / "data/imagenet-1k"),
        str(tmp_path / "data/wds_imagenet1k"),
    ]
    draw("imagenet1k", tmp_path / "data")
    prepared = prepare.run("imagenet-1k", tmp_path)
    assert prepared.ready
    assert prepared.counts == {"imagenet1k images": 4, "imagenet1k classes": 1000}
