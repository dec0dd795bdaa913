"""Reads the tensors of weight files, each when it is asked for.

No code from a file is ever run: weights are safetensors, or `.bin` files through torch's
`weights_only=True`.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internvl import files
from internvl.errors import ModelFolderError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that stays in its file until `read`; a mapping of them is a streamed state dict."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_rows: Callable[[int, int], Tensor] | None = None
    """Reads rows [start, stop) alone; None if they take reading the whole tensor."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns rows [start, stop), (stop - start, …)."""
        # Not from the file: its reader refuses slices without elements.
        if start >= stop:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        if self.read_rows is None or stop - start == self.shape[0]:
            return self.read()[start:stop]
        return self.read_rows(start, stop)

    def __getitem__(self, index: Any) -> Tensor:
        # transformers indexes every entry of a state dict with [...] when it fills a parameter.
        return self.read()[index]


def merge_tensors(shards: Sequence[Path]) -> dict[str, LazyTensor]:
    """Merges the tensors of all files by name.

    Raises:
        ModelFolderError: a file is damaged, or two hold different tensors of one name.
    """
    tensors: dict[str, LazyTensor] = {}
    owners: dict[str, Path] = {}
    for file in shards:
        for name, tensor in open_tensors(file):
            # Equal duplicates are harmless; only a real conflict costs reading both tensors.
            if name in tensors and not _equal(tensors[name], tensor):
                raise ModelFolderError(
                    f"{file}: holds another {name} than {owners[name].name}, and both are shards "
                    "of this model; they are of two models, so download the folder again or remove "
                    "the older files"
                )
            tensors[name], owners[name] = tensor, file
    return tensors


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    # As bytes: NaN equals itself, and 8-bit floats have no comparison.
    first, second = (tensor.read().contiguous().view(-1) for tensor in (a, b))
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def open_tensors(file: Path) -> Iterator[tuple[str, LazyTensor]]:
    """Yields (name, lazy tensor) of a weight file. Raises ModelFolderError if it is damaged."""
    if file.suffix != ".safetensors":
        for name, tensor in load_pickled(file).items():
            yield name, in_memory(tensor)
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                header = opened.get_slice(name)  # shape and dtype without the data
                dtype = _DTYPES.get(header.get_dtype(), torch.float32)
                shape = tuple(header.get_shape())
                yield name, LazyTensor(shape, dtype, _reader(file, name), _row_reader(file, name))
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ModelFolderError:
    return files.explain_safetensors(file, error)


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Opened for each tensor: an open file keeps every page it has shown resident, so that a
        # model loaded in another dtype would need its files' size on top of its own.
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error

    return read


def _row_reader(file: Path, name: str) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error

    return read


def in_memory(tensor: Tensor) -> LazyTensor:
    """Wraps a tensor that is in memory already."""
    return LazyTensor(
        tuple(tensor.shape), tensor.dtype, lambda: tensor, lambda start, stop: tensor[start:stop]
    )


def without_values(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Returns zeros of the same shape that take no memory, whatever the file holds."""

    def read() -> Tensor:
        return torch.zeros((), dtype=dtype).expand(tensor.shape)

    return LazyTensor(tensor.shape, dtype, read)


def load_pickled(file: Path) -> dict[str, Tensor]:
    """Loads the tensors of a `.bin` or `.pth` file, memory-mapped. Raises ModelFolderError."""
    try:
        status = file.stat()
    except OSError as error:
        raise files.unreadable(file, error) from error
    return _load_pickled(file, status.st_mtime_ns, status.st_size)


# One entry: a cached file stays mapped, and a load asks for the same file several times.
@lru_cache(maxsize=1)
def _load_pickled(file: Path, changed_ns: int, size: int) -> dict[str, Tensor]:
    """Loads `file`; `changed_ns` and `size` are cache keys, so a rewritten file is read anew."""
    remedy = "use the safetensors files of the release"
    try:
        # Old files are no zip archives, and cannot be mapped.
        mapped = zipfile.is_zipfile(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    # Whatever bytes a damaged pickle holds, torch raises: KeyError, EOFError, RuntimeError …
    except Exception as error:
        meaning = files.describe(file)
        raise ModelFolderError(
            f"{file}: {meaning or f'not a plain file of tensors ({files.pickle_problem(error)})'}; "
            f"{remedy}"
        ) from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{file}: holds a {type(content).__name__}, not tensors; {remedy}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelFolderError(
                f"{file}: holds {type(value).__name__} under {name!r} where only tensors belong, "
                f"as a training checkpoint does; {remedy}"
            )
    return content
