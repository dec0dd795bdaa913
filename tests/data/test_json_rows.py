"""JSON as annotation files have it: lines, lists, and what is neither."""

import json

import pytest
from data_files import chat_line, write_lines

from internvl.config import SourceConfig
from internvl.data import index, json_rows
from internvl.data.records import Sample
from internvl.data.sources import open_source
from internvl.errors import BadSample, DataError

ROWS = [
    chat_line("<image>\nOne?", "é \\u00e9", image="a.png", id=7),
    chat_line('Two: "quoted", [1, {2}]\n', "b\\"),
    chat_line("<image><image>\nThree?", "😀", image=["a.png", "b.png"]),
    chat_line("<image>\nFour?", "d", image="a.png"),
]
BOM = b"\xef\xbb\xbf"


def opened(path, data, kind="chat"):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return open_source(SourceConfig(name="x", type=kind, annotations=path))


def read(source):
    return list(source.samples(range(len(source))))


def without_names(samples):
    return [(s.messages, s.images, s.extra) for s in samples]


PRETTY = json.dumps(ROWS, indent=2, ensure_ascii=False)
LISTS = {
    "compact": json.dumps(ROWS).encode(),
    "indented": PRETTY.encode(),
    "with BOM": BOM + PRETTY.encode(),
    "CRLF": PRETTY.replace("\n", "\r\n").encode(),
    "a line an entry": ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n").encode(),
    "space around": b"\n \t" + json.dumps(ROWS).encode() + b"\n\n",
}


