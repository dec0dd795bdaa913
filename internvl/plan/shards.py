"""What sharding over GPUs adds and takes away: bytes that a GPU holds, bytes that it sends.

Counted from the same units that training shards (`shard_units` of the model), S GPUs to a copy:

    zero1, zero2   float32 weights, gradients and optimizer states of what trains: 1/S each; weights
                   of the computation whole from the first row of a step to the last
    zero3          all weights 1/S; a few units whole at a time, and the root from forward to the
                   end of backward
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from internvl.config import Recipe
from internvl.errors import UserError
from internvl.parallel import shard

FORWARD, BACKWARD = 3, 2
"""Copies of a stack's unit that zero3 has at a time, each as large as its whole weights: the unit
that is computed and the buffer in which the next one arrives. In a forward pass also the buffer in
which the computed one arrived: torch frees it when the next is unpacked, in a backward pass at once
(`FSDPParamGroup.wait_for_unshard`)."""
ALONE = 2
"""The same of a unit that none follows: its weights and the buffer in which they arrived."""


@dataclass(frozen=True)
class UnitSize:
    """Parameters of a unit that are cut."""

    trained: int
    frozen: int

    @property
    def whole(self) -> int:
        return self.trained + self.frozen


@dataclass(frozen=True)
class Shards:
    """How a model lies on the GPUs of a run."""

    stage: str
    num_gpus: int
    replicas: int
    reduce_bytes: int
    """Bytes of a value of a gradient that GPUs sum."""
    dtype_bytes: int
    offload: bool
    tower: tuple[UnitSize, ...]
    """Units of the vision tower, whose backward pass comes last."""
    others: tuple[UnitSize, ...]
    root: UnitSize
    root_early: int
    """Trained parameters of the root that have a gradient before the stack does: its heads."""
    whole: frozenset[int]
    """Ids of the parameters of which every GPU keeps all."""

    @property
    def num_shards(self) -> int:
        """GPUs over which a copy is cut."""
        return self.num_gpus // self.replicas

    def share(self, parameter: nn.Parameter) -> float:
        """Returns the share of a parameter that a GPU holds."""
        return 1.0 if id(parameter) in self.whole else 1 / self.num_shards

    @property
    def trained(self) -> int:
        """Trained parameters that are cut."""
        return self.root.trained + sum(unit.trained for unit in self.units)

    @property
    def all(self) -> int:
        """Parameters that are cut."""
        return self.root.whole + sum(unit.whole for unit in self.units)

    @property
    def units(self) -> tuple[UnitSize, ...]:
        return self.tower + self.others

    def gathered(self, units: tuple[UnitSize, ...], copies: int = BACKWARD) -> float:
        """Bytes of whole weights while `units` are computed, in the dtype of the computation.

        Args:
            copies: of a unit of a stack: FORWARD, BACKWARD or 1, before its first one is computed.
        """
        if self.stage != "zero3":
            return float(self.dtype_bytes * self.all)
        largest = max((unit.whole for unit in units), default=0)
        times = copies if len(units) > 1 else ALONE
        return float(self.dtype_bytes * (self.root.whole + times * largest))

    def head_gradients(self, micro_batches: int) -> float:
        """Bytes of gradients that are whole from the loss to the end of the backward pass: of the
        root's heads; with zero1 of all, if a GPU has several micro-batches."""
        every = self.trained if self.stage == "zero1" and micro_batches > 1 else 0
        return float(self.dtype_bytes * self.root_early + self.reduce_bytes * every)

    def on_their_way(self, units: tuple[UnitSize, ...]) -> float:
        """Bytes of a unit's gradients that are sent to the other GPUs while the next unit of the
        stack runs back; they are gone when that one's follow."""
        # A unit alone has none before it.
        return self.sent(units) if len(units) > 1 else 0.0

    def sent(self, units: tuple[UnitSize, ...]) -> float:
        """Bytes of the buffer that a unit's gradients are sent from."""
        return float(self.reduce_bytes * max((unit.trained for unit in units), default=0))

    def unit_gradients(self, units: tuple[UnitSize, ...]) -> float:
        """Bytes of a unit's gradients when it has run back: in the dtype of the computation, copied
        to the buffer that they are sent from."""
        largest = max((unit.trained for unit in units), default=0)
        return self.dtype_bytes * largest + self.sent(units)

    def root_gradients(self) -> float:
        """Bytes at the end of the backward pass, when the root's gradients are summed."""
        return float(self.root.trained * (self.dtype_bytes + self.reduce_bytes))

    def traffic(self, micro_batches: int) -> Iterator[tuple[str, float, int]]:
        """Yields (collective, bytes that a GPU sends in a step, GPUs that take part)."""
        sent = (self.num_shards - 1) / self.num_shards
        # The root stays whole from forward to backward, a unit of zero3 is gathered twice.
        units = sum(unit.whole for unit in self.units)
        gathers = 2 * units + self.root.whole if self.stage == "zero3" else units + self.root.whole
        rows = micro_batches if self.stage == "zero3" else 1
        yield "all-gather", sent * self.dtype_bytes * gathers * rows, self.num_shards
        sums = 1 if self.stage == "zero1" else micro_batches
        yield "reduce-scatter", sent * self.reduce_bytes * self.trained * sums, self.num_shards
        if self.replicas > 1:
            # Copies sum what they hold, once a step.
            shard_bytes = self.reduce_bytes * self.trained / self.num_shards
            crossing = 2 * (self.replicas - 1) / self.replicas
            yield "all-reduce", crossing * shard_bytes, self.num_gpus


