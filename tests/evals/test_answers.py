"""Answers on disk: what a kill leaves is read, no file has two writers, and files to be scored."""

import json
from pathlib import Path

import pytest

from internvl import evaluate
from internvl.errors import ConfigError, DataError, UserError
from internvl.evals.answers import AnswerFiles, read_file


def test_answers_are_read_up_to_a_line_that_was_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    assert AnswerFiles(folder).read() == {}
    first, second = AnswerFiles(folder), AnswerFiles(folder)
    first.append({3: {"answer": "一 line\nor two\u2028"}, 1: {"reason": "no image"}})
    second.append({0: {"answer": ""}})
    first.append({7: {"answer": "cut"}})
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["0000-0.jsonl", "0000-1.jsonl"]
    whole = files[0].read_bytes()
    rows = {3: {"answer": "一 line\nor two\u2028"}, 1: {"reason": "no image"}, 0: {"answer": ""}}
    assert AnswerFiles(folder).read() == rows | {7: {"answer": "cut"}}
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        files[0].write_bytes(whole[:-cut])
        assert AnswerFiles(folder).read() == rows
    # Of a power failure.
    files[0].write_bytes(whole[:-last] + b"\0" * 9 + b"\n")
    assert AnswerFiles(folder).read() == rows


ROWS = [
    {"image": "a.png", "image_id": 1, "answer": "red\u2028circle"},
    {"image": "b.png", "image_id": "x", "answer": ""},
]


def test_answers_are_read_from_rows_and_from_the_originals_files(tmp_path: Path) -> None:
    answers = {1: "red\u2028circle", "x": ""}
    left_out = {"sample": "c.png", "reason": "cannot be decoded"}
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in [*ROWS, left_out]]
    rows.write_text("\n".join(lines) + "\n")
    assert read_file(rows) == answers
    original = tmp_path / "coco_251129.json"
    tree = [{"image_id": row["image_id"], "caption": row["answer"]} for row in ROWS]
    original.write_text(json.dumps(tree))
    assert read_file(original) == answers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: the line is blank"),
        ("[]", "holds no answer"),
        ("[3]", "entry 1: an object with image_id or question_id is expected"),
        ('{"image_id": 1}', "line 1: an object with answer or caption is expected"),
        ('{"image_id": true, "answer": "x"}', "the id must be a number or a text, not True"),
        ('{"image_id": 1, "answer": 2}', "the answer is the number 2, not text"),
        ('{"image_id": 1, "answer": "x"}\n' * 2, "line 2: 1 has an answer already"),
        ('{"image_id": 1', "line 1"),
    ],
)
def test_wrong_answers_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises((DataError, UserError)) as error:
        read_file(file)
    assert words in str(error.value)


def test_answers_are_scored_without_a_model_or_images(tmp_path: Path) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(f'{{"image": "{n}.png", "caption": "red {n}"}}\n' for n in range(4))
    )
    file = tmp_path / "answers.jsonl"
    texts = ["Red 0", "blue", "red 2", "red 3"]
    rows = [json.dumps({"image_id": n, "answer": text}) for n, text in enumerate(texts, start=1)]
    file.write_text("\n".join(rows[:3]))
    options = {"annotations": captions, "metrics": "exact", "to": tmp_path / "out"}
    with pytest.raises(UserError, match=r"3.png: there is no answer"):
        evaluate.score(file, **options)
    scored = evaluate.score(file, on_bad_sample="skip", **options)
    assert scored.metrics["caption-file/exact"] == pytest.approx(2 / 3)
    assert scored.counts == {"caption-file": {"images": 3, "texts": 3, "left out": 1}}
    file.write_text("\n".join(rows))
    scored = evaluate.score(file, **options)
    assert scored.metrics["caption-file/exact"] == 0.75
    assert json.loads((tmp_path / "out/result.json").read_text()) == scored.metrics
    assert len((tmp_path / "out/result/caption-file.jsonl").read_text().splitlines()) == 4
    file.write_text(json.dumps({"image_id": 9, "answer": "x"}))
    with pytest.raises(UserError, match="there is an answer for 9, and .* has no image"):
        evaluate.score(file, **options)
    with pytest.raises(ConfigError, match="only answers can be scored without a model"):
        evaluate.score(file, "retrieval-folder", annotations=captions)
