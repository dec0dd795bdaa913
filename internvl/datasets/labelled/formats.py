"""Reads files of labelled images that other programs wrote: MATLAB, IDX, TFRecord, pickled batches.

Nothing is unpickled or run: only the values that the sets need are taken out of the bytes.
"""

import io
import pickletools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.data.images import FileSlice, open_rgb
from internvl.errors import DataError


@dataclass(frozen=True)
class RawImage(FileSlice):
    """Pixels without a header inside another file: uint8 of `shape`, in the order `axes`."""

    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    """Axes of the stored array that become (H, W) or (H, W, C)."""

    def read(self) -> bytes:
        """Returns the image encoded as BMP."""
        data = super().read()
        if len(data) < self.size:  # for the message of a truncated file
            return data
        pixels = np.frombuffer(data, np.uint8).reshape(self.shape).transpose(self.axes)
        return _bmp(Image.fromarray(np.ascontiguousarray(pixels)))


@dataclass(frozen=True)
class Crop(FileSlice):
    """A box of an image file, in pixels: left, top, right, bottom."""

    box: tuple[int, int, int, int] = (0, 0, 0, 0)

    def read(self) -> bytes:
        """Returns the box encoded as BMP."""
        return _bmp(open_rgb(self.path).crop(self.box))


@dataclass(frozen=True)
class StackedImage(FileSlice):
    """Image `index` of an array (N, H, W, 3) in an HDF5 file."""

    index: int = 0

    def read(self) -> bytes:
        """Returns the image encoded as BMP."""
        import h5py  # type: ignore[import-not-found, unused-ignore]  # only PCam needs it

        with h5py.File(self.path) as file:
            return _bmp(Image.fromarray(file["x"][self.index]))


def _bmp(image: Image.Image) -> bytes:
    # Without loss, and nearly as fast as a copy.
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


def read_idx_labels(path: Path) -> list[int]:
    """Reads a one-dimensional IDX file (MNIST's labels)."""
    shape, offset = idx_shape(path, 1)
    return [*path.read_bytes()[offset : offset + shape[0]]]


def idx_shape(path: Path, dimensions: int) -> tuple[tuple[int, ...], int]:
    """Returns the shape of an IDX file of bytes with so many dimensions, and where its data begin.

    Raises:
        DataError: not such a file.
    """
    with path.open("rb") as file:
        head = file.read(4)
        if head != b"\0\0\x08" + bytes([dimensions]):
            raise DataError(f"{path} is no IDX file of bytes; unpack it, or fetch it again")
        sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise DataError(f"{path} ends within its head; fetch it again")
    return struct.unpack(f">{dimensions}I", sizes), 4 + len(sizes)


def read_pickled_lists(path: Path) -> tuple[dict[str, list[Any]], tuple[int, int]]:
    """Returns the lists of a pickled dict by key, and (offset, size) of its longest bytes.

    The pickle is only listed, opcode by opcode; nothing of it is executed.

    Raises:
        DataError: no pickle.
    """
    data = path.read_bytes()
    lists: dict[str, list[Any]] = {}
    longest = (0, 0)
    name, current, inside = "", None, False
    try:
        for opcode, argument, start in pickletools.genops(data):
            position = start or 0
            if opcode.name == "EMPTY_LIST":
                current = lists.setdefault(name, [])
            elif opcode.name == "MARK":
                inside = current is not None
            elif opcode.name == "APPENDS":
                inside = False
            elif isinstance(argument, str | bytes) and opcode.arg and "PUT" not in opcode.name:
                head = {"BINSTRING": 5, "BINBYTES": 5, "BINBYTES8": 9}.get(opcode.name)
                if head is not None and len(argument) > longest[1]:
                    longest = (position + head, len(argument))
                text = argument if isinstance(argument, str) else argument.decode("latin-1")
                if inside and current is not None:
                    current.append(text)
                elif len(text) < 100:
                    name, current = text, None
            elif inside and current is not None and isinstance(argument, int):
                # Memo numbers are no values.
                if opcode.name.startswith(("BININT", "INT", "LONG")):
                    current.append(argument)
    except ValueError as error:
        raise DataError(f"{path} is no pickle ({error}); fetch it again") from None
    return lists, longest


