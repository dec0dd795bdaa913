"""Pairs are read from every published form, and what is wrong with them is named."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from data_files import SHARED, picture

from internvl.data.captions import FORMS
from internvl.data.pair_files import broken, leaks, read_pairs
from internvl.data.pairs import clean_caption
from internvl.errors import DataError

FLICKR8K = SHARED / "data/flickr8k_cn"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images and nothing else."""
    for name, color in (("1.jpg", "red"), ("2.jpg", "green"), ("3.jpg", "blue")):
        picture(tmp_path / name, color=color, size=(20 + ord(name[0]), 30))
    return tmp_path


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def tree(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def said(found) -> list[str]:
    return [str(problem).rpartition("/")[2] for problem in found.problems]


COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "image": "2.jpg"}],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "one, red"},
        {"id": 11, "image_id": 2, "caption": "two"},
        {"id": 12, "image_id": 1, "caption": "Also one"},
    ],
}
SENTENCES = {
    "images": [
        {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "one, red"}, {"raw": "ONE"}]},
        {"filename": "2.jpg", "split": "test", "sentences": [{"raw": "two"}]},
        {"filename": "3.jpg", "split": "restval", "sentences": [{"raw": "three"}]},
    ]
}


def forms(root: Path) -> dict[str, Path]:
    """The same two images and three captions in every form."""
    write(root / "test_image_names.txt", "1.jpg", "2.jpg")
    folder = root / "folder"
    for name in ("1", "2"):
        picture(folder / f"{name}.jpg")
    write(folder / "1.txt", "one, red", "Also one")
    write(folder / "2.txt", "two")
    jpegs = {name: (root / name).read_bytes() for name in ("1.jpg", "2.jpg")}
    listed = json.dumps({"caption": "two"}).encode()
    shard(root / "shards/0.tar", {"1.jpg": jpegs["1.jpg"], "1.txt": b"one, red\nAlso one\n"})
    shard(root / "shards/1.tar", {"2.jpg": jpegs["2.jpg"], "2.json": listed, "2.txt": b"2"})
    lines = ("1.jpg#0\tone, red", "2.jpg#0\ttwo", "1.jpg#1\tAlso one")
    rows = ({"image": "1.jpg", "captions": ["one, red", "Also one"]}, {"image": "2.jpg"})
    listed = [{"image": "1.jpg", "caption": ["one, red", "Also one"]}]
    return {
        "flickr": write(
            root / "f.txt", "image,caption", "1.jpg,one, red", "2.jpg,two", "1.jpg,Also one"
        ),
        "token": write(root / "t.txt", *lines),
        "coco": tree(root / "c.json", COCO),
        "karpathy": tree(root / "k.json", [*listed, {"image": "2.jpg", "caption": "two"}]),
        "csv": write(
            root / "p.csv", "image,caption", '1.jpg,"one, red"', "2.jpg,two", "1.jpg,Also one"
        ),
        "jsonl": write(
            root / "p.jsonl", json.dumps(rows[0]), json.dumps(rows[1] | {"text": "two"})
        ),
        "folder": folder,
        "webdataset": root / "shards",
    }


@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("xtd", "webdataset")])
@pytest.mark.parametrize("named", [True, False])
def test_every_form_is_the_same_pairs(root: Path, form: str, named: bool) -> None:
    path = forms(root)[form]
    images = path if form == "folder" else root
    found = read_pairs(path, images, form if named else "auto", clean=clean_caption)
    assert found.problems == ()
    assert found.names == ("1.jpg", "2.jpg")
    assert found.images == tuple(str(images / name) for name in found.names)
    assert found.texts == ("one, red", "also one", "two")
    assert found.image_of_text == (0, 0, 1)


@pytest.mark.parametrize("form", ["webdataset", "auto"])
def test_shards_are_the_same_pairs(root: Path, form: str) -> None:
    found = read_pairs(forms(root)["webdataset"], root, form, clean=clean_caption)
    assert found.problems == ()
    assert found.texts == ("one, red", "also one", "two")
    assert found.image_of_text == (0, 0, 1)
    assert [picture.read() for picture in found.images] == [
        (root / name).read_bytes() for name in ("1.jpg", "2.jpg")
    ]
    assert broken(found.images) == {}
    one = read_pairs(root / "shards/1.tar", root)
    assert (one.names, one.texts) == (("1.tar/2.jpg",), ("two",))


