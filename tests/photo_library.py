"""A folder of photos, a small InternVL-14B, and an index of the one by the other."""

from pathlib import Path

from dual_folders import dual_folder, small_tokenizer
from photos import photo
from PIL import Image

import internvl
from internvl.search import indexing
from internvl.search.encoder import Encoder
from internvl.search.store import Store

NAMES = ("2023/beach/a.png", "2023/beach/b.png", "2024/c.png", "2024/雪地 & <b>d.png", "e.png")


def library(folder: Path, names=NAMES) -> Path:
    """Writes photos, another for each name."""
    for seed, name in enumerate(names):
        photo(folder / name, seed)
    return folder


def load_dual(folder: Path):
    return internvl.load(small_tokenizer(dual_folder(folder)), device="cpu", dtype="float32")


def make(photos: Path, to: Path, dual, modes=("c",), dtype="float32") -> Path:
    """An index of a folder."""
    encoder = Encoder(lambda: dual)
    settings = encoder.new_settings(photos.resolve(), str(dual.folder), None, [], [*modes], dtype)
    with Store.create(to, settings) as store:
        indexing.update(store, encoder)
    return to


def update(index: Path, dual, **options):
    """Brings an index up to date."""
    with Store(index) as store:
        return indexing.update(store, Encoder(lambda: dual, store.settings), **options)


def paths(index: Path) -> dict[str, int]:
    """Path -> row of every photo."""
    with Store(index) as store:
        return {photo.path: photo.row for photo in store.photos(store.rows())}


def dated_jpeg(path: Path, taken: str, orientation: int = 1) -> None:
    """A photo of a camera: wide as stored, red on its left half."""
    image = Image.new("RGB", (80, 60), "blue")
    image.paste("red", (0, 0, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9003] = taken
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif, quality=95)
