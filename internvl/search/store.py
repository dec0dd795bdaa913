"""An index on disk: a table of photos (SQLite), and their features (a NumPy file per mode).

    DIR/index.json             model, modes and type of the features
    DIR/photos.db              a row per photo: path, size, time, digest, date
    DIR/features_c_0001.npy    row r of the table is row r here
    DIR/thumbnails/

A kill loses at most the batch in work: its features are appended and flushed first, and a single
transaction then adds its rows. Rows are never written twice, so searches may run meanwhile.
Imports no torch.
"""

import fcntl
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np

from internvl.errors import UserError
from internvl.files import names_file, read_run_json, write_json
from internvl.search.scan import SETTINGS, TABLE, Entry, Scan

THUMBNAILS = "thumbnails"

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value);
CREATE TABLE photos (
    row INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER, mtime_ns INTEGER,
    digest BLOB NOT NULL, taken TEXT NOT NULL, has_exif INTEGER, width INTEGER, height INTEGER
);
CREATE INDEX photos_digest ON photos (digest);
CREATE TABLE broken (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, reason TEXT);
INSERT INTO meta VALUES ('generation', 1), ('next_row', 0);
"""
_HEADER = 128  # bytes of a .npy file of a matrix, whatever its rows: NumPy pads for growth
_COPY_ROWS = 65_536
_BUSY_S = 60.0
"""How long a reader waits for a writer's transaction, and a writer for a reader's."""


@dataclass(frozen=True)
class Settings:
    """How an index was made; its photos are comparable with this model's features alone."""

    folder: str
    """Absolute path of the photos."""
    model: str
    """Model folder, run folder or hub id."""
    step: int | None
    """Step of a run's checkpoint."""
    base: list[str]
    """See `open_model`."""
    modes: list[str]
    dtype: str
    """Of the features: float16 or float32."""
    width: int
    """Width of a feature (E)."""
    image_size: int
    """Side of the square that the model sees, px."""
    probe: dict[str, list[float]]
    """Features of a fixed text and image, which tell other weights under the same name."""


@dataclass(frozen=True)
class PhotoRow:
    """A photo of the table."""

    row: int
    path: str
    """Below the folder of photos, with slashes."""
    size: int
    mtime_ns: int
    digest: bytes
    """blake2b of the file, 16 bytes."""
    taken: str
    """ISO date and time, local: of EXIF, else of the last change."""
    has_exif: int
    """1 if `taken` is of EXIF."""
    width: int
    height: int
    """Upright size, px."""


_COLUMNS = ", ".join(PhotoRow.__annotations__)


