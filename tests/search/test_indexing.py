"""An index follows its folder: what is new, moved, changed, broken and gone; and any kill."""

import os
import random
import shutil
import time
from collections import Counter

import numpy as np
import photo_library
import pytest
import ranks
from photos import photo

from internvl.errors import UserError
from internvl.search import indexing
from internvl.search.encoder import Encoder
from internvl.search.store import Store, locked


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return photo_library.load_dual(tmp_path_factory.mktemp("dual"))


@pytest.fixture
def photos(tmp_path):
    return photo_library.library(tmp_path / "photos")


def features(index, mode="c"):
    """Path -> feature."""
    with Store(index) as store:
        return {p.path: store.features(mode)[p.row].copy() for p in store.photos(store.rows())}


def test_features_are_the_models(dual, photos, tmp_path):
    index = photo_library.make(photos, tmp_path / "index", dual, "cg")
    for mode in "cg":
        for path, feature in features(index, mode).items():
            expected = dual.encode_images(photos / path, mode)[0].numpy()
            np.testing.assert_allclose(feature, expected, atol=1e-5)
    half = photo_library.make(photos, tmp_path / "half", dual, dtype="float16")
    assert features(half)["e.png"].dtype == np.float16
    np.testing.assert_allclose(features(half)["e.png"], features(index)["e.png"], atol=1e-3)
    loaded = np.load(next(half.glob("features_c_*.npy")), mmap_mode="r")
    assert (loaded.shape, loaded.dtype) == ((5, 48), np.float16)


def test_moved_changed_copied_and_deleted_files_are_noticed(dual, photos, tmp_path, caplog):
    index = photo_library.make(photos, tmp_path / "index", dual)
    before = features(index)
    (photos / "new").mkdir()
    (photos / "e.png").rename(photos / "new/e.png")
    shutil.copy(photos / "2024/c.png", photos / "new/copy.png")
    photo(photos / "2023/beach/a.png", 99)
    (photos / "2023/beach/b.png").unlink()
    os.utime(photos / "2024/c.png", (1, 1))
    # Neither the moved, the copied nor the touched one is encoded again.
    with Store(index) as store:
        encoder = Encoder(lambda: dual, store.settings)
        encoded = []
        squares = encoder.squares
        encoder.squares = lambda pixels, modes: (
            encoded.append(len(pixels)) or squares(pixels, modes)
        )
        done = indexing.update(store, encoder)
    assert encoded == [1]
    assert str(done) == "5 photos: 1 new, 1 changed, 1 moved, 2 as before, 1 deleted"
    after = features(index)
    assert set(after) == {
        *("2023/beach/a.png", "2024/c.png", photo_library.NAMES[3], "new/copy.png", "new/e.png")
    }
    np.testing.assert_array_equal(after["new/e.png"], before["e.png"])
    np.testing.assert_array_equal(after["new/copy.png"], before["2024/c.png"])
    expected = dual.encode_images(photos / "2023/beach/a.png")[0].numpy()
    np.testing.assert_allclose(after["2023/beach/a.png"], expected, atol=1e-5)
    assert photo_library.update(index, dual).counts == Counter(deleted=0)


def test_two_files_that_change_names_keep_their_features(dual, photos, tmp_path):
    index = photo_library.make(photos, tmp_path / "index", dual)
    before = features(index)
    (photos / "e.png").rename(photos / "t")
    (photos / "2024/c.png").rename(photos / "e.png")
    (photos / "t").rename(photos / "2024/c.png")
    os.utime(photos / "e.png", (5, 5))
    photo_library.update(index, dual)
    after = features(index)
    np.testing.assert_allclose(after["e.png"], before["2024/c.png"], atol=1e-5)
    np.testing.assert_allclose(after["2024/c.png"], before["e.png"], atol=1e-5)


def test_a_broken_file_costs_a_line(dual, photos, tmp_path, caplog):
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "phone.heic").write_bytes(b"x")
    os.mkfifo(photos / "pipe.png")
    index = photo_library.make(photos, tmp_path / "index", dual)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2
    assert "cut.jpg" in lines[0]
    assert lines[1] == "1 .heic file: not read; convert them to JPEG"
    caplog.clear()
    done = photo_library.update(index, dual)
    assert str(done) == "5 photos: 5 as before; 1 file cannot be read"
    assert caplog.text.count("cut.jpg") == 1
    photo(photos / "cut.jpg", 7)
    assert str(photo_library.update(index, dual)) == "6 photos: 1 new, 5 as before"
    (photos / "cut.jpg").write_bytes(b"")
    assert str(photo_library.update(index, dual)).startswith("5 photos: 5 as before; 1 file")


def test_an_empty_or_missing_folder_deletes_nothing(dual, photos, tmp_path):
    index = photo_library.make(photos, tmp_path / "index", dual)
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="No such file"):
        photo_library.update(index, dual)
    photos.mkdir()
    with pytest.raises(UserError, match="is the disk mounted"):
        photo_library.update(index, dual)
    assert len(photo_library.paths(index)) == 5


def test_only_one_process_writes(dual, photos, tmp_path):
    index = photo_library.make(photos, tmp_path / "index", dual)
    says = "another process is indexing"
    with locked(index), pytest.raises(UserError, match=says), locked(index):
        pass
    with pytest.raises(UserError, match="neither an index of photos nor empty"), locked(photos):
        pass


def test_a_model_that_changed_is_refused(dual, photos, tmp_path):
    index = photo_library.make(photos, tmp_path / "index", dual)
    other = photo_library.load_dual(tmp_path / "other")
    other.model.text_projection.weight.data.mul_(-1)
    photo(photos / "more.png", 77)
    with pytest.raises(UserError, match="is another model or has changed since"):
        photo_library.update(index, other)


CODE = """
import sys
from pathlib import Path
import internvl
from internvl.search import indexing
from internvl.search.encoder import Encoder
from internvl.search.store import Store, locked

index, model = Path({index!r}), {model!r}
with locked(index), Store(index) as store:
    load = lambda: internvl.load(model, device="cpu", dtype="float32")
    indexing.update(store, Encoder(load, store.settings), batch_size=2)
Path({index!r}).with_suffix(".done").touch()
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(dual, tmp_path):
    names = [f"{seed % 3}/{seed}.png" for seed in range(40)]
    photos = photo_library.library(tmp_path / "photos", names)
    expected = features(photo_library.make(photos, tmp_path / "undisturbed", dual))
    encoder, index = Encoder(lambda: dual), tmp_path / "index"
    settings = encoder.new_settings(photos.resolve(), str(dual.folder), None, [], ["c"], "float32")
    Store.create(index, settings).__exit__()
    code = CODE.format(index=str(index), model=str(dual.folder))
    chance, counts = random.Random(0), [0]
    ranks._start_server()
    while not index.with_suffix(".done").exists():
        process = ranks._CONTEXT.Process(target=ranks._run, args=(code, dict(os.environ), tmp_path))
        process.start()
        goal, moment = counts[-1] + chance.randrange(1, 8), chance.uniform(0, 0.02)
        while process.exitcode is None and len(photo_library.paths(index)) < goal:
            time.sleep(0.005)
        time.sleep(moment)
        process.kill()
        process.join()
        reached = features(index)
        for path, feature in reached.items():
            np.testing.assert_allclose(feature, expected[path], atol=1e-5)
        counts.append(len(reached))
    assert counts == sorted(counts)
    assert len(counts) > 5
    assert set(features(index)) == set(expected)
