"""Text files and single strings: read exactly, or refused with the reason."""

from pathlib import Path

import pytest

from internvl.data import texts
from internvl.errors import BadSample, DataError


@pytest.mark.parametrize("content", [b"a\nb\n", b"\xef\xbb\xbfa\r\nb\r\n", b"a\rb\r"])
def test_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    assert texts.read_text(tmp_path / "x.txt") == "a\nb\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read"),
        ("é".encode("utf-16"), "UTF-16"),
        (b"fine\ncaf\xe9\n", "line 2"),
        ("two\nlines".encode("utf-16-le"), "NUL"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_another_content_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        texts.read_text(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        (True, "true"),
        (2.5, "the number 2.5"),
        ([], "a list"),
        ({}, "an object"),
        ("a\0b", "NUL"),
        ("cut \ud83d", "U+D83D"),
    ],
)
def test_a_value_that_is_no_text(value: object, reason: str) -> None:
    assert reason in (texts.text_problem(value) or "")


def test_a_text_has_no_problem() -> None:
    assert [texts.text_problem(text) for text in ("", "plain", "中文 😀")] == [None] * 3


def test_half_a_character_is_shown_escaped() -> None:
    assert texts.printable("cut \ud83d, 中文") == "cut \\ud83d, 中文"


def test_many_problems_are_counted() -> None:
    problems = [BadSample(f"x.jsonl line {n}", "bad") for n in range(texts.PROBLEMS_SHOWN + 3)]
    lines = texts.problem_lines(problems)
    assert len(lines) == texts.PROBLEMS_SHOWN + 1
    assert lines[-1].endswith("3 more")
    assert texts.problem_lines(problems[:2]) == [str(problem) for problem in problems[:2]]