@pytest.mark.parametrize("chunk", [7, 1 << 24])
@pytest.mark.parametrize("form", LISTS)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_list_gives_the_samples_of_its_lines(name, form, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    lines = open_source(
        SourceConfig(name="x", annotations=write_lines(tmp_path / "lines.jsonl", ROWS))
    )
    found = opened(tmp_path / name, LISTS[form])
    assert without_names(read(found)) == without_names(read(lines))
    assert [s.name for s in read(found)] == [f"{tmp_path / name} entry {n}" for n in (1, 2, 3, 4)]
    groups = found.groups.tolist()
    assert [groups.index(group) for group in groups] == [0, 1, 2, 0]


def test_a_list_is_written_into_the_cache_once(tmp_path, monkeypatch):
    first = opened(tmp_path / "x.json", LISTS["indented"])
    monkeypatch.setattr(json_rows, "entries", None)
    (tmp_path / "elsewhere").mkdir()
    again = opened(tmp_path / "elsewhere" / "y.json", LISTS["indented"])
    assert again.index.folder == first.index.folder


def test_one_object_is_one_sample(tmp_path):
    for name, indent in (("a.json", None), ("b.json", 2)):
        (sample,) = read(opened(tmp_path / name, json.dumps(ROWS[0], indent=indent)))
        assert sample.messages[0].content == "<image>\nOne?"
    assert json_rows.is_list(tmp_path / "b.json")
    row = {"question": "q", "chosen": "a", "rejected": "b"}
    (sample,) = read(opened(tmp_path / "c.json", json.dumps(row, indent=1), "preference"))
    assert sample.rejected == "b"


ONE = json.dumps(ROWS[0])
INDENTED = json.dumps(ROWS[0], indent=1)
ONE_A_LINE = r"; write one JSON object a line \(JSON Lines\), or one JSON list of all"
UNUSABLE = [
    ("[]", "is empty; it holds no sample"),
    (f"{ONE}\r{ONE}\r", r"has the line ends of old Macs \(CR alone\); save it with LF or CRLF"),
    (" [ ]\n", "is empty; it holds no sample"),
    (PRETTY[:-30], "entry 4: not JSON .* the file may be cut off"),
    (PRETTY[:-2], "entry 4: no comma and no `]` after it"),
    (json.dumps(ROWS)[:-1] + ",]", r"entry 5: not JSON \(Expecting value\)"),
    (PRETTY.replace("},\n  {", "}\n  {"), "entry 1: no comma and no `]` after it"),
    (PRETTY + PRETTY, f"text follows the end of its JSON list{ONE_A_LINE}"),
    (repr(ROWS), r"entry 1: not JSON \(Expecting property name"),
    ("[" + "[" * 100_000, "entry 1: its lists and objects are nested too deeply"),
    ("[1" + "0" * 5000 + "]", "entry 1: a number in it has thousands of digits"),
    (json.dumps({"train": ROWS, "test": ROWS[:1]}), f"'train' .4 entries., 'test' .*{ONE_A_LINE}"),
    (json.dumps({"train": ROWS}, indent=1), f"is one JSON object that holds 'train'.*{ONE_A_LINE}"),
    (json.dumps(dict(enumerate(ROWS)), indent=1), f"holds '0', '1', '2', '3'{ONE_A_LINE}"),
    ("\n".join([INDENTED] * 3), f"objects over several lines each{ONE_A_LINE}"),
    (PRETTY.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    (ONE.encode("utf-16-le"), "is UTF-16 or UTF-32; save it as UTF-8"),
    (ONE.encode("utf-32"), "is UTF-32; save it as UTF-8"),
    ('{"a": "图片里有狗"}\n'.encode("gbk") * 9, "is not UTF-8; save it as UTF-8"),
    (
        json.dumps([{"a": "图片里有狗"}], ensure_ascii=False).encode("gbk"),
        "is not UTF-8; save it as UTF-8",
    ),
    (b"\x1f\x8b\x08\x00", "is compressed by gzip; unpack it"),
    (b"PAR1\x15", "is a Parquet file; give its source `type: parquet`"),
    ("version https://git-lfs.github.com/spec/v1\noid x\n", "is a Git LFS pointer, not the file"),
    ("<!DOCTYPE html>\n<html>", "is a web page; fetch the file itself"),
]


@pytest.mark.parametrize(("data", "problem"), UNUSABLE)
def test_a_file_that_is_no_rows_is_one_sentence(data, problem, tmp_path):
    with pytest.raises(DataError, match=f"x.json.* {problem}"):
        opened(tmp_path / "x.json", data)


NO_ROWS = "`conversations` must be a list of turns"
HALF = r"holds half a character (\ud83d); write the whole one, or remove it"
TOO_DEEP = "its lists and objects are nested too deeply to be read; write them flatter"
BAD = {
    '{"conversations": [{"value": "\\ud83d"}]}': f"`conversations[0].value` {HALF}",
    '{"conversations": [{"from": "\\uD83D", "value": ""}]}': f"`conversations[0].from` {HALF}",
    '{"image": "\\ud83d.png"}': f"`image` {HALF}",
    '{"a": {"b": [1, "x\\ud83d"]}}': f"`a.b[1]` {HALF}",
    '{"\\ud83d": 1}': f"`\\ud83d` {HALF}",
    '{"x": "\\ude00\\ud83d"}': r"`x` holds half a character (\ude00)",
    b'{"x": "\xed\xa0\xbd"}': "not UTF-8; save the file as UTF-8",
    '{"image": "a.png", "image": "b.png"}': "the key 'image' stands twice in one object; keep one",
    '{"a": {"b": 1, "b": 1}}': "the key 'b' stands twice in one object; keep one",
    '{"a":' + "[" * 100_000: TOO_DEEP,
    '{"id": 1' + "0" * 5000 + "}": "a number in it has thousands of digits",
    '{"a": \0}': "not JSON (Expecting value",
    "{}{}": "not JSON (Extra data",
    "[1]": "a JSON object is expected, not list",
    "null": "a JSON object is expected, not NoneType",
    " ": "the line is blank; remove it",
    BOM: "the line is blank; remove it",
    '{"image": "a\\u0000.png", "conversations": []}': r"the path 'a\x00.png' holds a NUL character",
    '{"image": NaN, "conversations": []}': "`image` must be a path or a list of paths, not nan",
    '{"video": "a.mp4", "clip": [0, Infinity], "conversations": []}': "`clip` must be [start, end]",
    '{"video": "a.mp4", "clip": [0, 1' + "0" * 400 + '], "conversations": []}': "`clip` must be",
}


def ends_a_list(line):
    """Whether nothing after the bad row can be read in a JSON list: it has no end of its own."""
    content = line if isinstance(line, bytes) else line.encode()
    return not content.removeprefix(BOM).strip() or BAD[line].startswith(
        ("not", TOO_DEEP, "a number")
    )


@pytest.mark.parametrize(
    ("form", "line"),
    [("lines", line) for line in BAD] + [("list", line) for line in BAD if not ends_a_list(line)],
)
def test_a_bad_row_is_named_and_the_others_are_fine(form, line, tmp_path):
    data = line if isinstance(line, bytes) else line.encode()
    if form == "lines":
        source = opened(tmp_path / "x.jsonl", b"\n".join([ONE.encode(), data, ONE.encode(), b""]))
        where = "line 2"
    else:
        source = opened(tmp_path / "x.json", b"[" + b",\n".join([ONE.encode(), data]) + b"]")
        where = "entry 2"
    first, bad, *_ = read(source)
    assert isinstance(first, Sample)
    assert isinstance(bad, BadSample)
    assert str(bad).startswith(f"{source.config.annotations} {where}: {BAD[line]}")
    str(bad).encode()  # any terminal takes it
    if form == "lines":
        assert isinstance(read(source)[2], Sample)
    assert len(source.groups) == len(source)


def test_what_only_looks_wrong_is_read(tmp_path):
    row = chat_line("\\ud83d as text, \0 too", "😀", score=float("nan"), id=10**300)
    lines = [json.dumps(row), json.dumps(row, ensure_ascii=False)]
    data = b"\n".join([BOM + line.encode() for line in lines])  # as files that were joined
    first, second = read(opened(tmp_path / "x.jsonl", data))
    assert first.messages == second.messages
    assert first.messages[0].content == "\\ud83d as text, \0 too"
    assert first.messages[1].content == "😀"
    assert first.extra["id"] == 10**300


def test_a_broken_first_line_is_a_bad_sample(tmp_path):
    for line in ('{"image": "a",', ONE[:30], "[1]", "x"):
        first, *others = read(opened(tmp_path / "x.jsonl", f"{line}\n{ONE}\n{ONE}\n"))
        assert isinstance(first, BadSample)
        assert all(isinstance(sample, Sample) for sample in others)
        assert len(others) == 2


def test_an_entry_that_never_ends_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK", 64)
    monkeypatch.setattr(json_rows, "_LONGEST", 200)
    with pytest.raises(DataError, match=r"entry 2: not JSON \(Unterminated string"):
        opened(tmp_path / "x.json", f'[{ONE}, {{"a": "' + "x" * 9999)


def test_rows_that_json_cannot_hold_are_bad_rows(tmp_path):
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    rows = [
        {"where": "a", "caption": "red \ud83d"},
        {"where": "b\udcd6", "caption": "fine"},
        {"where": "c", "row": deep},
    ]
    found = index.convert_once("x", [b"unique to this test"], lambda: iter(rows))
    assert [json.loads(line) for line in found.lines([0, 1, 2])] == [
        {"where": "a", "bad": f"`caption` {HALF}"},
        {"where": r"b\udcd6", "caption": "fine"},
        {"where": "c", "bad": TOO_DEEP},
    ]
