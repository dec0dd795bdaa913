"""Captions of every form are read exactly, or named with file and line; nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import SHARED, picture

from internvl import check
from internvl.config import SourceConfig, eval_config
from internvl.data import captions
from internvl.data.sources import open_source
from internvl.datasets import convert
from internvl.errors import BadSample, DataError, UserError
from internvl.evals import EVALS
from internvl.evals.scores import DataProblems

HALF = "red \ud83d"
SAID_OF_HALF = "the caption holds half a character (U+D83D at place 5)"


def coco(images: Any, *annotations: Any) -> str:
    rows = [
        {"id": n, "image_id": row[0], "caption": row[1]} if isinstance(row, tuple) else row
        for n, row in enumerate(annotations, start=1)
    ]
    return json.dumps({"images": images, "annotations": rows})


A, B = {"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}
GOOD = [("a.png", "red"), ("b.png", "blue")]
BOTH = coco([A, B], (1, "red"), (2, "blue"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, (8, 8))
    return tmp_path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, content: str | bytes, form: str = "auto") -> captions.CaptionFile:
    return captions.read(write(path, content), form)


def pairs_of(file: captions.CaptionFile) -> list[tuple[str, str]]:
    return [(file.images[number].name, text) for number, text in file.captions]


def said(file: captions.CaptionFile) -> list[str]:
    return [str(problem).removeprefix(f"{file.path} ") for problem in file.problems]


FORMS = {
    "c.json": BOTH,
    "ids.json": BOTH.replace('"id": 1,', '"id": 1.0,'),
    "text-ids.json": BOTH.replace('"id": ', '"id": "n').replace(', "file', '", "file').replace(
        '"image_id": 1', '"image_id": "n1"').replace('"image_id": 2', '"image_id": "n2"').replace(
        '"id": "n1, "im', '"id": "n1", "im').replace('"id": "n2, "im', '"id": "n2", "im'),
    "list.json": '[{"image": "a.png", "caption": ["red"]}, {"image": "b.png", "caption": "blue"}]',
    "list.jsonl": '[{"image": "a.png", "caption": ["red"]}, {"image": "b.png", "caption": "blue"}]',
    "lines.jsonl": '{"image": "a.png", "caption": "red"}\n{"image": "b.png", "text": "blue"}\n\n',
    "lines.json": '{"image": "a.png", "caption": "red"}\n{"image": "b.png", "texts": ["blue"]}',
    "flickr.txt": "image,caption\na.png,red\nb.png,blue\n\n",
    "token.txt": "a.png#0\tred\nb.png#0\tblue",
    "zh.txt": "a.png#zhb#0\tred\nb.png#zhmtgoogle#1 blue",
    "piped.csv": "image_name| comment_number| comment\na.png| 0|red\nb.png| 0|blue\n",
    "p.csv": 'image,caption\na.png,"red"\nb.png,blue\n',
    "wide.csv": "id,image,split,caption\n1,a.png,x,red\n2,b.png,y,blue\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mark", ["", "\ufeff", "crlf"])
def test_every_form_is_read_with_and_without_a_byte_order_mark(
    root: Path, name: str, mark: str
) -> None:
    content = FORMS[name].replace("\n", "\r\n") if mark == "crlf" else mark + FORMS[name]
    file = read(root / name, content)
    assert (said(file), pairs_of(file)) == ([], GOOD)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.JPG,one, two", ("a.JPG", "one, two")),
        ("a,b.png,one", ("a,b.png", "one")),
        ("a.jpg,see b.png, too", ("a.jpg", "see b.png, too")),
        ("plain,one", ("plain", "one")),
        ('a.jpg,"Stop", he said', ("a.jpg", '"Stop", he said')),
        ('"a.jpg","one, ""two"""', ("a.jpg", 'one, "two"')),
        ("a.jpg,one\ttwo", ("a.jpg", "one\ttwo")),
        ("a.jpg,one | 2 | three", ("a.jpg", "one | 2 | three")),
        ("a#1.jpg#0\tone", ("a#1.jpg", "one")),
        ("a.jpg,one\u2028two", ("a.jpg", "one\u2028two")),
        ("a.jpg,a.jpg,b", "not `name.jpg,caption`: `.jpg,` stands in it twice"),
        ("a.jpg", "neither `image,caption` nor `name#0<TAB>caption`"),
        (",one", "no image is named"),
        (".jpg,one", "no image is named"),
        ("a.jpg,", "the caption is empty"),
        ("a.jpg, \u3000", "the caption is empty"),
        (" ", "the line is blank; remove it"),
        ("in\\a.jpg,one", "has backslashes, as Windows has; write in/a.jpg"),
    ],
)
def test_lines(tmp_path: Path, line: str, expected: Any) -> None:
    file = read(tmp_path / "x.txt", f"first.jpg,fine, too\n{line}\nlast.jpg,fine")
    if isinstance(expected, tuple):
        assert (said(file), pairs_of(file)[1]) == ([], expected)
    else:
        (problem,) = said(file)
        assert problem.startswith("line 2: ")
        assert expected in problem
        assert len(pairs_of(file)) == 2