def of(model: Any, recipe: Recipe, num_gpus: int) -> Shards | None:
    """Counts the shards of a model on the meta device; None if every GPU holds all of it.

    Raises:
        UserError: the GPUs do not divide into the replicas.
    """
    config = recipe.parallel
    if config.shard == "none" or num_gpus == 1:
        return None
    if num_gpus % config.replicas or num_gpus == config.replicas:
        raise UserError(
            f"parallel.replicas: {num_gpus} GPUs do not divide into {config.replicas} copies of "
            "two or more each; choose a divisor of them"
        )
    # By training's own rules, so that a new one is planned as it is cut.
    whole = frozenset(map(id, shard.whole_parameters(model, config)))
    counted, sizes, inside = set(whole), [], 0
    tower = set(map(id, model.model.vision_tower.modules()))
    for unit in model.shard_units():  # the tower's first, the root last
        inside += id(unit.module) in tower
        cut = [p for p in unit.module.parameters() if id(p) not in counted]
        counted |= set(map(id, cut))
        trained = sum(p.numel() for p in cut if p.requires_grad)
        sizes.append(UnitSize(trained, sum(p.numel() for p in cut) - trained))
    root = [p for p in cut if p.requires_grad]
    late = {id(p) for module in _before_the_stack(model) for p in module.parameters()}
    late -= {id(model.lm_head.weight)}  # tied, the embedding has a gradient as a head
    return Shards(
        stage=config.shard,
        num_gpus=num_gpus,
        replicas=config.replicas,
        reduce_bytes=2 if config.reduce == "bfloat16" else 4,
        dtype_bytes=2 if recipe.dtype == "bfloat16" else 4,
        offload=config.offload == "cpu",
        tower=tuple(sizes[:inside]),
        others=tuple(sizes[inside:-1]),
        root=sizes[-1],
        root_early=sum(p.numel() for p in root if id(p) not in late),
        whole=whole,
    )


def _before_the_stack(model: Any) -> Iterator[nn.Module]:
    """Yields what runs before the language model's blocks, so that its gradients come after."""
    yield model.model.language_model.embed_tokens
    yield model.model.vision_tower
    projector = getattr(model.model, "multi_modal_projector", None)
    if projector is not None:
        yield projector
