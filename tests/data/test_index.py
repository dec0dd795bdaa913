"""The index of a file of lines: it follows the content, however it is read."""

import json

import numpy as np
from data_files import chat_line, write_lines

from internvl.data import index


def test_the_index_follows_the_content(tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [chat_line("a", "b"), chat_line("c", "d")])
    first = index.index_lines(file)
    again = index.index_lines(file)
    assert first.folder == again.folder
    write_lines(file, [chat_line("a", "b")])
    changed = index.index_lines(file)
    assert (len(changed), changed.folder != first.folder) == (1, True)
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert [json.loads(line) for line in index.index_lines(file).lines([0])] == [
        chat_line("a", "b")
    ]


def test_an_index_is_the_same_however_it_is_read(tmp_path, monkeypatch):
    rows = [chat_line("x" * (i % 50), "y", image=f"{i % 7}.jpg") for i in range(200)]
    file = write_lines(tmp_path / "x.jsonl", rows)
    whole = index.index_lines(file, tmp_path / "one")
    monkeypatch.setattr(index, "_CHUNK", 333)
    pieces = index.index_lines(file, tmp_path / "two")
    assert np.array_equal(whole.starts, pieces.starts)
    assert np.array_equal(whole.groups, pieces.groups)
    assert len(set(whole.groups.tolist())) == 7
    assert list((tmp_path / "two").iterdir()) == [pieces.folder]


def test_blank_lines_at_the_end_are_not_counted(tmp_path, monkeypatch):
    lines = b'{"image": "a"}\n\n{"image": "a"}\n'
    for chunk in (1 << 25, 5):
        monkeypatch.setattr(index, "_CHUNK", chunk)
        for end in (b"", b"\n", b"  ", b"\r\n\t\n \n"):
            file = tmp_path / f"{chunk}{len(end)}.jsonl"
            file.write_bytes(lines + end)
            found = index.index_lines(file)
            assert len(found) == 3, end
            assert found.size == len(lines)
            assert found.digest == index.digests_of(file, len(lines))[1]
            assert b"".join(found.lines(range(3))) == lines
        for blank in (b"", b"\n\n", index.json_rows.BOM, index.json_rows.BOM + b"\n \n"):
            (tmp_path / "blank.jsonl").write_bytes(blank)
            assert len(index.index_lines(tmp_path / "blank.jsonl")) == 0
