"""Random access to rows of Parquet and Arrow files, memory-mapped."""

import hashlib
import importlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from internvl.data.index import index_folder, new_entry
from internvl.errors import DataError
from internvl.files import first_line

_BATCH = 256  # rows read from a Parquet file at once
_MEDIA = ("image", "images", "video", "videos")


class Table:
    """Rows of a file or folder, in the order of the file names.

    Arrow files (`datasets.save_to_disk`) are mapped in place. Parquet has no access by row, so it
    is written once, uncompressed, as Arrow into the cache folder.

    Raises:
        DataError: pyarrow is missing, or the folder has no such file.
        FileNotFoundError: `path` does not exist.
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

    # Mapped on first use, in each process: a mapping cannot be pickled.
    @cached_property
    def _tables(self) -> list[Any]:
        return [_map(file) for file in self.files]

    @cached_property
    def ends(self) -> np.ndarray:
        """Cumulative row count after each file, int64 (files,)."""
        return np.cumsum([len(table) for table in self._tables])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def row(self, index: int) -> dict[str, Any]:
        """Returns row `index` as Python values."""
        file_index = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[file_index - 1]) if file_index else 0
        return self._tables[file_index].slice(index - start, 1).to_pylist()[0]

    @cached_property
    def groups(self) -> np.ndarray:
        """Group of each row, int32 (rows,): equal for rows with the same image paths or bytes."""
        digests: list[bytes] = []
        for table in self._tables:
            names = [name for name in table.column_names if name in _MEDIA]
            for batch in table.select(names).to_batches(max_chunksize=_BATCH):
                for position, row in enumerate(_rows(batch)):
                    media = [value for value in row.values() if value]
                    # A row without media shares with no other: a group of its own.
                    text = repr(media) if media else f"row {len(digests)} {position}"
                    digests.append(hashlib.blake2b(text.encode(), digest_size=8).digest())
        keys = np.frombuffer(b"".join(digests), dtype=np.uint64)
        return np.unique(keys, return_inverse=True)[1].astype(np.int32)

    def digest(self, files: int | None = None) -> str:
        """Returns the SHA-256 hex digest of the first `files` files' rows (None: all).

        Image bytes count by their sizes only.
        """
        digest = hashlib.sha256()
        for table in self._tables[:files]:
            digest.update(repr((len(table), table.schema.names)).encode())
            for column in table.columns:
                for chunk in column.chunks:
                    _update(digest, chunk)
        return digest.hexdigest()


def _update(digest: Any, array: Any) -> None:
    """Adds the values of an Arrow array to a digest, of binary ones only their offsets."""
    types = _arrow().types
    array_type = array.type
    if types.is_struct(array_type):
        for field_index in range(array_type.num_fields):
            _update(digest, array.field(field_index))
        return
    buffers = array.buffers()
    if types.is_dictionary(array_type):
        _update(digest, array.dictionary)
    if types.is_list(array_type) or types.is_large_list(array_type):
        _update(digest, array.values)
        buffers = buffers[:2]
    elif types.is_binary(array_type) or types.is_large_binary(array_type):
        # Validity and offsets, not the images themselves: reading them would take too long.
        buffers = buffers[:2]
    for buffer in buffers:
        digest.update(b"-" if buffer is None else memoryview(buffer))


def _rows(batch: Any) -> list[dict[str, Any]]:
    """Returns a batch as Python values; a row with text that is not UTF-8 becomes {}."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        rows = []  # row by row: one bad text must not cost the other 255
        for position in range(len(batch)):
            try:
                rows += batch.slice(position, 1).to_pylist()
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
    """Maps the Arrow table of a file, in the stream or the file format, without reading it."""
    arrow = _arrow()
    # A damaged file raises Arrow's own errors, a truncated one an OSError.
    arrow_errors = (arrow.ArrowException, OSError)
    try:
        source = arrow.memory_map(str(file), "r")
        try:
            return arrow.ipc.open_stream(source).read_all()
        except arrow_errors:
            return arrow.ipc.open_file(source).read_all()
    except arrow_errors as error:
        raise _damaged(file, "Arrow", error) from None


def _damaged(file: Path, file_format: str, error: Exception) -> DataError:
    return DataError(
        f"{file} is no {file_format} file ({first_line(error)}); download or write it again"
    )


def _check(file: Path) -> None:
    """Checks that the offsets of an Arrow file stay inside it. Raises DataError."""
    # Arrow follows any offset, beyond the mapping too, which kills the process (SIGBUS).
    arrow = _arrow()
    table = _map(file)
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except arrow.ArrowInvalid as error:
            # Text is validated last, and text that is not UTF-8 costs only its own row.
            if "UTF8" not in str(error):
                raise _damaged(file, f"whole Arrow ({name!r})", error) from None


def _as_arrow(file: Path) -> Path:
    """Converts a Parquet file to Arrow in the cache; returns the path."""
    # Keyed by path, size and mtime: to digest the content would read images of any size.
    arrow = _arrow()
    parquet = importlib.import_module("pyarrow.parquet")
    state = file.stat()
    key = repr((str(file.resolve()), state.st_size, state.st_mtime_ns)).encode()
    folder = index_folder() / f"table-{hashlib.sha256(key).hexdigest()[:32]}"
    if not folder.is_dir():
        try:
            source = parquet.ParquetFile(file)
            with (
                new_entry(folder) as partial,
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
