"""The layout of clip-retrieval's `inference`."""

import numpy as np
import photo_library
import pytest
from pyarrow import parquet

from internvl.errors import UserError
from internvl.search import clip_retrieval
from internvl.search.store import Store


def test_features_and_paths_are_row_by_row(tmp_path):
    dual = photo_library.load_dual(tmp_path / "dual")
    photos = photo_library.library(tmp_path / "p")
    index = photo_library.make(photos, tmp_path / "i", dual)
    (photos / "2024/c.png").unlink()
    photo_library.update(index, dual)
    with Store(index) as store:
        assert clip_retrieval.export(store, tmp_path / "out", "c") == 4
        with pytest.raises(UserError, match="not an empty folder"):
            clip_retrieval.export(store, tmp_path / "out", "c")
    features = np.load(tmp_path / "out/img_emb/img_emb_0.npy")
    table = parquet.read_table(tmp_path / "out/metadata/metadata_0.parquet").to_pydict()
    assert features.shape == (4, 48)
    assert table["width"] == [80] * 4
    expected = dual.encode_images(table["image_path"]).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)