def test_quotes_of_a_csv_are_no_part_of_the_caption(tmp_path: Path) -> None:
    content = 'a.jpg,"one, two"\nb.jpg,"say ""hi"", now"\nc.jpg,"first\nsecond, last"\nd.jpg,x\n'
    file = read(tmp_path / "x.txt", content)
    assert [text for _, text in pairs_of(file)] == [
        *("one, two", 'say "hi", now', "first\nsecond, last", "x")
    ]
    # One that is not closed costs its own line, not the file up to the next quote.
    file = read(tmp_path / "y.csv", f'image,caption\nz.jpg,"open\n{content}e.jpg,1,2\n')
    assert said(file) == [
        "line 2: a quote is opened and not closed; close it, or double it in a text",
        "line 8: 3 columns, not 2; quote captions with commas",
    ]
    assert len(pairs_of(file)) == 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "the caption is the number 3, not text; put it in quotes or remove it"),
        (None, "the caption is null, not text"),
        (float("nan"), "the caption is the number nan, not text"),
        (True, "the caption is true, not text"),
        ({"en": "red"}, "the caption is an object, not text"),
        ("", "the caption is empty; write it or remove it"),
        (" \n", "the caption is empty"),
        (HALF, SAID_OF_HALF),
        ("a\0b", "the caption holds a NUL character"),
    ],
)
@pytest.mark.parametrize("form", ["coco", "jsonl", "list", "karpathy"])
def test_captions_that_are_no_text(root: Path, form: str, value: Any, expected: str) -> None:
    row = json.dumps({"image": "b.png", "caption": value})
    sentences = [{"raw": value}]
    images = [
        {"filename": "a.png", "split": "test", "sentences": [{"raw": "red"}]},
        {"filename": "b.png", "split": "test", "sentences": sentences},
    ]
    name, content, where = {
        "coco": ("x.json", coco([A, B], (1, "red"), (2, value)), "annotation 2"),
        "jsonl": ("x.jsonl", f'{{"image": "a.png", "caption": "red"}}\n{row}', "line 2"),
        "list": ("x.json", f'[{{"image": "a.png", "caption": "red"}}, {row}]', "entry 2"),
        "karpathy": ("x.json", json.dumps({"images": images}), "image 2"),
    }[form]
    file = read(root / name, content)
    (problem,) = said(file)
    assert problem.startswith(f"{where}: {expected}")
    assert pairs_of(file) == GOOD[:1]


