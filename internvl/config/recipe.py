"""A whole run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from internvl.config.compute import ComputeConfig
from internvl.config.data import DataConfig
from internvl.config.evals import EvalSection
from internvl.config.model import ModelConfig
from internvl.config.objective import ObjectiveSection, PairsConfig, SftConfig
from internvl.config.optim import OptimConfig
from internvl.config.training import CheckpointConfig, GuardConfig, StopConfig
from internvl.config.types import STRICT, Positive


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    __pydantic_config__ = STRICT
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveSection = SftConfig()
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    evals: dict[str, EvalSection] = field(default_factory=dict)
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stop: StopConfig = StopConfig()
    run: Path
    """The run folder. Training on an existing one goes on where it stopped."""
    global_batch: Positive | None = None
    """Samples in one optimizer step, over all devices, however they pack. Give this or
    `global_batch_rows`."""
    global_batch_rows: Positive | None = None
    """Packed rows in one optimizer step, over all devices, however many samples they hold; only
    for chat models and with `steps`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data. Give this or `steps`."""
    steps: Positive | None = None
    """Optimizer steps. Give this or `epochs`."""
    drop_last: bool = False
    """Leave the last, smaller batch of the run out."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type. Trained weights are kept in float32, frozen ones in this type."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    threads: Positive | None = None
    """CPU threads that compute; null leaves the choice to torch. Results on a CPU depend on it in
    their last bits, and small models are often fastest with one."""
    seed: int = 42
    """Of shuffling, dropout and fresh weights."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases that metrics also go to; TensorBoard has them in any case."""

    @property
    def shares_prefix(self) -> bool:
        """Whether samples of the same image form one unit; pairs are drawn one by one."""
        return self.objective.rows_are_packed and self.data.share_prefix

    @property
    def pairs(self) -> PairsConfig:
        """`objective` where it is one over pairs. Raises ValueError for another."""
        if not isinstance(self.objective, PairsConfig):
            raise ValueError(f"objective.name: {self.objective.name} does not train on pairs")
        return self.objective

    @property
    def batch_samples(self) -> int:
        """`global_batch`. Raises ValueError if a step is counted in rows."""
        if self.global_batch is None:
            raise ValueError("global_batch: a step is counted in rows")
        return self.global_batch

    def num_steps(self, num_samples: float) -> int:
        """Optimizer steps of the run over an epoch of `num_samples` samples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        total = round(num_samples * self.epochs)
        whole, rest = divmod(total, self.batch_samples)
        return whole if self.drop_last or rest == 0 else whole + 1

    def num_samples(self, num_samples: float) -> int:
        """Samples that the whole run shows, over an epoch of `num_samples` samples."""
        if self.steps is not None or self.drop_last:
            return self.num_steps(num_samples) * self.batch_samples
        assert self.epochs is not None
        return round(num_samples * self.epochs)
