"""Answers on disk: what a kill leaves is read, and no file has two writers."""

from pathlib import Path

from internvl.evals.answers import AnswerFiles


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