@pytest.mark.parametrize(
    ("images", "annotations", "expected"),
    [
        ([A, {**B, "id": 1}], [(1, "red")], ["entry 1 is a.png, entry 2 is b.png", "(1 cap"]),
        ([A, A], [(1, "red")], ["entry 1 is a.png, entry 2 is a.png"]),
        ([A, B], [(1, "red"), (9, "x")], ["annotation 2: there is no image 9", "b.png has no"]),
        ([A], [("1", "red")], ["there is no image '1' under `images`; the id there is 1"]),
        ([{**A, "id": None}], [(1, "x")], ["images entry 1: its `id` is null", "no image 1"]),
        ([{**A, "id": 1.5}], [], ["its `id` is the number 1.5; write an integer or a text"]),
        ([{**A, "id": True}], [], ["its `id` is true"]),
        ([{**A, "id": HALF}], [], ["images entry 1: its `id` holds half a character"]),
        ([A], [(1, "x"), {"id": HALF, "image_id": 7}], ["annotations entry 2: there is no image"]),
        ([{"file_name": "a.png"}], [], ["images entry 1: no `id`"]),
        ([{"id": 1}], [(1, "x")], ["neither `file_name` nor `image` names it (1 caption of"]),
        ([{"id": 1, "file_name": 7}], [], ["the image's name is the number 7"]),
        ([{"id": 1, "file_name": "\ud83d.png"}], [], ["the image's name holds half a character"]),
        (["a.png"], [], ["images entry 1: a JSON object is expected, not a text"]),
        ([A], [(1, "x"), "red"], ["annotations entry 2: a JSON object is expected"]),
        ([A], [(1, "x"), {"id": 5, "image_id": 1}], ["annotation 5: no `caption`"]),
        ([A], [(1, "x"), {"caption": "red"}], ["annotation 2: no `image_id`"]),
        ([A], [(1, "x"), {"image_id": [1], "caption": "x"}], ["its `image_id` is a list"]),
        ([A], [(1, ["red", "rot"])], ["the caption is a list, not text"]),
    ],
)  # fmt: skip
def test_what_is_wrong_in_coco_files(
    root: Path, images: Any, annotations: Any, expected: list[str]
) -> None:
    file = read(root / "c.json", coco(images, *annotations))
    whole = "\n".join(said(file))
    assert [part for part in expected if part not in whole] == [], whole
    # The same file for every reader of it: none takes it, all say so.
    with pytest.raises(DataError, match=r"has [0-9,]+ problems?;"):
        convert.run("captions", file.path, root / "out.jsonl")
    with pytest.raises(DataProblems):
        EVALS["caption"](eval_config(annotations=file.path, images=root))
    with pytest.raises(UserError):
        EVALS["retrieval"](
            eval_config(type="retrieval", annotations=file.path, images=root, recall_k=(1,))
        )
    for kind in ("coco-captions", "captions", "pairs"):
        source = open_source(
            SourceConfig(name="x", type=kind, annotations=file.path, images=root, prompt="Say:")
        )
        samples = list(source.samples(range(len(source))))
        assert len([s for s in samples if isinstance(s, BadSample)]) == len(file.problems)


@pytest.mark.parametrize("name", ["a.png", "./a.png", "b/../a.png", ".//a.png"])
def test_a_file_under_two_ids_is_named_however_it_is_spelled(root: Path, name: str) -> None:
    images = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": name}]
    texts = [{"id": n, "image_id": n, "caption": f"caption {n}"} for n in (1, 2)]
    file = read(root / "c.json", json.dumps({"images": images, "annotations": texts}))
    assert pairs_of(file) == [("a.png", "caption 1")]
    also = "" if name == "a.png" else " (a.png)"
    assert said(file) == [
        f"images entry 2: {name} is the file of image 1{also} too; give the captions of image 2 "
        "the id 1 and remove this entry (1 caption of it)"
    ]
    lines = read(root / "c.csv", f"image,caption\na.png,one\n{name},two\n")
    assert pairs_of(lines) == [("a.png", "one"), ("a.png", "two")]


