"""The root of a recipe: its sections, and the keys of the run itself."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from internvl.config.compute import ComputeConfig
from internvl.config.data import DataConfig
from internvl.config.evals import EvalConfig, EvalSection
from internvl.config.model import ModelConfig
from internvl.config.objective import ObjectiveSection, PairsConfig, SftConfig
from internvl.config.optim import OptimConfig
from internvl.config.parallel import ParallelConfig
from internvl.config.training import CheckpointConfig, GuardConfig, StopConfig
from internvl.config.types import STRICT, Positive, UserPath


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: every value that decides its result."""

    __pydantic_config__ = STRICT
    model: ModelConfig
    data: DataConfig
    # Frozen sections, so that all recipes may share one default instance.
    objective: ObjectiveSection = SftConfig()
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    parallel: ParallelConfig = ParallelConfig()
    evals: dict[str, EvalSection] = field(default_factory=dict)
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stop: StopConfig = StopConfig()
    run: UserPath
    """The run folder. If it exists, training resumes from its newest checkpoint."""
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
    """Leave out the last batch of the run if it is smaller."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the computation. Trained weights are float32, frozen ones have this dtype."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if there is a GPU."""
    threads: Positive | None = None
    """CPU threads of the computation; null leaves the choice to torch. The last bits of results on
    a CPU depend on it, and small models are often fastest with one."""
    seed: int = 42
    """Of shuffling, dropout and randomly initialized weights."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    watchdog_s: Annotated[float, Field(ge=0)] = 300.0
    """Seconds without progress after which every process writes its stacks to the folder `watchdog`
    of the run, and the log says which one the others wait for. Processes that wait for each other
    twice as long end the run. 0: never, and waiting has no end."""
    wandb: str | None = None
    """Weights & Biases project that metrics are sent to as well; TensorBoard gets them always."""

    @property
    def shares_prefix(self) -> bool:
        """True if samples of the same image are read and packed together."""
        # Pairs are not packed into rows, so they have no prefix to share.
        return self.objective.rows_are_packed and self.data.share_prefix

    @property
    def run_evals(self) -> dict[str, EvalConfig]:
        """`evals` as the run does them, told of the model that it starts from."""
        # With adapters that model is the same one with its adapters off.
        start = self.model.id if self.model.lora is None else None
        return {name: config.in_run(start) for name, config in self.evals.items()}

    @property
    def pairs(self) -> PairsConfig:
        """`objective`, if it is one over pairs. Raises ValueError for another."""
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
        """Returns the optimizer steps of the run, given the samples of an epoch."""
        # First: with `global_batch_rows` steps are given, and samples per step are unknown.
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        total = round(num_samples * self.epochs)
        # One last, smaller batch for the whole run: a step may span the end of an epoch.
        whole, rest = divmod(total, self.batch_samples)
        return whole if self.drop_last or rest == 0 else whole + 1

    def num_samples(self, num_samples: float) -> int:
        """Returns the samples that the whole run shows, given the samples of an epoch."""
        if self.steps is not None or self.drop_last:
            return self.num_steps(num_samples) * self.batch_samples
        assert self.epochs is not None
        return round(num_samples * self.epochs)
