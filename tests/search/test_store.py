"""The index on disk: compaction, damage, and readers beside a writer."""

import json
import resource
import signal
import sqlite3

import numpy as np
import pytest

from internvl.errors import UserError
from internvl.search.scan import Entry, Scan
from internvl.search.store import SETTINGS, TABLE, PhotoRow, Settings, Store, locked

WIDTH = 4


def settings(folder, **changes):
    values = {"folder": str(folder), "model": "m", "step": None, "base": [], "modes": ["c", "g"]}
    values |= {"dtype": "float32", "width": WIDTH, "image_size": 8, "probe": {}}
    return Settings(**values | changes)


def row(name, digest=None):
    content = digest or name.encode().ljust(16)
    return PhotoRow(0, name, 1, 1, content, "2024-05-01T00:00:00", 0, 8, 8)


def features(*values):
    rows = np.array([[value] * WIDTH for value in values], np.float32)
    return {"c": rows, "g": -rows}


@pytest.fixture
def store(tmp_path):
    with Store.create(tmp_path / "index", settings(tmp_path)) as store:
        names = [f"{i}.png" for i in range(6)]
        there = [name for name in (*names, "a.png", "b.png") if name not in ("1.png", "4.png")]
        store.begin_scan(Entry(name, 1, 1) for name in there)
        store.add([row(name) for name in names], features(*range(6)))
        yield store


def scan(tmp_path):
    return Scan(tmp_path, tmp_path / "index")


def test_rows_are_never_written_twice(store, tmp_path):
    assert store.delete_gone(scan(tmp_path)) == 2
    store.add([row("7.png")], features(7))
    assert store.rows().tolist() == [0, 2, 3, 5, 6]
    assert store.features("c")[6, 0] == 7
    assert store.features("g")[6, 0] == -7


def test_compaction_keeps_photos_and_features_together(store, tmp_path):
    store.delete_gone(scan(tmp_path))
    with Store(store.folder) as reader:
        old, version = reader.features("c"), reader.version()
        store.compact()
        assert old[5, 0] == 5  # a file that is mapped outlives its name
        assert reader.version() != version
        assert reader.features("c")[:, 0].tolist() == [0, 2, 3, 5]
        assert [photo.path for photo in reader.photos(range(4))] == [
            *("0.png", "2.png", "3.png", "5.png")
        ]
    assert [file.name for file in sorted(store.folder.glob("*.npy"))] == [
        *("features_c_0002.npy", "features_g_0002.npy")
    ]
    store.add([row("8.png")], features(8))
    assert store.features("c")[:, 0].tolist() == [0, 2, 3, 5, 8]


def test_what_a_failed_batch_wrote_is_overwritten(store, monkeypatch):
    def fail(row):
        raise OSError("killed here")

    with monkeypatch.context() as patched:
        patched.setattr(store, "_set_next_row", fail)
        with pytest.raises(OSError, match="killed"):
            store.add([row("8.png")], features(8))
    assert store.count() == 6
    store.add([row("9.png")], features(9))
    assert store.features("c")[6, 0] == 9


def test_a_creation_that_was_killed_is_begun_again(tmp_path):
    index = tmp_path / "index"
    index.mkdir()
    for name in (TABLE, f"{TABLE}-journal"):
        (index / name).write_bytes(b"half")
    with locked(index), Store.create(index, settings(tmp_path)) as store:
        assert store.count() == 0
        assert sorted(file.name for file in index.iterdir()) == [".lock", SETTINGS, TABLE]


def test_a_full_disk_loses_nothing(tmp_path):
    wide = settings(tmp_path, width=30_000, modes=["c"])
    ones = np.ones((1, wide.width), np.float32)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Store.create(tmp_path / "index", wide) as store:
        store.begin_scan([])
        store.add([row("a.png")], {"c": ones})
        # The table is smaller than a feature; the second one does not fit.
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limit[1]))
        try:
            with pytest.raises(OSError, match="features_c_0001.npy"):
                store.add([row("b.png")], {"c": 2 * ones})
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
            with pytest.raises(UserError, match="check the disk and its space, then start again"):
                store.set_meta("key", "x" * 50_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            signal.signal(signal.SIGXFSZ, before)
        assert store.features("c")[:, 0].tolist() == [1]
        store.add([row("c.png")], {"c": 3 * ones})
        assert store.features("c")[:, 0].tolist() == [1, 3]


def test_copies_of_a_photo_take_its_features(store):
    copies = [row("a.png", b"2.png".ljust(16)), row("b.png", b"2.png".ljust(16))]
    counts, lost = store.add(copies, empty())
    assert (counts["new"], lost) == (2, [])
    assert store.features("c")[6:, 0].tolist() == [2, 2]
    counts, lost = store.add([row("c.png", b"none".ljust(16))], empty())
    assert lost == ["c.png"]


def empty():
    return {mode: np.empty((0, WIDTH), np.float32) for mode in "cg"}


def test_photos_below_a_folder_that_cannot_be_listed_stay(tmp_path):
    with Store.create(tmp_path / "index", settings(tmp_path)) as store:
        store.begin_scan([Entry("a.png", 1, 1)])
        store.add([row("a.png"), row("x/b.png"), row("xy/c.png")], features(1, 2, 3))
        partial = scan(tmp_path)
        partial.unlisted.append("x")
        assert store.delete_gone(partial) == 1
        assert [photo.path for photo in store.photos(store.rows())] == ["a.png", "x/b.png"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda index: (index / SETTINGS).unlink(), "no index of photos; make it with"),
        (lambda index: (index / SETTINGS).write_text("{"), "is damaged"),
        (lambda index: (index / SETTINGS).write_text(json.dumps({"a": 1})), "another version"),
        (lambda index: (index / TABLE).write_bytes(b"x" * 5000), "is damaged"),
        (lambda index: (index / "features_c_0001.npy").unlink(), "missing or cut off"),
        (lambda index: (index / "features_c_0001.npy").write_bytes(b""), "missing or cut off"),
    ],
)
def test_damage_is_a_sentence(store, damage, sentence):
    damage(store.folder)
    with pytest.raises(UserError, match=sentence), Store(store.folder) as opened:
        opened.features("c")


def test_a_mode_that_is_not_there_is_named(tmp_path):
    with Store.create(tmp_path / "i", settings(tmp_path, modes=["c"])) as store:
        assert store.features("c").shape == (0, WIDTH)
        with pytest.raises(UserError, match="features of InternVL-C alone; for --mode g"):
            store.features("g")


def test_a_writer_that_does_not_end_is_named(store, monkeypatch):
    monkeypatch.setattr("internvl.search.store._BUSY_S", 0.01)
    writer = sqlite3.connect(store.folder / TABLE)
    writer.execute("BEGIN EXCLUSIVE")
    with (
        pytest.raises(UserError, match="another process has been writing"),
        Store(store.folder) as opened,
    ):
        opened.count()
    writer.close()
