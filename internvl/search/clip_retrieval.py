"""Exports an index in the layout of clip-retrieval: what its `inference` command writes.

OUT/img_emb/img_emb_0.npy            features (N, E)
OUT/metadata/metadata_0.parquet      image_path and more, row by row
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from internvl.errors import UserError
from internvl.files import complete_folder
from internvl.search.store import Store

_COPY_ROWS = 65_536


def check(to: Path) -> None:
    """Raises UserError if pyarrow is missing, or `to` is not an empty folder."""
    if find_spec("pyarrow") is None:
        raise UserError(
            "this layout has Parquet files; install pyarrow with `pip install internvl[parquet]`"
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: not an empty folder; give another one")


def export(store: Store, to: Path, mode: str) -> int:
    """Writes features and paths of all photos; returns their number.

    Raises:
        UserError: there is no photo; or see `check`.
    """
    check(to)
    import pyarrow as pa
    from pyarrow import parquet

    features, rows = store.features(mode), store.rows()
    if not len(rows):
        raise UserError(f"{store.folder}: holds no photo to export")
    # Whole or not at all: half of its rows would pass for an index.
    with complete_folder(to) as partial:
        (partial / "img_emb").mkdir()
        (partial / "metadata").mkdir()
        exported = np.lib.format.open_memmap(
            partial / "img_emb/img_emb_0.npy", "w+", features.dtype, (len(rows), features.shape[1])
        )
        for start in range(0, len(rows), _COPY_ROWS):
            chosen = rows[start : start + _COPY_ROWS]
            exported[start : start + len(chosen)] = features[chosen]
        # Before the rename: what is mapped may not be in the file yet.
        exported.flush()
        photos = store.photos(rows)
        columns = {
            "image_path": [str(store.root / photo.path) for photo in photos],
            "width": [photo.width for photo in photos],
            "height": [photo.height for photo in photos],
            "taken": [photo.taken for photo in photos],
        }
        parquet.write_table(pa.table(columns), partial / "metadata/metadata_0.parquet")
    return len(rows)
