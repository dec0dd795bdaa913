"""Counts the bytes of all tensors that are alive: on a CPU no allocator tells.

Counted are the outputs of operations and what was there before, by storage: views count once. What
libraries allocate inside an operation (a collective's buffers, a compiled block's) is not seen.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_RESIZING = ("fsdp", "c10d", "_c10d_functional")
"""Namespaces of operations beside which shards give storages memory, or take it away."""


class StorageMeter(TorchDispatchMode):
    """Measures the peak of living tensors inside its context.

    Args:
        held: what is alive at the start; other things are ignored.
    """

    def __init__(self, held: Iterable[Any]) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._total = self.peak = 0
        for tensor in held:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Before it runs: gathered weights that were freed must not be counted beside new ones.
        if func.namespace in _RESIZING:
            self._refresh()
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._add(value)
        if func.namespace in _RESIZING:
            self._refresh()
        self.peak = max(self.peak, self._total)
        return result

    def _add(self, value: Any) -> None:
        if isinstance(value, DTensor):
            value = value._local_tensor
        if not isinstance(value, torch.Tensor) or value.is_meta:
            return
        storage = value.untyped_storage()
        key = id(storage)
        if key in self._sizes and self._sizes[key][0]() is storage:
            return
        # torch keeps the Python object of a storage for as long as the storage itself.
        self._sizes[key] = weakref.ref(storage, lambda _: self._drop(key)), storage.nbytes()
        self._total += storage.nbytes()

    def _drop(self, key: int) -> None:
        _, size = self._sizes.pop(key, (None, 0))
        self._total -= size

    def _refresh(self) -> None:
        """Asks all storages for their size: shards resize them."""
        for key, (reference, size) in list(self._sizes.items()):
            storage = reference()
            if storage is not None and storage.nbytes() != size:
                self._sizes[key] = reference, storage.nbytes()
                self._total += storage.nbytes() - size
        self.peak = max(self.peak, self._total)
