"""Units of a model whose weights several GPUs gather and free together."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import nn

SMALL_TOWER = 10**9
"""Weights from which a vision tower is gathered block by block; a smaller one is one unit, and
stays whole on every GPU if it is frozen."""


@dataclass(frozen=True)
class Unit:
    """A module that is gathered before it runs."""

    module: nn.Module
    methods: tuple[str, ...] = ()
    """Methods besides `forward` that are called from outside and read its weights."""
    following: nn.Module | None = None
    """The unit that runs next, which is gathered while this one runs."""


def stack(blocks: Iterable[nn.Module]) -> Iterator[Unit]:
    """Yields the blocks of a stack, a unit each."""
    blocks = [*blocks]
    for block, following in zip_longest(blocks, blocks[1:]):
        yield Unit(block, following=following)


def tower_units(tower: Any) -> Iterator[Unit]:
    """Yields the units of a vision tower, inner ones first."""
    # Many small messages would be bound by latency.
    if _size(tower) >= SMALL_TOWER:
        yield from stack(tower.encoder.layer)
    yield Unit(tower)


def stays_whole(tower: nn.Module) -> bool:
    """Returns whether every GPU keeps all of a vision tower: it is frozen and small."""
    # A trained one has gradients and moments, eight times what its weights take.
    return not trains(tower) and _size(tower) < SMALL_TOWER


def trains(*modules: nn.Module) -> bool:
    """Returns whether a parameter of the modules trains."""
    return any(p.requires_grad for module in modules for p in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
