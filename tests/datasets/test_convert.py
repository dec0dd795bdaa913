"""Conversions: exact rounding both ways, captions, parquet; whole files or none."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from internvl.datasets import convert
from internvl.errors import DataError, UserError

SHARED = Path(os.environ.get("INTERNVL_SHARED", Path(__file__).parents[3] / "shared"))


def write_chat(path: Path, *answers: str) -> Path:
    rows = [
        {"id": i, "image": "a.jpg", "conversations": [{"from": "human", "value": "Where?"}, turn]}
        for i, turn in enumerate({"from": "gpt", "value": answer} for answer in answers)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def answers(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["conversations"][1]["value"] for line in lines]


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_integer_survives_the_way_there_and_back() -> None:
    for value in range(1001):
        box = (0, value, value, 1000)
        assert convert.box_to_1000(convert.box_to_unit(box)) == box
        text = f"<box>[[0, {value}, {value}, 1000]]</box>"
        assert convert.boxes_to_1000(convert.boxes_to_unit(text)[0]) == (text, 1)


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ((0.0005, 0.0015, 0.0025, 1.0), (1, 1), (0, 2, 2, 1000)),  # a half goes to the even one
        ((103.93, 299.99, 237.15, 476.41), (427, 640), (243, 469, 555, 744)),
        ((0, 0, 427, 640), (427, 640), (0, 0, 1000, 1000)),
    ],
)
def test_rounding(box: convert.Box, size: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert convert.box_to_1000(box, size) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<box>[[0, 0, 1, 1]]</box>",  # already in 0-1000
        "the list [0, 0, 1, 1]",  # no decimal point: not certainly a box
        "[0.9, 0.1, 0.2, 0.8]",  # left is right of right
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 1.4]",
        "[10, 0.2, 0.3, 0.4]",
    ],
)
def test_what_is_no_unit_box_stays(text: str) -> None:
    assert convert.boxes_to_1000(text) == (text, 0)


@pytest.mark.parametrize(
    "text", ["<box>here</box>", "<box>[[0, 0, 1001, 5]]</box>", "[1, 2, 3, 4]"]
)
def test_what_is_no_box_in_1000_stays(text: str) -> None:
    assert convert.boxes_to_unit(text) == (text, 0)


def test_several_boxes() -> None:
    text = "<ref>cats</ref><box>[[1, 2, 3, 4], [500, 600, 700, 800]]</box>."
    unit = "<ref>cats</ref>[0.001, 0.002, 0.003, 0.004], [0.5, 0.6, 0.7, 0.8]."
    assert convert.boxes_to_unit(text) == (unit, 2)


def test_box_files_both_ways(tmp_path: Path) -> None:
    source = write_chat(tmp_path / "unit.jsonl", "猫 at [0.35, 0.1, 0.5, 1.0]", "no box")
    there = convert.run("boxes-to-1000", source, tmp_path / "out/1000.jsonl")
    assert there.counts == {"lines": 2, "boxes": 1}
    assert answers(there.files[0]) == ["猫 at <box>[[350, 100, 500, 1000]]</box>", "no box"]
    back = convert.run("boxes-to-unit", there.files[0], tmp_path / "back.jsonl")
    assert back.files[0].read_text() == source.read_text()


def test_a_bad_line_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    source = write_chat(tmp_path / "a.jsonl", "one")
    source.write_text(source.read_text() + "{not json\n")
    with pytest.raises(DataError, match=r"a\.jsonl line 2: not JSON"):
        convert.run("boxes-to-1000", source, tmp_path / "b.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_unknown_kind_and_missing_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known: boxes-to-1000"):
        convert.run("boxes", tmp_path, tmp_path)
    with pytest.raises(DataError, match="there is no"):
        convert.run("captions", tmp_path / "a.txt", tmp_path / "b.jsonl")


def test_every_kind_that_is_named_exists(tmp_path: Path) -> None:
    for kind in convert.KINDS:
        with pytest.raises(DataError, match="there is no"):
            convert.run(kind, tmp_path / "absent", tmp_path / "out")


def test_flickr_captions_to_chat(tmp_path: Path) -> None:
    source = tmp_path / "captions.txt"
    source.write_bytes("\ufeffimage,caption\r\n1.jpg,A dog, running .\r\n1.jpg,两只狗\r\n".encode())
    done = convert.run("captions", source, tmp_path / "chat.jsonl")
    assert done.counts == {"lines": 2, "images": 1}
    first = json.loads(done.files[0].read_text(encoding="utf-8").splitlines()[0])
    assert first["image"] == "1.jpg"
    assert first["conversations"] == [
        {"from": "human", "value": f"<image>\n{convert.CAPTION_PROMPT}"},
        {"from": "gpt", "value": "A dog, running ."},
    ]


def test_coco_form_and_back(tmp_path: Path) -> None:
    captions = [("b.jpg", "one"), ("a.jpg", "two"), ("b.jpg", "three")]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(convert.coco_form(captions)))
    assert convert.read_coco(path) == captions
    assert [row["id"] for row in json.loads(path.read_text())["images"]] == [1, 2]


@pytest.mark.parametrize("tree", [[], {"images": []}, {"images": [{"id": 1}], "annotations": {}}])
def test_what_is_no_coco_file_is_said(tmp_path: Path, tree: object) -> None:
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="not a COCO caption file"):
        convert.read_coco(path)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
def test_broken_caption_files() -> None:
    folder = SHARED / "data/broken"
    with pytest.raises(
        DataError,
        match=r"4 problems(.|\n)*line 3: (.|\n)*line 5: (.|\n)*line 6: (.|\n)*line 8: ",
    ):
        convert.read_flickr(folder / "captions_bad_rows.txt")
    with pytest.raises(DataError, match="not UTF-8"):
        convert.read_flickr(folder / "captions_gbk.txt")
    assert len(convert.read_flickr(folder / "captions_utf8_bom_crlf.txt")) >= 1


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared test data")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_flickr8k_cn_in_both_forms_is_the_same(language: str) -> None:
    folder = SHARED / "data/flickr8k_cn"
    text = convert.read_flickr(folder / f"flickr8k_{language}_test.txt")
    coco = convert.read_coco(folder / f"coco_captions_{language}_test.json")
    assert len(text) == 5000
    assert {(Path(image).name, caption) for image, caption in coco} == set(text)


def test_parquet_to_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    table = pyarrow.table(
        {
            "image": [{"bytes": png("red"), "path": "x"}, {"bytes": png("blue"), "path": None}],
            "conversations": [turns, turns],
        }
    )
    parquet.write_table(table, tmp_path / "part-0.parquet")
    done = convert.run("parquet", tmp_path / "part-0.parquet", tmp_path / "out")
    assert done.counts == {"rows": 2, "images": 2}
    rows = [row for _, row in convert.read_jsonl(tmp_path / "out/annotations.jsonl")]
    assert rows[1] == {"conversations": turns, "image": "images/0000001.png"}
    assert (tmp_path / "out/images/0000000.png").read_bytes() == png("red")
    with pytest.raises(DataError, match="exists"):
        convert.run("parquet", tmp_path / "part-0.parquet", tmp_path / "out")


def test_a_broken_picture_in_parquet_leaves_nothing(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"image": [{"bytes": png("red")}, {"bytes": b"no image"}]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 0000001: not an image Pillow knows"):
        convert.run("parquet", tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read as parquet"):
        convert.run("parquet", tmp_path / "b.parquet", tmp_path / "out")


def test_several_pictures_of_a_row(tmp_path: Path) -> None:
    row = {"images": [{"bytes": png("red")}, {"bytes": png("blue")}], "text": "two"}
    (tmp_path / "images").mkdir()
    assert convert.save_images(row, tmp_path / "images", "7") == {
        "text": "two",
        "image": ["images/7.png", "images/7_1.png"],
    }


@pytest.mark.parametrize(
    ("kind", "box", "text"),
    [
        ("boxes-to-1000", "[0.9, 0.2, 0.3, 0.4]", "at [0.9, 0.2, 0.3, 0.4]"),
        ("boxes-to-1000", "[0.1, 0.2, 0.3, 1.4]", "at [0.1,0.2,0.3,0.4], [0.1, 0.2, 0.3, 1.4]"),
        ("boxes-to-1000", "[-0.1, 0.2, 0.3, 0.4]", "at [-0.1, 0.2, 0.3, 0.4]"),
        ("boxes-to-unit", "<box>[[0, 0, 1001, 5]]</box>", "at <box>[[0, 0, 1001, 5]]</box>"),
        ("boxes-to-unit", "<box>[[0.1, 0.2, 0.3, 1]]</box>", "<box>[[0.1, 0.2, 0.3, 1]]</box>"),
    ],
)
def test_a_box_that_cannot_be_converted_is_refused(
    tmp_path: Path, kind: str, box: str, text: str
) -> None:
    source = write_chat(tmp_path / "a.jsonl", "no box", text)
    with pytest.raises(DataError, match=re.escape(f"{source} line 2: {box} is no box in 0-1")):
        convert.run(kind, source, tmp_path / "b.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_numbers_that_are_no_box_are_converted_with_the_rest(tmp_path: Path) -> None:
    source = write_chat(tmp_path / "a.jsonl", "the list [0, 0, 1, 1]", "<box>here</box>")
    for kind in ("boxes-to-1000", "boxes-to-unit"):
        made = convert.run(kind, source, tmp_path / f"{kind}.jsonl")
        assert answers(made.files[0]) == ["the list [0, 0, 1, 1]", "<box>here</box>"]


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_an_empty_file_is_not_converted(tmp_path: Path, content: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(content)
    for kind in ("boxes-to-1000", "boxes-to-unit", "captions"):
        with pytest.raises(DataError, match=r"a\.jsonl"):
            convert.run(kind, source, tmp_path / "b.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
