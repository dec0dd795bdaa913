"""Hands samples that one rank has read to the rank that trains on them."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from internvl import dist
from internvl.data import balance, transfer
from internvl.data.balance import Piece, Place
from internvl.data.records import Unit

T = TypeVar("T")

_LONGEST_WAIT = timedelta(hours=1)
"""Of a rank for the slowest one, which may still read; one that has died is noticed at once."""


class Exchange:
    """A process group of its own on the CPU, for the thread that prepares the next step.

    Its messages never mix with those of the training loop, which runs at the same time. All ranks
    make one together, and call each method as often and in the same order.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = dist.rank(), dist.world_size()
        self.group: Any = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    def gather(self, value: T) -> list[T]:
        """Returns every rank's `value`, in rank order. Values must pickle."""
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def swap(self, outgoing: Sequence[Sequence[T]]) -> list[list[T]]:
        """Sends `outgoing[r]` to rank r; returns what every rank has sent here, in rank order.

        Values must pickle; their uint8 tensors travel as they are.
        """
        # Nothing is copied for this rank itself.
        sent = [
            _message(values) if rank != self.rank else torch.empty(0, dtype=torch.uint8)
            for rank, values in enumerate(outgoing)
        ]
        # First: all must know how much comes.
        sizes = torch.tensor([len(message) for message in sent])
        incoming_sizes = torch.empty_like(sizes)
        distributed.all_to_all_single(incoming_sizes, sizes, group=self.group)
        received = torch.empty(int(incoming_sizes.sum()), dtype=torch.uint8)
        distributed.all_to_all_single(
            received, torch.cat(sent), incoming_sizes.tolist(), sizes.tolist(), group=self.group
        )
        incoming = map(_values, received.split(incoming_sizes.tolist()))
        return [
            list(outgoing[rank]) if rank == self.rank else values
            for rank, values in enumerate(incoming)
        ]


class Sharing(Exchange):
    """Evens out the work of a step over all ranks.

    Args:
        unit_cost: of a unit, in any measure, the same on every rank.
        batch_cost: of a batch, in any measure.
    """

    def __init__(
        self, unit_cost: Callable[[Any], float], batch_cost: Callable[[Any], float]
    ) -> None:
        super().__init__()
        self.unit_cost, self.batch_cost = unit_cost, batch_cost

    def even(self, units: Sequence[T]) -> list[T]:
        """Moves units between ranks until all cost nearly the same; returns this rank's."""
        dealt = balance.even_out(self.gather([self.unit_cost(unit) for unit in units]))
        return self.fetch(units, dealt)

    def rows(
        self, units: Sequence[Unit], lengths: Sequence[int], max_tiles: int
    ) -> list[list[Unit]]:
        """Packs the units of all ranks into rows of nearly equal cost; returns this rank's, some of
        which may be empty.

        Args:
            units: each fits a row.
            lengths: that rows are padded to, ascending; the last one is the longest row.
        """
        pieces = [Piece(self.unit_cost(unit), unit.num_tokens, unit.num_tiles) for unit in units]
        dealt = balance.even_rows(self.gather(pieces), lengths, max_tiles)
        # All ranks deal alike, from the same sizes: only the units themselves are sent.
        fetched = iter(self.fetch(units, [list(chain.from_iterable(rows)) for rows in dealt]))
        return [list(islice(fetched, len(row))) for row in dealt[self.rank]]

    def fetch(self, values: Sequence[T], dealt: Sequence[Sequence[Place]]) -> list[T]:
        """Returns the values that `dealt` names for this rank, from the ranks that hold them.

        Args:
            values: those that this rank holds.
            dealt: (rank that holds it, index there) of the values of every rank.
        """
        outgoing = [[values[i] for holder, i in places if holder == self.rank] for places in dealt]
        # Every rank sends in the order of `dealt`, so that no value needs a name.
        incoming = [iter(received) for received in self.swap(outgoing)]
        return [next(incoming[holder]) for holder, _ in dealt[self.rank]]

    def align(self, batches: Sequence[T]) -> list[T]:
        """Orders batches by cost, the dearest first: ranks that wait for each other in every batch
        wait least."""
        return sorted(batches, key=self.batch_cost, reverse=True)


def _message(values: Sequence[Any]) -> Tensor:
    """Packs values into bytes, uint8 (n,): length of the pickle, pickle, pixels."""
    if not values:
        return torch.empty(0, dtype=torch.uint8)
    pickled, tensors = transfer.dump(list(values))
    head = torch.tensor([len(pickled)]).view(torch.uint8)
    body = torch.frombuffer(bytearray(pickled), dtype=torch.uint8)
    return torch.cat([head, body, *(tensor.flatten() for tensor in tensors)])


def _values(message: Tensor) -> list[Any]:
    if not len(message):
        return []
    # Cloned: a view of 8 bytes as an integer must be aligned, and pixels outlive the message.
    length = int(message[:8].clone().view(torch.int64))
    return transfer.load(message[8 : 8 + length].numpy().tobytes(), message[8 + length :])
