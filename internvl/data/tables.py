"""Parquet and Arrow files as rows by number: memory-mapped, so that only what is read is held."""

import hashlib
import importlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from internvl.data.index import cache_folder, complete_or_absent
from internvl.errors import DataError
from internvl.files import first_line

_BATCH = 256  # rows read from a Parquet file at once
_MEDIA = ("image", "images", "video", "videos")


class Table:
    """The rows of a file or folder, in the order of the file names.

    Arrow files (`datasets.save_to_disk`) are mapped where they lie. Parquet has no access by row:
    it is written once, uncompressed, as Arrow into the cache folder.

    Raises:
        DataError: pyarrow is missing, or there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _arrow()
        if not path.exists():
            raise FileNotFoundError(path)
        files = [path] if path.is_file() else sorted(path.rglob("*.arrow"))
        files = files or sorted(path.rglob("*.parquet"))
        if not files:
            raise DataError(f"{path}: there is no .parquet or .arrow file in it")
        for file in files:
            if file.suffix != ".parquet":
                _check(file)  # once; worker processes get the checked files by their paths
        self.files = [_as_arrow(f) if f.suffix == ".parquet" else f for f in files]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files}

    @cached_property
    def _tables(self) -> list[Any]:
        return [_map(file) for file in self.files]

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 (files,): rows up to the end of every file."""
        return np.cumsum([len(table) for table in self._tables])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` as Python values."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[number - 1]) if number else 0
        return self._tables[number].slice(index - before, 1).to_pylist()[0]

    @cached_property
    def groups(self) -> np.ndarray:
        """int32 (rows,): the same number for rows with the same paths or bytes of images."""
        digests: list[bytes] = []
        for table in self._tables:
            names = [name for name in table.column_names if name in _MEDIA]
            for batch in table.select(names).to_batches(max_chunksize=_BATCH):
                for position, row in enumerate(_rows(batch)):
                    named = [value for value in row.values() if value]
                    text = repr(named) if named else f"row {len(digests)} {position}"
                    digests.append(hashlib.blake2b(text.encode(), digest_size=8).digest())
        keys = np.frombuffer(b"".join(digests), dtype=np.uint64)
        return np.unique(keys, return_inverse=True)[1].astype(np.int32)

    def digest(self, files: int | None = None) -> str:
        """SHA-256 of the first files' rows (None: all) in hexadecimal digits.

        Of bytes of images only their sizes count: reading all of them would take too long.
        """
        digest = hashlib.sha256()
        for table in self._tables[:files]:
            digest.update(repr((len(table), table.schema.names)).encode())
            for column in table.columns:
                for chunk in column.chunks:
                    _update(digest, chunk)
        return digest.hexdigest()


def _update(digest: Any, array: Any) -> None:
    """Adds an Arrow array's values to a digest, of binary ones only where they begin."""
    types = _arrow().types
    kind = array.type
    if types.is_struct(kind):
        for number in range(kind.num_fields):
            _update(digest, array.field(number))
        return
    buffers = array.buffers()
    if types.is_dictionary(kind):
        _update(digest, array.dictionary)
    if types.is_list(kind) or types.is_large_list(kind):
        _update(digest, array.values)
        buffers = buffers[:2]
    elif types.is_binary(kind) or types.is_large_binary(kind):
        buffers = buffers[:2]
    for buffer in buffers:
        digest.update(b"-" if buffer is None else memoryview(buffer))


def _rows(batch: Any) -> list[dict[str, Any]]:
    """A batch as Python values; a row with a text that is not UTF-8 is empty."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        rows = []
        for number in range(len(batch)):
            try:
                rows += batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                rows.append({})
        return rows


def _arrow() -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise DataError(
            "reading Parquet and Arrow files needs pyarrow: pip install 'internvl[parquet]'"
        ) from None


def _map(file: Path) -> Any:
    """The Arrow table in a file, of the stream or the file format, without reading it."""
    arrow = _arrow()
    # Of a damaged file Arrow says so by its own errors and, for want of bytes, by an OSError.
    wrong = (arrow.ArrowException, OSError)
    try:
        source = arrow.memory_map(str(file), "r")
        try:
            return arrow.ipc.open_stream(source).read_all()
        except wrong:
            return arrow.ipc.open_file(source).read_all()
    except wrong as error:
        raise _damaged(file, "Arrow", error) from None


def _damaged(file: Path, form: str, error: Exception) -> DataError:
    return DataError(f"{file} is no {form} file ({first_line(error)}); download or write it again")


def _check(file: Path) -> None:
    """Checks that the offsets of an Arrow file stay in it. Raises DataError.

    Arrow follows whatever offsets a file has, out of the mapped file too, which kills the process.
    """
    arrow = _arrow()
    table = _map(file)
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except arrow.ArrowInvalid as error:
            # Texts are checked last, and one that is not UTF-8 costs its own row alone.
            if "UTF8" not in str(error):
                raise _damaged(file, f"whole Arrow ({name!r})", error) from None


def _as_arrow(file: Path) -> Path:
    """A Parquet file as Arrow in the cache; name, size and time stand for its content."""
    arrow = _arrow()
    parquet = importlib.import_module("pyarrow.parquet")
    state = file.stat()
    key = repr((str(file.resolve()), state.st_size, state.st_mtime_ns)).encode()
    folder = cache_folder() / f"table-{hashlib.sha256(key).hexdigest()[:32]}"
    if not folder.is_dir():
        try:
            source = parquet.ParquetFile(file)
            with (
                complete_or_absent(folder) as partial,
                arrow.OSFile(str(partial / "rows.arrow"), "wb") as sink,
                arrow.ipc.new_stream(sink, source.schema_arrow) as writer,
            ):
                for batch in source.iter_batches(batch_size=_BATCH):
                    writer.write_batch(batch)
        except (arrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's: no rights, no space
            raise _damaged(file, "Parquet", error) from None
    return folder / "rows.arrow"
