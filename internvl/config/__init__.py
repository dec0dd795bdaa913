"""What a recipe may say: frozen dataclasses, a file for each section. Imports no torch.

Every number that changes a result is a field here. `recipes.py` reads the tree from YAML and
checks it; the resolved one is saved in the run folder.
"""

from internvl.config.compute import ComputeConfig
from internvl.config.data import DataConfig, SourceConfig, TilesChoice, TilesConfig, VideoConfig
from internvl.config.evals import EvalConfig, EvalGuardConfig, eval_config
from internvl.config.model import LoraConfig, ModelConfig
from internvl.config.objective import TERMS, ObjectiveConfig
from internvl.config.optim import LayerDecayConfig, OptimConfig
from internvl.config.problems import sentence
from internvl.config.recipe import Recipe
from internvl.config.training import CheckpointConfig, GuardConfig, StopConfig
from internvl.config.types import Fraction, Part, Positive, Tower

__all__ = [
    "TERMS",
    "CheckpointConfig",
    "ComputeConfig",
    "DataConfig",
    "EvalConfig",
    "EvalGuardConfig",
    "Fraction",
    "GuardConfig",
    "LayerDecayConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Part",
    "Positive",
    "Recipe",
    "SourceConfig",
    "StopConfig",
    "TilesChoice",
    "TilesConfig",
    "Tower",
    "VideoConfig",
    "eval_config",
    "sentence",
]