def test_negative_ids_and_unused_keys_are_read(root: Path) -> None:
    content = coco([{**A, "id": -3, "width": float("nan")}], (-3, "red"))
    assert pairs_of(read(root / "c.json", content)) == GOOD[:1]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c.json", '{"images": {}, "annotations": []}', "`images` must be a list, not an object"),
        ("c.json", '{"annotations": []}', "key 'images' missing"),
        ("c.json", "", "c.json is empty; fetch it again"),
        ("c.jsonl", " \n", "c.jsonl is empty; fetch it again"),
        ("c.json", "<!doctype html>\n", "c.json: a web page, such as a login or an error"),
        ("c.jsonl", "<html>\n</html>", "c.jsonl: a web page, such as a login or an error"),
        ("c.csv", "image;caption\na.png;red\n", "are separated by `;`, save it with commas"),
        ("c.csv", "a.png;red\nb.png;blue\n", "are separated by `;`, save it with commas"),
        ("c.csv", "sep=,\nimage,caption\na.png,red\n", "remove the line `sep=,`, which only Excel"),
        ("c.json", '{"images": [], "images": [], "annotations": []}', "'images' is there twice"),
        ("c.json", "3", "is neither a COCO caption file"),
        ("c.json", '{"images": [{}], "dataset": "x"}', "has no split 'test'; its images name no"),
        ("c.json", "[" * 200_000, "is not JSON (nested too deeply)"),
        ("c.json", BOTH.encode("utf-16"), "is UTF-16, it is not UTF-8; save it as UTF-8"),
        ("c.txt", "a.jpg,红".encode("gbk"), "is not UTF-8; save it as UTF-8 (line 1 is not)"),
        ("c.txt", "a.jpg,red".encode("utf-16-le"), "line 1 holds a NUL character"),
        ("c.txt", "version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path / name, content)
    assert expected in str(error.value)


def test_a_key_that_is_there_twice(root: Path) -> None:
    twice = '{"image": "a.png", "caption": "red", "caption": "rot"}'
    file = read(root / "x.jsonl", f'{{"image": "b.png", "caption": "blue"}}\n{twice}\n[1]\n')
    assert said(file) == [
        "line 2: the key `caption` is there twice; remove one",
        "line 3: a JSON object is expected, not a list",
    ]
    again = BOTH.replace('"caption": "red"', '"caption": "red", "caption": "rot"')
    assert said(read(root / "c.json", again))[0] == (
        "annotations entry 1: the key `caption` is there twice; remove one"
    )


def test_karpathys_list_chooses_among_the_images_of_coco(root: Path) -> None:
    names = [f"val2014/COCO_val2014_{n:012d}.jpg" for n in (7, 8)]
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (7, 8, 9)]
    path = write(root / "val.json", coco(images, (7, "one"), (9, "not chosen"), (8, "two")))
    chosen = write(root / "test.json", json.dumps([{"image": name} for name in names]))
    file = captions.read(path, images=chosen)
    assert (said(file), pairs_of(file)) == ([], [(names[0], "one"), (names[1], "two")])
    write(path, coco(images, (7, "one"), (99, "nobody's")))
    assert said(captions.read(path, images=chosen)) == [
        "annotation 2: there is no image 99 under `images`",
        f"image 8: {names[1]} has no caption; write one or remove the image",
    ]
    write(chosen, '[{"image": "a.png"}]')
    with pytest.raises(DataError, match=r"entry 1: a.png does not end in COCO's number"):
        captions.read(path, images=chosen)


def test_texts_beside_images_without_one(root: Path) -> None:
    write(root / "a.txt", "\ufeffred\n")
    write(root / "c.txt", "nobody's\n")
    write(root / "README.txt", "about\n")
    file = captions.read(root)
    assert pairs_of(file) == GOOD[:1]
    assert said(file) == [
        "c.txt: there is no image of this name beside it",
        "b.png: b.png has no caption; write one or remove the image",
    ]


