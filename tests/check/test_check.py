"""check: every problem with file and line, the arithmetic, the first batch as text."""

import json
from dataclasses import replace

import numpy as np
import pytest
from data_files import SHARED, chat_line, model_folder, picture, recipe, write_lines

from internvl import check
from internvl.check import problems
from internvl.config import DataConfig
from internvl.data.records import Example, Unit
from internvl.errors import BadSample

QUESTION, ANSWER = "<image>\nWhat is this?", "A gradient."
REMEDY = "; correct the name, or put the file there"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    picture(folder / "wide.jpg", (336, 168))
    picture(folder / "small.jpg", (60, 60))
    whole = picture(folder / "whole.jpg", (200, 200)).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def checked(model, images, rows, tmp_path, *overrides, **data):
    file = write_lines(tmp_path / "chat.jsonl", rows)
    return check.run(recipe(model, file, images, tmp_path / "run", *overrides, **data))


def test_good_data(model, images, tmp_path):
    rows = [chat_line(QUESTION, ANSWER, image="wide.jpg")] * 5
    found = checked(model, images, [*rows, chat_line("Hello?", "Hi.")], tmp_path)
    assert found.problems == []
    text = found.render()
    assert "no problem found" in text
    assert "6 samples per epoch in 2 groups" in text
    assert "in steps of 4, the last of 2: 2 steps" in text
    assert "wide.jpg: 2 x 1 grid, 3 tiles" in text
    assert "[27 visual tokens]" in text
    assert "⟦A gradient.<|im_end|>⟧" in text
    assert found.counts["chat"].tiles.tolist() == [3] * 5 + [0]


def test_what_a_checkpoint_says_is_shown_with_its_source(model, images, tmp_path):
    """The model has tiles of 84 px, 1 to 6 of them with a thumbnail."""
    rows = [chat_line(QUESTION, ANSWER, image="wide.jpg")]
    found = checked(model, images, rows, tmp_path, tiles={"max": 1}, template="Hermes-2")
    assert found.counts["chat"].tiles.tolist() == [1]
    lines = [line.split() for line in found.render().splitlines()]
    config = str(model / "config.json")
    assert ["data.tiles.size", "84", config] in lines
    assert ["data.tiles.max", "1", "recipe"] in lines
    assert ["data.tiles.thumbnail", "true", config] in lines
    assert ["data.template", "'Hermes-2'", "recipe"] in lines


BAD = [
    (b'{"image": "wide.jpg", "conversations": [', "not JSON"),
    (b"", "blank"),
    (chat_line(QUESTION, ANSWER, image="missing.jpg"), "there is no image"),
    (chat_line(QUESTION, ANSWER, image="truncated.jpg"), "truncated"),
    (chat_line(QUESTION, ANSWER, image="empty.jpg"), "empty; replace the file"),
    (chat_line(QUESTION, ANSWER, image="../../etc/passwd"), "leaves the image folder"),
    (chat_line("No mark", ANSWER, image="wide.jpg"), r"0 <image> marks in the questions, but 1"),
    (chat_line(QUESTION, ANSWER), r"1 <image> mark in the questions, but 0"),
    (chat_line(QUESTION, " \n", image="wide.jpg"), "an answer is empty"),
    (chat_line(QUESTION, image="wide.jpg"), "ends with a question"),
    (chat_line(QUESTION, ANSWER * 300, image="wide.jpg"), None),
    (chat_line("Long " * 600, ANSWER), "would lose every answer"),
    (chat_line(image="wide.jpg"), "conversation is empty"),
    ({"image": "wide.jpg", "conversations": "text"}, "must be a list of turns"),
    ({"image": 3, "conversations": []}, "`image` must be a path"),
    ([1, 2], "a JSON object is expected, not list"),
    (rb'{"image": "wide.jpg", "conversations": [{"from": "human", "value": "\ud83d"}]}', "half a"),
    (rb'{"id": "\udc00", "image": "wide.jpg", "conversations": []}', "`id` holds half a character"),
    (b'{"image": "wide.jpg", "image": "small.jpg", "conversations": []}', "'image' stands twice"),
    (chat_line(QUESTION, ANSWER, image="wide\0.jpg"), "holds a NUL character"),
]


def test_every_problem_is_named_with_its_line(model, images, tmp_path):
    found = checked(model, images, [row for row, _ in BAD], tmp_path)
    expected = {number: says for number, (_, says) in enumerate(BAD, start=1) if says}
    by_line = {int(bad.name.rpartition(" ")[2]): bad for bad in found.problems}
    assert sorted(by_line) == sorted(expected)
    for line, says in expected.items():
        with pytest.raises(type(by_line[line]), match=says):
            raise by_line[line]
    assert f"{len(expected)} problems" in found.render()


