"""What a run holds while it trains."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from internvl import evals
from internvl.config import Recipe
from internvl.data import loader
from internvl.data.sampler import Ending, Order, Position
from internvl.inference.chat import Chat
from internvl.inference.dual import Dual
from internvl.models.chat import model as chat_model
from internvl.models.dual.model import DualModel
from internvl.objectives import Objective
from internvl.training import checkpoint
from internvl.training.spikes import Guard


@dataclass
class TrainState:
    """A run in progress. Only `model`, `optimizer`, `step`, `position`, `num_bad`, `guard` and
    `warmup_s` change."""

    recipe: Recipe
    device: torch.device
    chat: Chat | Dual
    """The model with its tokenizer and preprocessing, as `internvl.load` returns it."""
    objective: Objective
    optimizer: torch.optim.Optimizer
    order: Order
    reader: Dataset[loader.Read]
    num_steps: int
    total_samples: int
    """Samples that the whole run shows; 0 if a step is counted in rows."""
    guard: Guard
    saver: checkpoint.Saver
    evaluators: dict[str, evals.Evaluator]
    """The recipe's evaluations with their data read."""
    endings: tuple[Ending, ...] = ()
    """Earlier ends of a run that was made longer."""
    # Fixed when the run begins: compiled code exists for these lengths alone.
    row_lengths: tuple[int, ...] = ()
    """Lengths in tokens that rows are padded to; empty if rows are not padded."""
    step: int = 0
    position: Position | None = None
    """Position in the data after `step` if a step is counted in rows, else None."""
    num_bad: int = 0
    """Bad samples left out so far, over all ranks."""
    warmup_s: float = 0.0
    """Seconds of compilation before the first step."""

    # Through the handle: evaluations get this very model.
    @property
    def model(self) -> chat_model.ChatModel | DualModel:
        return self.chat.model

    @property
    def folder(self) -> Path:
        return self.recipe.run

    def is_due(self, every: int) -> bool:
        """Returns True after each `every` steps; never for 0."""
        return every > 0 and self.step % every == 0
