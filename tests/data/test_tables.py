"""Parquet and Arrow files as sources."""

import pickle

import numpy as np
import pytest
from data_files import picture, turns
from source_samples import good, opened, samples


def test_tables(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = picture(tmp_path / "a.png", (8, 8)).read_bytes()
    rows = [
        {"image": {"bytes": data, "path": None}, "conversations": turns("<image>\nWhat?", "A.")},
        {"image": None, "conversations": turns("Text?", "B.")},
        {"image": {"bytes": data, "path": None}, "conversations": turns("<image>\nAgain?", "C.")},
    ]
    folder = tmp_path / "parts"
    folder.mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows[:2]), folder / "0.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows[2:]), folder / "1.parquet")
    source = opened(folder, "parquet")
    first, text, again = good(source)
    assert (first.images, text.images, again.images) == ((data,), (), (data,))
    assert source.groups[0] == source.groups[2] != source.groups[1]
    assert good(pickle.loads(pickle.dumps(source))) == [first, text, again]
    captions = arrow.Table.from_pylist([{"image": "a.png", "text": "A square."}])
    parquet.write_table(captions, tmp_path / "c.parquet")
    (one,) = good(opened(tmp_path / "c.parquet", "parquet", prompt="Say:", images="/i"))
    assert (one.images, one.messages[1].content) == (("/i/a.png",), "A square.")
    (one,) = good(opened(tmp_path / "c.parquet", "parquet", images="/i"))
    assert [message.role for message in one.messages] == ["assistant"]
    stream = tmp_path / "saved" / "data-00000.arrow"
    stream.parent.mkdir()
    with (
        arrow.OSFile(str(stream), "wb") as sink,
        arrow.ipc.new_stream(sink, captions.schema) as out,
    ):
        out.write_table(captions)
    assert len(opened(stream.parent, "parquet", prompt="Say:")) == 1


def test_a_table_with_texts_that_are_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    ends = np.array([0, 2, 4, 6], dtype=np.int32).tobytes()
    buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"ok\xff\xfehi")]
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    whole = pyarrow.array(["a", "b", "c"])
    for image, text, wanted in ((whole, broken, ("ok", "hi")), (broken, whole, ("a", "c"))):
        parquet.write_table(pyarrow.table({"image": image, "text": text}), tmp_path / "x.parquet")
        source = opened(tmp_path / "x.parquet", "parquet")
        first, bad, last = samples(source)
        assert (first.messages[-1].content, last.messages[-1].content) == wanted
        assert f"{tmp_path / 'x.parquet'} row 2: a text in it is not UTF-8" in str(bad)
        assert len(set(source.groups.tolist())) == 3