def test_half_a_character_spares_the_lines_of_the_same_image(model, images, tmp_path):
    """Line 2 is bad; 1 and 3 share their image, and training would give them one row."""
    rows = [chat_line(QUESTION, ANSWER, image="wide.jpg"), None]
    rows[1] = json.dumps(chat_line(QUESTION, "red \ud83d", image="wide.jpg")).encode()
    found = checked(model, images, [*rows, rows[0]], tmp_path)
    (bad,) = found.problems
    assert str(bad).startswith(f"{tmp_path / 'chat.jsonl'} line 2: `conversations[1].value` holds")
    assert found.counts["chat"].line.tolist() == [0, 2]
    assert "2 good samples" in found.render()


def test_a_missing_or_empty_annotation_file(model, images, tmp_path):
    missing = check.run(recipe(model, tmp_path / "none.jsonl", images, tmp_path / "run"))
    assert "there is no annotation file" in missing.problems[0].reason
    assert "is empty; it holds no sample" in checked(model, images, [], tmp_path).problems[0].reason


def test_an_evaluation_is_read_too(model, images, tmp_path):
    coco = {
        "images": [{"id": 1, "file_name": "wide.jpg"}, {"id": 2, "file_name": "truncated.jpg"}],
        "annotations": [{"image_id": i, "caption": "x"} for i in (1, 2)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    evaluation = f"{{annotations: {tmp_path}/coco.json, images: {images}, prompt: Name it.}}"
    rows = [chat_line(QUESTION, ANSWER, image="wide.jpg")]
    found = checked(model, images, rows, tmp_path, f"evals.names={evaluation}")
    assert [bad.name for bad in found.problems] == [f"evals.names {images}/truncated.jpg"]


@pytest.mark.skipif(not (SHARED / "data" / "broken").is_dir(), reason="no broken files here")
def test_the_broken_lines(model, tmp_path):
    folder = SHARED / "data" / "broken"
    found = check.run(recipe(model, folder / "chat_bad_lines.jsonl", folder, tmp_path / "run"))
    lines = json.loads((folder / "chat_bad_lines.expected.json").read_text())
    bad = [row["line"] for row in lines if not row["what"].startswith("good")]
    assert len(bad) == 18
    assert sorted(int(problem.name.rpartition(" ")[2]) for problem in found.problems) == bad
    assert len(found.counts["chat"]) == 4


def test_what_the_samples_hold(model, images, tmp_path):
    rows = [
        chat_line("Text?", "Yes."),
        chat_line(QUESTION, ANSWER, image="wide.jpg"),
        chat_line(QUESTION, ANSWER, image="wide.jpg"),
        chat_line("<image>\n<image>\nTwo?", "Yes.", image=["wide.jpg", "small.jpg"]),
        chat_line("Cut?", "word " * 600),
    ]
    found = checked(model, images, rows, tmp_path, workers=1)
    assert found.problems == []
    counts = found.counts["chat"]
    order = counts.line.argsort()
    assert counts.media[order].tolist() == [0, 1, 1, 2, 0]
    assert counts.tiles[order].tolist() == [0, 3, 3, 4, 0]
    text = found.render()
    for part in (
        "5 good samples (2 text, 2 one image, 1 several images)",
        "tokens a sample:",
        "1 sample is cut at data.max_tokens = 512",
        "1 sample has 90% of data.max_tokens or more",
        "1 sample equals another sample",
    ):
        assert part in text


def test_digests_of_one_float_are_not_duplicates(model, images, tmp_path):
    found = checked(model, images, [chat_line("Hello?", "Hi.")] * 2, tmp_path)
    digests = np.asarray([2**63, 2**63 + 1], np.uint64)
    found.counts["chat"] = replace(found.counts["chat"], digest=digests)
    assert found.num_duplicates == 0


def test_what_was_read_is_not_read_again(model, images, tmp_path, monkeypatch):
    rows = [chat_line(QUESTION, ANSWER, image="small.jpg"), chat_line(QUESTION, "", image="x.jpg")]
    first = checked(model, images, rows, tmp_path)
    assert len(first.problems) == 1

    def fail(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(check._ChunkCounter, "_count", fail)
        again = checked(model, images, rows, tmp_path)
        assert again.render() == first.render()
        picture(images / "small.jpg", (90, 30))
        with pytest.raises(AssertionError, match="read again"):
            checked(model, images, rows, tmp_path)
    changed = checked(model, images, rows, tmp_path)
    assert changed.counts["chat"].tiles.tolist() == [4]


def test_a_video(model, images, tmp_path):
    frames = images / "clip"
    for number in range(4):
        picture(frames / f"frame_{number}.png", (60, 40))
    rows = [chat_line("<video>\nWhat moves?", "Nothing.", video="clip/")]
    found = checked(model, images, rows, tmp_path)
    assert found.problems == []
    assert found.counts["chat"].tiles.tolist() == [4]
    text = found.render()
    assert "clip/ frame 4: 1 x 1 grid, 1 tile" in text
    assert "Frame-4: <img>[9 visual tokens]</img>" in text


def test_the_page(model, images, tmp_path):
    rows = [chat_line(QUESTION, ANSWER, image="wide.jpg"), chat_line(QUESTION, "", image="x.jpg")]
    file = write_lines(tmp_path / "chat.jsonl", rows)
    to = tmp_path / "report.html"
    check.run(recipe(model, file, images, tmp_path / "run"), report=to)
    page = to.read_text(encoding="utf-8")
    for part in (
        "there is no image",
        f"<td>{file} line 2</td>",
        "<mark>A gradient.&lt;|im_end|&gt;</mark>",
        "2 x 1 tiles",
    ):
        assert part in page


def test_a_meta_file_is_checked(model, images, tmp_path):
    file = write_lines(tmp_path / "chat.jsonl", [chat_line("What?", ANSWER, image="wide.jpg")] * 2)
    entry = {"root": str(images), "annotation": str(file), "length": 2}
    (tmp_path / "meta.json").write_text(json.dumps({"good": entry, "bad": entry | {"length": 3}}))
    base = recipe(model, file, images, tmp_path / "run")
    data = replace(base.data, sources=(), meta=tmp_path / "meta.json")
    found = check.run(replace(base, data=data))
    assert len(found.counts["good"]) == 2
    assert ["holds 2 samples, not 3" in str(problem) for problem in found.problems] == [True]


def test_a_wrong_length_hides_no_other_problem(model, images, tmp_path):
    """Of the file, of other data sets, and of the recipe's own sources; steps are counted too."""
    rows = [chat_line("What?", ANSWER, image=name) for name in ("wide.jpg", "missing.jpg")]
    file = write_lines(tmp_path / "chat.jsonl", rows)
    entry = {"root": str(images), "annotation": str(file)}
    lengths = {"few": 3, "text": "many", "none": 0}
    meta = {name: {**entry, "length": length} for name, length in lengths.items()}
    base = recipe(model, file, images, tmp_path / "run")
    data = replace(base.data, meta=tmp_path / "meta.json")
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    found = check.run(replace(base, data=data))
    text = found.render()
    assert (
        f"source few: {file} holds 2 samples, not 3 as its num_samples (`length` in a meta file)"
        in text
    )
    for name, value in (("text", "'many'"), ("none", 0)):
        wrong = f"meta.json: {name}: `length` must be a number above 0, not {value}"
        assert wrong in text
    assert f"4 x there is no image {images}/missing.jpg{REMEDY} ({file} line 2)" in text
    assert {name: len(counts) for name, counts in found.counts.items()} == {
        **dict.fromkeys(meta, 1),
        "chat": 0,  # its line has no mark, which a meta file's sources insert
    }
    assert "8 samples per epoch" in text
    # A data set that cannot be read is left out alone.
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "broken": {"root": 3}}))
    found = check.run(replace(base, data=data))
    assert set(found.counts) == {*meta, "chat"}
    assert (
        f"{tmp_path}/meta.json: broken: `annotation` must be the path of a file" in found.render()
    )
    assert found.arithmetic == ""


