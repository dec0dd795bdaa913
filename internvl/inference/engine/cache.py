"""Keys and values of many requests in slots of one length, and what a decoder layer sees of them.

A slot holds one request from its prefill to its last token; then the next one takes it. A layer of
`transformers` gets an object with `update` in place of a cache: `Prefilled` writes a packed row's
keys to the slots of its requests, `Padded` those of padded rows, `Decoded` the next tokens of every
slot.
"""

from collections.abc import Sequence
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
        devices: Sequence[torch.device],
    ) -> None:
        """
        Args:
            devices: of every layer, or one for all of them.
        """
        self.slots = slots
        self.length = length
        shape = (2, slots + 1, heads, length, width)
        # Zeros: a masked key still meets a query, and NaN from old memory would pass any mask.
        # One block on one device: its memory is there as a whole, or not at all.
        if len(devices) == 1:
            together = torch.zeros(layers, *shape, dtype=dtype, device=devices[0])
            self.memory = list(together.unbind())
        else:
            self.memory = [torch.zeros(shape, dtype=dtype, device=device) for device in devices]

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
class Padded:
    """A layer's cache while prompts are prefilled in rows that are padded on the right.

    keys, values: of the layer. slots: int64 (B,), where each row belongs. Keys of padding stay
    masked until the tokens that are generated there replace them.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(B, heads, T, head size) each: writes them; returns the rows' own, to attend to."""
        # The layer may be on another device than the model's inputs.
        slots = self.slots.to(self.keys.device)
        for memory, rows in ((self.keys, keys), (self.values, values)):
            memory[slots, :, : rows.shape[2]] = rows.to(memory.dtype)
        return keys, values


@dataclass(frozen=True)
class Decoded:
    """A layer's cache while every slot gets a token, or one for each of its K beams.

    keys, values: of the layer. slots: int64 (B, 1). cells: int64 (B, K), where in its slot each
    token belongs. reach: cells that any of them can see; None: all that a slot has.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    cells: Tensor
    reach: int | None

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(B, heads, K, head size) each: writes them; returns (B, heads, reach, head size)."""
        count = len(keys)
        # As above; on one device nothing is copied, and a graph captures nothing.
        slots, cells = (index.to(self.keys.device) for index in (self.slots, self.cells))
        for memory, tokens in ((self.keys, keys), (self.values, values)):
            memory[slots, :, cells] = tokens.transpose(1, 2).to(memory.dtype)
        return self.keys[:count, :, : self.reach], self.values[:count, :, : self.reach]
