"""Keys and values of many requests in slots of one length, and what a decoder layer sees of them.

A slot holds one request from its prefill to its last token; then the next one takes it. A layer of
`transformers` gets an object with `update` in place of a cache: `Prefilled` writes a packed row's
keys to the slots of its requests, `Decoded` one token of every slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class SlotCache:
    """Keys and values of all layers, (slots + 1, heads, length, head size) each.

    The slot after the last belongs to nobody: padding of a row is written there.
    """

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        length: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.length = length
        shape = (layers, 2, slots + 1, heads, length, width)
        # Zeros: a masked key still meets a query, and NaN from old memory would pass any mask.
        self.memory = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a layer, (slots + 1, heads, length, head size)."""
        keys, values = self.memory[index].unbind()
        return keys, values

    @staticmethod
    def bytes_per_slot(*, layers: int, length: int, heads: int, width: int, item: int) -> int:
        """Bytes of one slot; `item` is the dtype's size."""
        return 2 * layers * heads * length * width * item


@dataclass(frozen=True)
class Prefilled:
    """A layer's cache while a packed row is prefilled.

    keys, values: of the layer. slots, positions: int64 (T,), where each token of the row belongs.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    positions: Tensor

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(1, heads, T, head size) each: writes them; returns the row's own, to attend to."""
        for memory, row in ((self.keys, keys), (self.values, values)):
            memory[self.slots, :, self.positions] = row[0].transpose(0, 1).to(memory.dtype)
        return keys, values


@dataclass(frozen=True)
class Decoded:
    """A layer's cache while every slot gets one token.

    keys, values: of the layer. slots, positions: int64 (B,). reach: positions that any of them
    can see; None: all that a slot has.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    positions: Tensor
    reach: int | None

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(B, heads, 1, head size) each: writes them; returns (B, heads, reach, head size)."""
        count = len(keys)
        for memory, token in ((self.keys, keys), (self.values, values)):
            memory[self.slots, :, self.positions] = token[:, :, 0].to(memory.dtype)
        return self.keys[:count, :, : self.reach], self.values[:count, :, : self.reach]