def test_equal_problems_are_one_line_with_the_value_that_keeps_all(model, images, tmp_path):
    long = [chat_line("Long " * count, ANSWER) for count in range(600, 630)]
    missing = [chat_line(QUESTION, ANSWER, image=f"IMG_{n:03d}.jpg") for n in range(25)]
    rows = [*long, chat_line(QUESTION, ANSWER, image="wide.jpg"), *missing, [1, 2]]
    found = checked(model, images, rows, tmp_path)
    file = tmp_path / "chat.jsonl"
    assert len(found.problems) == 56
    head, tokens, image, other, rest, *_ = found.render().splitlines()
    assert head == "56 problems of 3 kinds"
    assert tokens.startswith("  30 x 2470 to 2586 tokens; cutting it")
    assert "cutting it to data.max_tokens = 512 would lose every answer" in tokens
    assert f"({file} lines 1, 2, 3 and 27 more); data.max_tokens=2624 keeps all 30" in tokens
    assert image == (
        f"  25 x there is no image {images}/IMG_0….jpg{REMEDY} "
        f"({file} lines 32, 33, 34 and 22 more)"
    )
    assert other == f"  {file} line 57: a JSON object is expected, not list"
    assert rest == ""
    kept = checked(model, images, rows, tmp_path, "data.max_tokens=2624")
    assert len(kept.problems) == 26
    # A row is never shorter than a sample.
    rows_too = checked(model, images, long[:1], tmp_path, "data.row_tokens=512")
    assert rows_too.render().startswith("1 problem\n")
    assert "; data.max_tokens=2496 data.row_tokens=2496 keep it" in rows_too.render()
    values = ("data.max_tokens=2496", "data.row_tokens=2496")
    assert checked(model, images, long[:1], tmp_path, *values).problems == []