def test_what_is_wrong_in_shards_is_named_by_key(root: Path) -> None:
    jpeg = (root / "1.jpg").read_bytes()
    members = {"a.jpg": jpeg, "a.txt": b"fine", "b.jpg": jpeg, "c.txt": b"nothing to see"}
    members |= {"d.jpg": jpeg, "d.json": b"{", "e.jpg": jpeg[:50], "e.txt": b"cut"}
    members |= {"f.jpg": jpeg, "f.txt": b"again\n\n"}
    found = read_pairs(shard(root / "0.tar", members), root)
    whole = "\n".join(map(str, found.problems))
    for part in (
        "0.tar b: 0.tar/b.jpg has no caption",
        "0.tar c: a pair has one image, not 0",
        "0.tar d: d.json cannot be read",
        "0.tar f: the caption is empty",
    ):
        assert part in whole
    assert len(found.problems) == 4
    assert found.names == ("0.tar/a.jpg", "0.tar/e.jpg", "0.tar/f.jpg")
    assert broken(found.images).keys() == {1}
    # Names in tars are numbers: another image of the same name is no leak, an equal one is.
    other = {"a.jpg": (root / "2.jpg").read_bytes(), "a.txt": b"x", "z.jpg": jpeg, "z.txt": b"y"}
    train = read_pairs(shard(root / "train.tar", other), root)
    where = f"z.jpg in {root}/train.tar"
    assert leaks(found, train) == dict.fromkeys(
        (0, 2), f"the training data holds the same file as {where}"
    )
    (root / "1.tgz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="1.tgz is no uncompressed tar"):
        read_pairs(root / "1.tgz", root)


def test_xtd_and_the_splits_of_karpathy(root: Path) -> None:
    write(root / "test_image_names.txt", "1.jpg", "3.jpg")
    path = write(root / "test_1kcaptions_es.txt", "Uno.", "Tres!")
    found = read_pairs(path, root)
    assert (found.names, found.texts, found.image_of_text) == (
        ("1.jpg", "3.jpg"),
        ("Uno.", "Tres!"),
        (0, 1),
    )
    path = tree(root / "dataset.json", SENTENCES)
    assert read_pairs(path, root).texts == ("one, red", "ONE", "two")
    assert read_pairs(path, root, split="train").texts == ("three",)
    with pytest.raises(DataError, match="has no split 'dev'; it has test, restval"):
        read_pairs(path, root, split="dev")


def test_coco_names_lie_in_the_folder_of_their_year(tmp_path: Path) -> None:
    name = "COCO_val2014_000000000042.jpg"
    picture(tmp_path / "val2014" / name)
    listed = tree(tmp_path / "a.json", [{"image": name, "caption": "x"}])
    assert read_pairs(listed, tmp_path).images == (str(tmp_path / "val2014" / name),)
    listed = tree(tmp_path / "b.json", [{"image": f"val2014/{name}", "caption": "x"}])
    assert read_pairs(listed, tmp_path).images == (str(tmp_path / "val2014" / name),)


def test_what_is_wrong_is_named_by_line(root: Path) -> None:
    path = write(
        root / "f.txt",
        *("image,caption", "1.jpg,one", "2.jpg, . ", "2.jpg", "gone.jpg,x", "1.jpg,a.jpg,b"),
        "../1.jpg,y",
    )
    found = read_pairs(path, root, "flickr", clean=clean_caption)
    assert found.texts == ("one",)
    whole = "\n".join(map(str, found.problems))
    for part in (
        "f.txt line 3: the caption is empty",
        "f.txt line 4: not `name.jpg,caption`",
        "f.txt line 6: not `name.jpg,caption`",
        f"f.txt line 5: there is no image {root}/gone.jpg",
        "f.txt line 7: the image path '../1.jpg' leaves the image folder",
        "f.txt line 3: 2.jpg has no caption",
    ):
        assert part in whole
    assert len(found.problems) == 6


def test_duplicate_ids_and_pictures_without_captions(root: Path) -> None:
    images = [*COCO["images"], {"id": 2, "file_name": "3.jpg"}, {"id": 3, "file_name": "1.jpg"}]
    images += [{"id": 4, "file_name": "3.jpg"}]
    annotations = [
        *COCO["annotations"],
        {"id": 11, "image_id": 2, "caption": "again"},
        {"id": 13, "image_id": 99, "caption": "nobody's"},
    ]
    path = tree(root / "c.json", {"images": images, "annotations": annotations})
    found = read_pairs(path, root)
    assert said(found) == [
        "c.json annotation 13: there is no image 99 under `images`",
        "c.json images entries 2 and 3: the id 2 is there already: entry 2 is 2.jpg, entry 3 is "
        "3.jpg; give every image an id of its own (2 captions of it)",
        "c.json images entry 4: 1.jpg is the file of image 1 too; give the captions of image 3 the "
        "id 1 and remove this entry",
        "c.json image 4: 3.jpg has no caption; write one or remove the image",
    ]
    assert found.texts == ("one, red", "Also one")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"images": []}', "has no split 'test'"),
        ("a.csv", "one,two\n1,2\n", "must name a column `image`"),
        ("a.txt", "image,caption\n", "holds no image with a caption"),
        ("a.jsonl", "{}\n", "holds no image with a caption; 1 problem.*line 1: no `image`"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: str, what: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=what):
        read_pairs(tmp_path / name, tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_pairs(tmp_path / "gone.txt", tmp_path)
    with pytest.raises(DataError, match="no form of captions; known: flickr"):
        read_pairs(tmp_path / name, tmp_path, "voc")


def test_leaks_by_name_and_by_bytes(root: Path) -> None:
    shutil.copy(root / "2.jpg", root / "renamed.jpg")
    test = read_pairs(write(root / "a.txt", "1.jpg,x", "2.jpg,y", "3.jpg,z"), root)
    train = read_pairs(write(root / "b.txt", "renamed.jpg,x", "1.jpg,y"), root)
    found = leaks(test, train)
    assert found.keys() == {0, 1}
    assert "names it too" in found[0]
    assert "renamed.jpg" in found[1]
    assert leaks(test.without({0, 1}), train) == {}


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="no Flickr8k-CN here")
def test_flickr8k_cn_in_three_forms() -> None:
    images = FLICKR8K / "images"
    found = {
        form: read_pairs(FLICKR8K / name, images, form)
        for form, name in (
            ("flickr", "flickr8k_zh_test.txt"),
            ("karpathy", "dataset_flickr8k_zh.json"),
            ("coco", "coco_captions_zh_test.json"),
        )
    }
    for pairs in found.values():
        assert (len(pairs.images), len(pairs.texts)) == (1000, 5000)
        assert pairs.problems == ()
        assert dict(zip(pairs.texts, pairs.image_of_text, strict=True)).keys() == {
            *found["flickr"].texts
        }
    train = read_pairs(FLICKR8K / "flickr8k_zh_train.txt", images)
    assert leaks(found["flickr"], train) == {}