class Store:
    """An opened index. Use it as a context manager.

    Raises:
        UserError: there is none, it is damaged, or another process writes it.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / SETTINGS).is_file() or not (folder / TABLE).is_file():
            raise UserError(
                f"{folder}: no index of photos; make it with "
                f"`internvl index PHOTOS --model MODEL --to {folder}`"
            )
        self.folder = folder
        values = read_run_json(folder / SETTINGS, "index the photos again, into another folder")
        try:
            self.settings = Settings(**values)
        except TypeError as error:
            raise UserError(
                f"{folder / SETTINGS}: of another version ({error}); index the photos again, into "
                "another folder"
            ) from None
        # mode=rw: a reader must roll back what a killed writer left.
        address = f"file:{quote(str(folder / TABLE))}?mode=rw"
        with self._errors():
            # Workers ask for digests; SQLite itself lets one statement run at a time.
            self._db = sqlite3.connect(
                address, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self.generation = self.meta("generation")

    @classmethod
    def create(cls, folder: Path, settings: Settings) -> Self:
        """Creates an empty index, and opens it."""
        folder.mkdir(parents=True, exist_ok=True)
        # The journal first: SQLite would play that of a killed creation back into a new table.
        for name in (f"{TABLE}-journal", TABLE):
            (folder / name).unlink(missing_ok=True)
        database = sqlite3.connect(folder / TABLE)
        database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        database.close()
        # Last: a folder without settings is no index yet.
        write_json(folder / SETTINGS, asdict(settings), indent=1)
        return cls(folder)

    @property
    def root(self) -> Path:
        """Folder of the photos."""
        return Path(self.settings.folder)

    def move_root(self, folder: Path) -> None:
        """Notes that the folder of photos has another path now."""
        self.settings = replace(self.settings, folder=str(folder))
        write_json(self.folder / SETTINGS, asdict(self.settings), indent=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._db.close()

    # Reading

    def meta(self, key: str) -> Any:
        """Returns a value of the table `meta`; None without it."""
        row = self._select("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def set_meta(self, key: str, value: str | int) -> None:
        with self._errors():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def version(self) -> int:
        """Returns a number that changes when another process writes."""
        return int(self._select("PRAGMA data_version").fetchone()[0])

    def approximate(self, mode: str) -> tuple[Path, dict[str, Any] | None]:
        """Returns the file of a mode's approximate index, and its measures; None without it."""
        file = self.folder / f"approximate_{mode}_{self.generation:04d}.faiss"
        built = self.meta(f"approximate_{mode}")
        return file, json.loads(built) if built is not None and file.is_file() else None

    @property
    def num_rows(self) -> int:
        """Rows of the feature files, those of deleted photos included."""
        return int(self.meta("next_row"))

    def count(self) -> int:
        """Returns the number of photos."""
        return int(self._select("SELECT count(*) FROM photos").fetchone()[0])

    def features(self, mode: str) -> np.ndarray:
        """Maps the features of a mode into memory: (num_rows, E), float16 or float32.

        Raises:
            UserError: the mode is not in the index, or its file is damaged.
        """
        if mode not in self.settings.modes:
            modes = " and ".join(name.upper() for name in self.settings.modes)
            raise UserError(
                f"{self.folder}: holds features of InternVL-{modes} alone; for --mode {mode} index "
                "the photos again with it, into another folder"
            )
        # Together: a compaction changes both.
        values = dict(self._select("SELECT key, value FROM meta"))
        self.generation = values["generation"]
        shape = (values["next_row"], self.settings.width)
        dtype = np.dtype(self.settings.dtype)
        if not shape[0]:
            return np.empty(shape, dtype)
        file = self._file(mode)
        size = _HEADER + shape[0] * shape[1] * dtype.itemsize
        if not file.is_file() or file.stat().st_size < size:
            raise UserError(f"{file}: missing or cut off; delete {self.folder} and index again")
        # "c": torch warns of arrays that cannot be written; nothing writes here.
        return np.memmap(file, dtype, "c", _HEADER, shape)

    def rows(self, where: str = "1", values: Sequence[Any] = ()) -> np.ndarray:
        """Returns the rows of photos that fulfil a condition of SQL, int64, ascending."""
        cursor = self._select(f"SELECT row FROM photos WHERE {where} ORDER BY row", values)
        with self._errors():
            return np.fromiter((row for (row,) in cursor), np.int64)

    def photos(self, rows: Iterable[int]) -> list[PhotoRow]:
        """Returns photos in the order of `rows`; those deleted meanwhile are left out."""
        query = f"SELECT {_COLUMNS} FROM photos WHERE row = ?"
        selected = (self._select(query, (int(row),)).fetchone() for row in rows)
        return [PhotoRow(*values) for values in selected if values is not None]

    def photo_of(self, digest: bytes) -> PhotoRow | None:
        """Returns a photo by its content."""
        query = f"SELECT {_COLUMNS} FROM photos WHERE digest = ? ORDER BY row LIMIT 1"
        values = self._select(query, (digest,)).fetchone()
        return None if values is None else PhotoRow(*values)

    def has_digest(self, digest: bytes) -> bool:
        """True if a photo with this content is in the index."""
        query = "SELECT 1 FROM photos WHERE digest = ? LIMIT 1"
        return self._select(query, (digest,)).fetchone() is not None

    def broken(self) -> list[tuple[str, str]]:
        """Returns (path, reason) of the files that cannot be read."""
        return self._select("SELECT path, reason FROM broken ORDER BY path").fetchall()

    # Writing

    def begin_scan(self, entries: Iterable[Entry]) -> int:
        """Notes the files that are in the folder now; returns their number."""
        with self._errors():
            self._db.execute("CREATE TEMP TABLE scan (path TEXT PRIMARY KEY, size, mtime_ns)")
            with self.transaction():
                self._db.executemany(
                    "INSERT INTO scan VALUES (?, ?, ?)",
                    ((entry.path, entry.size, entry.mtime_ns) for entry in entries),
                )
        return int(self._select("SELECT count(*) FROM scan").fetchone()[0])

    def to_read(self, *, rehash: bool) -> list[str]:
        """Returns the paths to read: new ones, and those whose size or time has changed.

        Args:
            rehash: all of them.
        """
        changed = """
            p.size IS s.size AND p.mtime_ns IS s.mtime_ns
            OR b.size IS s.size AND b.mtime_ns IS s.mtime_ns
        """
        query = f"""
            SELECT s.path FROM scan s LEFT JOIN photos p USING (path) LEFT JOIN broken b
            ON b.path = s.path WHERE NOT ({"0" if rehash else changed}) ORDER BY s.path
        """
        return [path for (path,) in self._select(query)]

    def add(
        self, photos: Sequence[PhotoRow], features: Mapping[str, np.ndarray]
    ) -> tuple[Counter[str], list[str]]:
        """Adds photos, or changes those of the same paths, in a single transaction.

        Args:
            photos: their rows are ignored. A photo with features in `features` is new or changed;
                any other takes those of a photo with the same content.
            features: mode -> features of the photos at the end of `photos`, (B, E).

        Returns:
            Counts by what was done, and the paths whose content is no longer in the index.
        """
        counts: Counter[str] = Counter()
        lost: list[str] = []
        first_encoded = len(photos) - len(next(iter(features.values())))
        old = {mode: self.features(mode) for mode in features}
        with self._errors(), self.transaction():
            # Inside: rows of a transaction that failed are free again.
            start = next_row = self.num_rows
            donors: list[int] = []
            for index, photo in enumerate(photos):
                before = self._row_of_path(photo.path)
                if index < first_encoded:
                    donor = self._donor(photo)
                    if donor is None:
                        lost.append(photo.path)
                        continue
                    is_moved = self._is_gone(donor.path)
                    if donor.path == photo.path or is_moved:
                        counts["moved" if is_moved else "unchanged"] += 1
                        self._replace(donor.row, photo, donor)
                        continue
                    # A copy made in this very batch has no features in the files yet.
                    is_new = donor.row >= start
                    donors.append(donors[donor.row - start] if is_new else donor.row)
                    photo = _dated(photo, donor)
                counts["changed" if before is not None else "new"] += 1
                self._insert(next_row, photo)
                next_row += 1
            for mode, encoded in features.items():
                self._append(mode, start, np.concatenate([old[mode][donors], encoded]))
            self._set_next_row(next_row)
        return counts, lost

    def add_broken(self, path: str, size: int, mtime_ns: int, reason: str) -> None:
        """Notes a file that cannot be read, so that it is not read again until it changes."""
        with self._errors(), self.transaction():
            self._db.execute("DELETE FROM photos WHERE path = ?", (path,))
            values = (path, size, mtime_ns, reason)
            self._db.execute("INSERT OR REPLACE INTO broken VALUES (?, ?, ?, ?)", values)

    def delete_gone(self, scan: Scan) -> int:
        """Deletes photos that are no longer in the folder; returns their number.

        Photos below a folder that could not be listed stay.
        """
        gone = "path NOT IN (SELECT path FROM scan)"
        gone += " AND substr(path, 1, length(?)) != ?" * len(scan.unlisted)
        values = [text for path in scan.unlisted for text in (f"{path}/", f"{path}/")]
        with self._errors(), self.transaction():
            self._db.execute(f"DELETE FROM broken WHERE {gone}", values)
            return self._db.execute(f"DELETE FROM photos WHERE {gone}", values).rowcount

    def compact(self) -> None:
        """Writes the features of the photos alone, without rows of deleted ones."""
        rows = self.rows()
        features = {mode: self.features(mode) for mode in self.settings.modes}
        with self._errors(), self.transaction():
            self.generation += 1
            for mode, old in features.items():
                for start in range(0, len(rows), _COPY_ROWS):
                    self._append(mode, start, old[rows[start : start + _COPY_ROWS]])
            # Ascending, so that a row is free by the time another photo takes it.
            self._db.executemany(
                "UPDATE photos SET row = ? WHERE row = ?", enumerate(rows.tolist())
            )
            self.set_meta("generation", self.generation)
            self._set_next_row(len(rows))
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Removes features of other generations, and thumbnails of photos that are gone."""
        for file in (*self.folder.glob("features_*.npy"), *self.folder.glob("approximate_*")):
            if not file.stem.endswith(f"_{self.generation:04d}"):
                file.unlink()
        for file in (self.folder / THUMBNAILS).glob("*/*"):
            digest = bytes.fromhex(file.stem) if _is_hexadecimal(file.stem) else b""
            if not self.has_digest(digest):
                file.unlink()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits what the block writes, or nothing of it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            # SQLite itself rolls back when the disk fails.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _file(self, mode: str) -> Path:
        return self.folder / f"features_{mode}_{self.generation:04d}.npy"

    def _append(self, mode: str, start: int, features: np.ndarray) -> None:
        """Writes features (B, E) from row `start` on, and flushes them to the disk."""
        dtype = np.dtype(self.settings.dtype)
        file = self._file(mode)
        # In place: the header has one length for any number of rows.
        shape = (start + len(features), self.settings.width)
        with names_file(file), file.open("r+b" if start else "wb") as stream:
            description = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": description, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            assert stream.tell() == _HEADER
            stream.seek(_HEADER + start * self.settings.width * dtype.itemsize)
            stream.write(np.ascontiguousarray(features, dtype).tobytes())
            # What a killed batch left behind it.
            stream.truncate()
            stream.flush()
            os.fsync(stream.fileno())

    def _row_of_path(self, path: str) -> int | None:
        row = self._select("SELECT row FROM photos WHERE path = ?", (path,)).fetchone()
        return None if row is None else int(row[0])

    def _donor(self, photo: PhotoRow) -> PhotoRow | None:
        """Returns a photo of the same content: itself, else one that is gone, else any."""
        query = f"""
            SELECT {_COLUMNS} FROM photos WHERE digest = ?
            ORDER BY path != ?, path IN (SELECT path FROM scan), row LIMIT 1
        """
        values = self._select(query, (photo.digest, photo.path)).fetchone()
        return None if values is None else PhotoRow(*values)

    def _is_gone(self, path: str) -> bool:
        return self._select("SELECT 1 FROM scan WHERE path = ?", (path,)).fetchone() is None

    def _replace(self, row: int, photo: PhotoRow, donor: PhotoRow) -> None:
        """Gives a row the path and time of a photo with the same content."""
        # Its own earlier row, if it held another content.
        self._db.execute("DELETE FROM photos WHERE path = ? AND row != ?", (photo.path, row))
        self._insert(row, _dated(photo, donor))

    def _insert(self, row: int, photo: PhotoRow) -> None:
        values = asdict(photo) | {"row": row}
        marks = ", ".join(f":{name}" for name in values)
        # OR REPLACE also removes the earlier row of this path.
        self._db.execute(f"INSERT OR REPLACE INTO photos ({_COLUMNS}) VALUES ({marks})", values)
        self._db.execute("DELETE FROM broken WHERE path = ?", (photo.path,))

    def _set_next_row(self, row: int) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'next_row'", (row,))

    def _select(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        with self._errors():
            return self._db.execute(query, values)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns errors of SQLite into sentences."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            file, text = self.folder / TABLE, str(error)
            if "locked" in text:
                raise UserError(
                    f"{file}: another process has been writing for {_BUSY_S:.0f} s; try again"
                ) from None
            if "malformed" in text or "not a database" in text:
                raise UserError(
                    f"{file} is damaged ({text}); delete {self.folder} and index again"
                ) from error
            raise UserError(
                f"{file} cannot be read or written ({text}); check the disk and its space, then "
                "start again"
            ) from error


def _dated(photo: PhotoRow, donor: PhotoRow) -> PhotoRow:
    """Returns a photo that was not decoded with the size and EXIF date of an equal one."""
    taken = donor.taken if donor.has_exif else photo.taken
    values = {"taken": taken, "has_exif": donor.has_exif}
    size = {"width": donor.width, "height": donor.height}
    return PhotoRow(**asdict(photo) | values | size)


def _is_hexadecimal(text: str) -> bool:
    return bool(text) and len(text) % 2 == 0 and set(text) <= set("0123456789abcdef")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from indexing into a folder, which is created.

    Raises:
        UserError: another one does, or the folder holds something else than an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A creation that was killed leaves no settings.
    begun = {TABLE, f"{TABLE}-journal", ".lock"}
    if not (folder / SETTINGS).is_file() and {file.name for file in folder.iterdir()} - begun:
        raise UserError(f"{folder}: neither an index of photos nor empty; give another --to")
    with (folder / ".lock").open("a") as lock:
        try:
            # A lock of the kernel's, which ends with the process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is indexing into it; wait for it to end"
            ) from None
        yield