def test_too_many_tiles_and_tokens_are_one_remedy(model, images, tmp_path):
    """Four images of a tile, of 9 tokens, each."""
    picture(images / "other.jpg", (336, 168))
    rows = [chat_line("<image>\n" * 4 + "Alike?", "Yes.", image=["wide.jpg", "other.jpg"] * 2)]
    limits = ("data.max_tiles=3", "data.max_tokens=40")
    found = checked(model, images, rows, tmp_path, *limits)
    (problem,) = found.problems
    assert problem.needs.keys() == {"data.max_tiles", "data.max_tokens"}
    words = "data.max_tiles=4 data.max_tokens=128 keep it"
    assert found.render().splitlines()[1].endswith(f"; {words}")
    assert checked(model, images, rows, tmp_path, *words.split()[:2]).problems == []
    # What no key mends has no value to set.
    wrong = [chat_line("<image>\n" * 3 + "Alike?", "Yes.", image=["wide.jpg", "other.jpg"] * 2)]
    (problem,) = checked(model, images, wrong, tmp_path, *limits).problems
    assert problem.needs == {}


def test_problems_alike_in_all_but_names_and_numbers():
    data = DataConfig()

    def lines(*reasons):
        bad = [BadSample(f"a.jsonl line {n}", reason) for n, reason in enumerate(reasons, 1)]
        return [line.strip() for line in problems.lines(bad, data)]

    assert lines("turn 3 has no text", "turn 12 has no text") == [
        "2 problems of 1 kind",
        "2 x turn 3 to 12 has no text (a.jsonl lines 1, 2)",
    ]
    assert lines("there is no image /i/1.jpg", "there is no image /i/2.png")[1] == (
        "2 x there is no image /i/… (a.jsonl lines 1, 2)"
    )
    assert lines("unknown role 'bot'", "unknown role 'bear'")[1] == (
        "2 x unknown role 'b…' (a.jsonl lines 1, 2)"
    )
    assert lines("an answer is empty", "a question is empty") == [
        "2 problems",
        "a.jsonl line 1: an answer is empty",
        "a.jsonl line 2: a question is empty",
    ]
    many = [f"{chr(97 + n % 26) * (1 + n // 26)} is wrong" for n in range(30)]
    assert lines(*many)[-1] == "and 10 more"


def test_blank_lines_at_the_end_are_no_samples(model, images, tmp_path):
    row = chat_line(QUESTION, ANSWER, image="wide.jpg")
    found = checked(model, images, [row, row, b"", b"  ", b""], tmp_path)
    assert found.problems == []
    assert "2 samples per epoch" in found.render()
    found = checked(model, images, [row, b"", row], tmp_path)
    assert [str(bad) for bad in found.problems] == [
        f"{tmp_path}/chat.jsonl line 2: the line is blank; remove it"
    ]


def test_the_first_step_is_the_first_with_a_good_sample(model, images, tmp_path):
    bad = [chat_line(QUESTION, ANSWER, image="missing.jpg")] * 40
    good = chat_line(QUESTION, ANSWER, image="wide.jpg")
    found = checked(model, images, [good, *bad], tmp_path)
    assert "the first step: 1 row of at most 512 tokens" in found.render()


def test_rows_that_samples_fill_better_are_named():
    def said(tokens, **data):
        example = Example("x", np.zeros(tokens, np.int64), np.zeros(tokens, np.int64))
        settings = {"max_tokens": 512, "row_tokens": 2048, **data}
        source = {"name": "x", "annotations": "x.jsonl"}
        units = [Unit((example,), 0, None)] * 70
        return check._better_rows(units, DataConfig(sources=[source], **settings))

    assert said(310) == "; data.row_tokens=2176 would be 99.7% full"  # 7 x 310 tokens
    assert said(290) == ""  # 7 x 290 fill 2,048 well enough
    assert said(310, packing="official") == ""
    assert said(2100, max_tokens=2048) == ""  # cut into pieces, if at all
    assert said(2000) == ""  # a shorter row would not hold one


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(chat_line("Hello?", "Hi.")).encode("utf-16"),
        (json.dumps([chat_line("Hello?", "Hi.")])[:-1] + ",]").encode(),
        b"",
        None,
    ],
)
def test_a_file_that_cannot_be_read_is_named_once(model, images, tmp_path, content):
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_bytes(content)
    found = check.run(recipe(model, file, images, tmp_path / "run"))
    (problem,) = found.problems
    assert str(problem).count(str(file)) == 1
