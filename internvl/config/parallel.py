"""`parallel:` weights, gradients and optimizer state over several GPUs."""

from dataclasses import dataclass
from typing import Literal

from internvl.config.types import STRICT, Positive


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over the processes of a run. Results are the same up to rounding, and a
    run may go on with other settings, or with another number of processes."""

    __pydantic_config__ = STRICT
    shard: Literal["none", "zero1", "zero2", "zero3"] = "none"
    """DeepSpeed's stages. none: every GPU holds everything. zero1: optimizer state and the float32
    weights that it updates are cut into shards, one for each GPU; weights of the computation and
    gradients are whole while a step runs. zero2: gradients are cut too. zero3: so are the weights,
    frozen ones included; each block is gathered right before it is computed. A frozen vision tower
    of less than a billion weights stays whole. With one process nothing is cut."""
    replicas: Positive = 1
    """Copies of the sharded model: each is cut over the number of GPUs divided by `replicas`, which
    gather among themselves alone. The GPUs of one machine a copy keep weights off the network."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over GPUs. bfloat16 halves what they send, and rounds."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: shards of weights, gradients and optimizer state stay in CPU memory, where the update is
    computed; a block's weights are copied to the GPU to be gathered."""

    def problems(self) -> list[str]:
        """Returns the problems of values that are valid alone and not together."""
        if self.shard != "none":
            return []
        return [
            f"parallel.{key}: only with parallel.shard: zero1, zero2 or zero3"
            for key in ("replicas", "reduce", "offload")
            if getattr(self, key) != getattr(type(self), key)
        ]

    def unfit(self, ranks: int) -> str | None:
        """Returns why so many processes do not share a model like this, or None."""
        if self.shard == "none":
            return None
        # A recipe of many processes runs on one too; what that cannot do is refused.
        if ranks == 1:
            return _OFFLOADS_ALONE if self.offload != "none" else None
        if ranks % self.replicas == 0 and ranks > self.replicas:
            return None
        return (
            f"parallel.replicas: {ranks} processes do not divide into {self.replicas} copies of "
            "two or more each; choose a divisor of them, or parallel.shard=none for a copy on each"
        )


_OFFLOADS_ALONE = (
    "parallel.offload: cpu is for several processes; start the run with torchrun, or set "
    "parallel.offload=none and optim.offload=true"
)