_MAT_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
_MAT_TYPES |= {12: "<i8", 13: "<u8", 16: "u1"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4


def read_mat(path: Path) -> dict[str, Any]:
    """Reads a MATLAB 5 file: name -> array, text, list (cells), or list of dicts (structs).

    Raises:
        DataError: not such a file.
    """
    data = path.read_bytes()
    if data[126:128] != b"IM":
        raise DataError(f"{path} is no MATLAB 5 file; fetch it again")
    variables = {}
    try:
        for type_code, content in _mat_elements(data[128:]):
            if type_code == _COMPRESSED:
                ((type_code, content),) = _mat_elements(zlib.decompress(content))
            if type_code == _MATRIX:
                name, value = _mat_matrix(content)
                variables[name] = value
    except (struct.error, zlib.error, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{path}: damaged ({error}); fetch it again") from None
    return variables


def _mat_elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 8 <= len(data):
        type_code, size = struct.unpack_from("<II", data, position)
        if type_code >> 16:  # a small element: its size is in the upper half, its data follow
            yield type_code & 0xFFFF, data[position + 4 : position + 4 + (type_code >> 16)]
            position += 8
            continue
        yield type_code, data[position + 8 : position + 8 + size]
        # Compressed elements are not padded.
        position += 8 + (size if type_code == _COMPRESSED else -(-size // 8) * 8)


def _mat_matrix(content: bytes) -> tuple[str, Any]:
    elements = [*_mat_elements(content)]
    if not elements:
        return "", np.empty(0)
    array_class = elements[0][1][0]
    shape = tuple(np.frombuffer(elements[1][1], "<i4"))
    name, values = elements[2][1].decode("latin-1"), elements[3:]
    count = int(np.prod(shape))
    if array_class == _CELL:
        return name, [_mat_matrix(value)[1] for _, value in values]
    if array_class == _STRUCT:
        width = int(np.frombuffer(values[0][1], "<i4")[0])
        names = [
            values[1][1][start : start + width].split(b"\0")[0].decode("latin-1")
            for start in range(0, len(values[1][1]), width)
        ]
        cells = [_mat_matrix(value)[1] for _, value in values[2:]]
        rows = [cells[i * len(names) : (i + 1) * len(names)] for i in range(count)]
        return name, [dict(zip(names, row, strict=True)) for row in rows]
    stored, raw = values[0] if values else (2, b"")
    if array_class == _CHAR:
        encoding = "utf-16-le" if stored == 4 else "utf-8"
        return name, raw.decode(encoding)
    # MATLAB stores columns first.
    return name, np.frombuffer(raw, _MAT_TYPES[stored]).reshape(shape, order="F")


def read_examples(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the features of every tf.train.Example of a TFRecord file.

    An int64 feature is its first value; a bytes feature (offset, size) in the file.

    Raises:
        DataError: damaged.
    """
    data = path.read_bytes()
    position = 0
    while position < len(data):
        if position + 12 > len(data):
            raise DataError(f"{path} ends within a record; fetch it again")
        (length,) = struct.unpack_from("<Q", data, position)
        start = position + 12  # after the length and its checksum
        if start + length + 4 > len(data):
            raise DataError(f"{path} ends within a record; fetch it again")
        try:
            yield _example(data, start, start + length)
        except (IndexError, UnicodeDecodeError):
            raise DataError(f"{path}: a record is no tf.train.Example; fetch it again") from None
        position = start + length + 4


def _example(data: bytes, start: int, end: int) -> dict[str, Any]:
    features: dict[str, Any] = {}
    # Example.features, then Features.feature, a map whose entries are key and value.
    for _, first, last in _fields(data, start, end):
        for _, entry_start, entry_end in _fields(data, first, last):
            entry = {tag: span for tag, *span in _fields(data, entry_start, entry_end)}
            if not {1, 2} <= entry.keys():
                continue
            name = data[slice(*entry[1])].decode()
            for tag, list_start, list_end in _fields(data, *entry[2]):
                values = [*_fields(data, list_start, list_end)]
                if tag == 1 and values:  # bytes_list
                    features[name] = (values[0][1], values[0][2] - values[0][1])
                elif tag == 3 and values:  # int64_list, its values packed or not
                    features[name] = _varint(data, values[0][1])[0]
    return features


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (field, start, end) of a message of protobuf; of a varint, the span of its bytes."""
    position = start
    while position < end:
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            after = _varint(data, position)[1]
        elif wire == 2:
            length, position = _varint(data, position)
            after = position + length
        else:
            after = position + (8 if wire == 1 else 4)
        yield tag >> 3, position, after
        position = after


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns (value, position after it)."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
