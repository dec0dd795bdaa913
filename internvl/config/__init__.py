"""The keys of a recipe: frozen dataclasses, one file per section. Imports no torch.

Every number that changes a result is a field here. `recipes.py` reads the tree from YAML and
checks it; the resolved one is saved in the run folder.
"""

from internvl.config.compute import ComputeConfig
from internvl.config.data import DataConfig, SourceConfig, TilesChoice, TilesConfig, VideoConfig
from internvl.config.evals import (
    BenchmarkEval,
    CaptionEval,
    ClassifyEval,
    EvalConfig,
    EvalGuardConfig,
    EvalSection,
    JudgedEval,
    LossEval,
    PreferenceEval,
    QaEval,
    RetrievalEval,
    # With these three, cli/ and evaluate.py take a new evaluator's keys without an edit.
    eval_config,
    eval_keys,
    eval_options,
)
from internvl.config.model import LoraConfig, ModelConfig
from internvl.config.objective import (
    MpoConfig,
    ObjectiveConfig,
    ObjectiveSection,
    # No recipe can choose it: callers test for it to tell InternVL-14B's objectives.
    PairsConfig,
    RetrievalConfig,
    SftConfig,
    Stage2Config,
    objective_names,
)
from internvl.config.optim import LayerDecayConfig, OptimConfig
from internvl.config.parallel import ParallelConfig
from internvl.config.recipe import Recipe
from internvl.config.training import CheckpointConfig, GuardConfig, StopConfig
from internvl.config.types import Fraction, Part, Positive, Tower

# Not docs, recipes and released: they read files; callers import them by their full name.
__all__ = [  # ruff removes imports that are neither used nor listed
    "BenchmarkEval",
    "CaptionEval",
    "CheckpointConfig",
    "ClassifyEval",
    "ComputeConfig",
    "DataConfig",
    "EvalConfig",
    "EvalGuardConfig",
    "EvalSection",
    "Fraction",
    "GuardConfig",
    "JudgedEval",
    "LayerDecayConfig",
    "LoraConfig",
    "LossEval",
    "ModelConfig",
    "MpoConfig",
    "ObjectiveConfig",
    "ObjectiveSection",
    "OptimConfig",
    "PairsConfig",
    "ParallelConfig",
    "Part",
    "Positive",
    "PreferenceEval",
    "QaEval",
    "Recipe",
    "RetrievalConfig",
    "RetrievalEval",
    "SftConfig",
    "SourceConfig",
    "Stage2Config",
    "StopConfig",
    "TilesChoice",
    "TilesConfig",
    "Tower",
    "VideoConfig",
    "eval_config",
    "eval_keys",
    "eval_options",
    "objective_names",
]