def test_an_evaluation_leaves_out_and_lists_what_is_wrong(root: Path) -> None:
    content = coco([A, B], (1, "red"), (9, "blue"), (1, HALF))
    spec = {"annotations": write(root / "c.json", content), "images": root, "metrics": "exact"}
    with pytest.raises(DataProblems, match=r"3 problems in the data"):
        EVALS["caption"](eval_config(**spec))
    evaluator: Any = EVALS["caption"](eval_config(**spec, on_bad_sample="skip"))
    assert evaluator.ids == [1]
    assert evaluator.references == {1: ["red"]}
    assert evaluator.counts() == {"images": 1, "texts": 1, "left out": 3}
    # A model may answer anything; scores and files take it.
    scores = evaluator.run(_Answers(["red \ud83d"]), None)
    assert scores.rows[0]["answer"] == "red \ufffd"
    assert [row["sample"].removeprefix(f"{root}/c.json ") for row in scores.rows[1:]] == [
        *("annotation 2", "annotation 3", "image 2")
    ]


class _Answers:
    """A handle that writes what it is told."""

    caption_prompt, caption_beams = "Describe it.", 1
    exif, model = "ignore", None

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def num_tiles(self, image: str) -> int:
        return 1

    def caption(self, images: Any, prompt: str, **settings: Any) -> list[str]:
        return self.texts


def test_every_form_is_evaluated_and_a_missing_image_is_named(root: Path) -> None:
    path = write(root / "f.txt", "a.png,red\nb.png,blue\nb.png,navy\n")
    evaluator: Any = EVALS["caption"](eval_config(annotations=path, images=root))
    assert evaluator.references == {1: ["red"], 2: ["blue", "navy"]}
    write(path, "a.png,red\ngone.png,x\n../b.png,y\n")
    write(root / "a.png", "no image")
    with pytest.raises(DataProblems) as error:
        EVALS["caption"](eval_config(annotations=path, images=root))
    for part in ("line 2: there is no image", "line 3: the image path '../b.png' leaves", "a.png:"):
        assert part in str(error.value)


def test_one_file_for_two_images_without_their_folders(root: Path) -> None:
    images = [{"id": 1, "file_name": "x/a.png"}, {"id": 2, "file_name": "y/a.png"}]
    path = write(root / "c.json", coco(images, (1, "red"), (2, "blue")))
    with pytest.raises(DataProblems, match=r"y/a.png and x/a.png are one file"):
        EVALS["caption"](eval_config(annotations=path, images=root, flat=True))


def test_check_lists_the_problems_of_an_evaluation_one_by_one(root: Path) -> None:
    path = write(root / "c.json", coco([A, B], (1, 3), (2, None)))
    found = check._eval_problems("val", eval_config(annotations=path, images=root))
    assert [str(problem).rpartition("c.json ")[2] for problem in found] == [
        "annotation 1: the caption is the number 3, not text; put it in quotes or remove it",
        "annotation 2: the caption is null, not text; put it in quotes or remove it",
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_cannot_be_written_again_is_not_converted(tmp_path: Path, name: str) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": HALF}]
    rows = [{"conversations": turns[:1]}, {"conversations": turns}]
    lines = "\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows)
    path = write(tmp_path / name, f"\ufeff{lines}")
    where = "line 2" if name == "a.jsonl" else "entry 2"
    said = rf"{where}: `conversations\[1\].value` holds half a character"
    with pytest.raises(DataError, match=said):
        convert.run("boxes-to-1000", path, tmp_path / "b.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="no cases here")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("repeated-image-id/captions.json", "entry 1 is a.png, entry 2 is b.png"),
        ("repeated-image-id/unknown.json", "annotation 2: there is no image 9"),
        ("caption-not-text/list.json", "annotation 1: the caption is a list, not text"),
        ("caption-not-text/null.json", "annotation 1: the caption is null, not text"),
        ("caption-not-text/number.json", "annotation 1: the caption is the number 3"),
        ("caption-not-text/pairs.jsonl", "line 2: the caption is null, not text"),
        ("lone-surrogate/captions.json", f"annotation 1: {SAID_OF_HALF}"),
        ("lone-surrogate/pairs.jsonl", "line 2: the caption holds half a character"),
    ],
)
def test_known_cases(name: str, expected: str) -> None:
    path = SHARED / "cases" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    assert expected in "\n".join(said(captions.read(path)))
